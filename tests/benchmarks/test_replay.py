"""Test the replay of finished grids: its contract, its counts, and the strategies' results on the published grids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks.selection.replay import judge, main, replay_all, summarize
from benchmarks.selection.tables import TableRunner, build_space, list_seed_orders, read_grids

from rightrank.search import STRATEGIES

pytestmark = pytest.mark.trains

PUBLISHED = Path(__file__).parents[2] / "benchmarks/selection/published_grids.json"
KEYS = {
    "curves",
    "exact",
    "exact_or_neighbour",
    "under_picks",
    "over_picks",
    "mean_excess_regret",
    "share_of_cells",
    "abstentions",
}
GRID = {
    "id": "made up",
    "ranks": [1, 2, 4],
    "higher_is_better": False,
    "lr_grid": {
        "1": {"0.001": 1.30, "0.003": 1.20},
        "2": {"0.001": 1.06, "0.003": 1.10},
        "4": {"0.001": 1.05, "0.003": 1.00},
    },
}


def write(path: Path, *curves: object) -> Path:
    path.write_text(json.dumps({"curves": curves}))
    return path


@pytest.mark.parametrize("strategy", ["bracket"])
@pytest.mark.parametrize("margin", [0.002, 0.005])
def test_published_grids_meet_the_goal(strategy: str, margin: float) -> None:
    summary = summarize(replay_all(read_grids(PUBLISHED), STRATEGIES[strategy], margin))
    assert summary["exact_or_neighbour"] >= 0.95 * summary["curves"]
    assert summary["under_picks"] <= 0.02 * summary["curves"]
    assert summary["share_of_cells"] <= 0.55  # these trainings cannot stop early


def test_the_whole_grid_is_always_exact() -> None:
    summary = summarize(replay_all(read_grids(PUBLISHED), STRATEGIES["grid"], 0.005))
    assert summary["exact"] == summary["curves"] == 16
    assert summary["share_of_cells"] == 1


def test_counts_under_and_over(tmp_path: Path) -> None:
    curve = read_grids(write(tmp_path / "grids.json", GRID))[0]
    assert [curve.truth(margin) for margin in (0.01, 0.07, 0.3)] == [4, 2, 1]
    under = judge(curve, 0.01, 1, 0.003, 2.0)
    assert under.under
    assert not under.neighbour
    assert under.regret == pytest.approx(0.19)
    assert judge(curve, 0.07, 4, 0.003, 2.0).over
    handed_over = judge(curve, 0.01, 4, 0.001, 2.0)
    assert handed_over.exact
    assert handed_over.regret == pytest.approx(0.04)  # of the cell, not of the rank at its best
    assert judge(curve, 0.01, 2, 0.001, 3.0).share == pytest.approx(0.5)
    assert summarize([judge(curve, 0.01, None, None, 1.0)])["abstentions"] == 1


def test_higher_is_better_is_the_same_turned(tmp_path: Path) -> None:
    turned = {
        rank: {learning_rate: -value for learning_rate, value in row.items()} for rank, row in GRID["lr_grid"].items()
    }  # type: ignore[attr-defined]
    path = write(tmp_path / "grids.json", GRID, GRID | {"higher_is_better": True, "lr_grid": turned})
    for strategy in STRATEGIES.values():
        plain, flipped = replay_all(read_grids(path), strategy, 0.07)
        assert (plain.pick, plain.truth) == (flipped.pick, flipped.truth)


def test_a_name_tells_nothing(tmp_path: Path) -> None:
    for number, name in enumerate(("planted_r1", "zzz")):
        write(tmp_path / f"{number}.json", GRID | {"id": name})
    first, second = (replay_all(read_grids(tmp_path / f"{n}.json"), STRATEGIES["bracket"], 0.01)[0] for n in (0, 1))
    assert (first.pick, first.trainings) == (second.pick, second.trainings)


def test_seeds_are_averaged_for_the_truth(tmp_path: Path) -> None:
    seeds = {
        rank: {learning_rate: {"0": v - 0.1, "1": v + 0.1} for learning_rate, v in row.items()}
        for rank, row in GRID["lr_grid"].items()
    }  # type: ignore[attr-defined]
    curve = read_grids(write(tmp_path / "grids.json", GRID | {"seed_grid": seeds}))[0]
    assert curve.truth(0.07) == 2
    assert curve.seeds == [0, 1]


def test_prints_one_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "grids.json", GRID, {"id": "no grid", "ranks": [1, 2], "values": [1, 2]})
    assert main(["--grids", str(path), "--strategy", "bracket", "--margin", "0.07", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed.keys() >= KEYS
    assert printed["curves"] == 1


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        (None, [], "No such file"),
        ("{", [], "not a file of grids"),
        ('{"curves": []}', [], "nothing to replay"),
        ('{"curves": [{"lr_grid": {"1": {"x": 2}}}]}', [], "not a file of grids"),
        ('{"curves": [{"lr_grid": {"1": {"0.1": 2}}}]}', [], "two ranks"),
        (json.dumps({"curves": [GRID]}), ["--margin", "-1"], "above 0"),
        (json.dumps({"curves": [GRID]}), ["--strategy", "brackt"], "did you mean 'bracket'"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, options: list[str], words: str
) -> None:
    path = tmp_path / "grids.json"
    if content is not None:
        path.write_text(content)
    usual = ["--grids", str(path), "--strategy", "bracket", "--margin", "0.01"]
    assert main([*usual, *options]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out


def test_a_grid_of_accuracies_is_searched_by_its_losses(tmp_path: Path) -> None:
    """Check that a clearly better loss at a quarter decides, whatever the accuracy there; the answer compares accuracies."""
    cells = {"1": {"0.001": {"0": 0.70}, "0.01": {"0": 0.60}}, "4": {"0.001": {"0": 0.80}, "0.01": {"0": 0.60}}}
    early = {rank: {"0.001": {"0": 0.40}, "0.01": {"0": 0.50}} for rank in cells}
    losses = {rank: {"0.001": {"0": 0.5}, "0.01": {"0": 1.0}} for rank in cells}
    grid = {
        "id": "accuracies",
        "metric": "accuracy",
        "higher_is_better": True,
        "base": 0.3,
        "base_loss": 1.4,
        "seed_grid": cells,
        "checkpoints": dict.fromkeys(("0.125", "0.25", "0.5"), early),
        "losses": dict.fromkeys(("0.125", "0.25", "0.5"), losses),
        "averaged": {"0.125": losses},
    }
    curve = read_grids(write(tmp_path / "grids.json", grid))[0]
    (judged,) = replay_all([curve], STRATEGIES["bracket"], 0.02)
    assert (judged.pick, judged.learning_rate) == (4, 0.001)
    assert TableRunner(curve).run(build_space(curve, 0.02).make_arm(0, 0.0)).metrics == {"accuracy": 0.3, "loss": 1.4}
    assert judged.trainings == 2 * (1 + 0.25)  # ranks 4 and 1: one training, and a quarter of the other learning rate


def test_each_seed_has_its_turn_to_be_the_first() -> None:
    (curve, *_) = read_grids(PUBLISHED.with_name("seeded_grids.json.xz"))
    curves_by_seed = list_seed_orders(curve)
    top, learning_rate = curve.ranks[-1], curve.learning_rates[0]
    key = (top, learning_rate)
    first = [seed_curve.cells[top][learning_rate][seed_curve.seeds[0]] for seed_curve in curves_by_seed]
    assert first == [curve.cells[top][learning_rate][seed] for seed in curve.seeds]
    assert [seed_curve.items[(*key, 0)] for seed_curve in curves_by_seed] == [
        curve.items[(*key, seed)] for seed in curve.seeds
    ]
    assert {seed_curve.truth(0.02) for seed_curve in curves_by_seed} == {curve.truth(0.02)}
