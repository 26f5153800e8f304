"""Test selections with a custom trainer: the same decision, and one clear line for each mistake."""

from __future__ import annotations

import inspect
import json
import logging
import math
import random
import re
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rightrank.runs.selection
from rightrank import TrialResult, TrialTask, decide, select_rank_with
from rightrank.runs.folder import RunFolder
from rightrank.runs.selection import Executor
from rightrank.schema.errors import AllTrialsFailedError, InterruptedRun, RightrankError, RunFolderError, SettingsError
from rightrank.schema.trials import Arm, Trial, TrialFinished
from rightrank.search.bracket import Grid
from rightrank.search.history import Requests, Trials
from rightrank.trainers import custom_trainer
from tests.adapters.adapters import make_adapter, make_base
from tests.watch import Watch

EXAMPLE_SCORES = [random.Random(0).gauss(0, 1) for _ in range(40)]


def score_pair(task: TrialTask) -> TrialResult:
    """Return scores that rise up to rank 4; examples vary 100 times as much as ranks."""
    gain = min(task.rank, 4) * 0.01 - (0.02 if task.learning_rate > 2e-3 else 0)
    noise = random.Random(task.rank)
    scores = [ease + gain + noise.gauss(0, 1e-4) for ease in EXAMPLE_SCORES]
    return TrialResult(metrics={"reward": sum(scores) / len(scores)}, example_scores=scores)


def compute_loss(task: TrialTask) -> Mapping[str, float]:
    return {"loss": 1 + 1 / task.rank + (0.2 if task.learning_rate > 2e-3 else 0)}


RANKS, RATES = (1, 4, 16), (1e-3, 3e-3)


@pytest.mark.trains
def test_example_scores_are_compared_in_pairs(tmp_path: Path) -> None:
    selected = select_rank_with(
        score_pair, tmp_path / "run", ranks=RANKS, learning_rates=RATES, metric="reward", margin=0.005
    )
    assert selected.decision.rank == 4
    assert selected.decision.higher_is_better
    assert selected.decision.learning_rate == 1e-3
    assert selected.adapter is None
    assert "Rank 4" in selected.report.read_text(encoding="utf-8")
    assert (selected.run / "figures" / "rank_curve.csv").exists()


@pytest.mark.trains
@pytest.mark.parametrize(("metric", "higher"), [("accuracy", True), ("error", False)])
def test_the_name_of_a_metric_says_whether_higher_is_better(tmp_path: Path, metric: str, higher: bool) -> None:
    def train(task: TrialTask) -> Mapping[str, float]:
        return {metric: 0.5 + 0.1 * task.rank / 16}

    decision = select_rank_with(train, tmp_path / "run", ranks=RANKS, learning_rates=(1e-3,), metric=metric).decision
    assert decision.higher_is_better is higher
    assert decision.reference_rank == (16 if higher else 1)


@pytest.mark.trains
def test_a_metric_without_a_known_direction_states_it(tmp_path: Path) -> None:
    def train(task: TrialTask) -> Mapping[str, float]:
        return {"colour": 1 / task.rank}

    def select(metric: str) -> bool:
        selected = select_rank_with(train, tmp_path / "run", ranks=RANKS, learning_rates=(1e-3,), metric=metric)
        return selected.decision.higher_is_better

    with pytest.raises(
        SettingsError, match=r"metric 'colour': its name does not tell .* give metric='max:colour' or 'min:colour'"
    ):
        select("colour")
    assert select("min:colour") is False


def test_the_strategy_is_replayed_once_for_each_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    num_replays, script = 0, Grid.script

    def count_replays(strategy: Grid, trials: Trials) -> Requests:
        nonlocal num_replays
        num_replays += 1
        return script(strategy, trials)

    monkeypatch.setattr(Grid, "script", count_replays)
    select_rank_with(compute_loss, tmp_path / "run", ranks=RANKS, learning_rates=RATES, margin=0.1)
    assert num_replays == 2  # the grid, and the end


@pytest.mark.trains
def test_examples_that_belong_together_widen_the_bounds(tmp_path: Path) -> None:
    """Count ten copies of each of 40 documents as one."""

    def decide(name: str, groups: list[int] | None) -> tuple[float, str]:
        def train(task: TrialTask) -> TrialResult:
            draw = random.Random(task.rank)
            scores = [1.0 + 0.02 / task.rank + draw.gauss(0, 0.05) for _ in range(40)]
            scores = [score for score in scores for _ in range(10)]
            return TrialResult(metrics={"loss": sum(scores) / 400}, example_scores=scores, example_groups=groups)

        selected = select_rank_with(train, tmp_path / name, ranks=RANKS, learning_rates=(1e-3,), margin=0.01).decision
        return max((row.difference_high or 0.0) - row.difference for row in selected.ranks), selected.basis_note

    alone, grouped = decide("alone", None), decide("grouped", [number // 10 for number in range(400)])
    assert "independent" in alone[1]
    assert "independent" not in grouped[1]
    assert grouped[0] > 2.5 * alone[0] > 0


@pytest.mark.trains
def test_the_saved_adapter_is_handed_over(tmp_path: Path) -> None:
    def train(task: TrialTask) -> Mapping[str, float]:
        (task.folder / "weights.bin").write_text(str(task.rank))
        return compute_loss(task)

    selected = select_rank_with(train, tmp_path / "run", ranks=RANKS, learning_rates=(1e-3,), margin=0.1)
    assert (selected.adapter.path / "weights.bin").read_text() == str(selected.decision.recommended_rank)
    assert "Made with rightrank" in (selected.adapter.path / "README.md").read_text()


@pytest.mark.trains
def test_resuming_repeats_only_failed_trials(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    calls: list[int] = []
    broken = True

    def train(task: TrialTask) -> Mapping[str, float]:
        calls.append(task.rank)
        if broken and task.rank == 4:
            raise ZeroDivisionError("no\nluck")
        return compute_loss(task)

    with caplog.at_level(logging.DEBUG, "rightrank"):
        first = select_rank_with(train, tmp_path / "run", ranks=RANKS, learning_rates=(1e-3,), margin=0.1)
    assert "in train\n" in caplog.text  # the traceback of the function
    assert "train raised ZeroDivisionError: no luck" in first.report.read_text(encoding="utf-8")
    assert "unstable" in first.decision.flags
    broken = False
    calls.clear()
    second = select_rank_with(train, tmp_path / "run", ranks=RANKS, learning_rates=(1e-3,), margin=0.1)
    assert calls == [4]
    assert "unstable" not in second.decision.flags
    calls.clear()
    select_rank_with(train, tmp_path / "run", ranks=RANKS, learning_rates=(1e-3,), margin=0.1)
    assert calls == []


@pytest.mark.trains
def test_a_stopped_run_keeps_finished_trials(tmp_path: Path) -> None:
    stops = iter([False, True])
    with pytest.raises(InterruptedRun, match="stopped after 2 trials"):
        select_rank_with(
            compute_loss,
            tmp_path / "run",
            ranks=RANKS,
            learning_rates=(1e-3,),
            callbacks=[Watch(should_stop=lambda: next(stops))],
        )
    lines = (tmp_path / "run" / "journal.jsonl").read_text().splitlines()
    assert [json.loads(line)["type"] for line in lines].count("trial_finished") == 2


def make_trainer(value: Any) -> Any:
    return lambda task: value


@pytest.mark.trains
@pytest.mark.trains
@pytest.mark.parametrize(
    ("train", "reason"),
    [
        (make_trainer(None), "train returned NoneType None; return a number, a mapping such as {'loss': 1.23}"),
        (make_trainer([1.0]), "train returned list"),
        (make_trainer({}), "train returned no 'loss' (it returned nothing)"),
        (make_trainer({"eval_loss": 1.0}), "train returned no 'loss' (it returned 'eval_loss')"),
        (make_trainer(math.nan), "train gave metrics.loss = nan: Input should be a finite number"),
        (make_trainer({"loss": math.nan}), "train gave metrics.loss = nan: Input should be a finite number"),
        (
            lambda _: TrialResult(metrics={"loss": 1.0}, example_scores=[1.0, math.inf]),
            "train gave example_scores.1 = inf",
        ),
        (make_trainer(TrialResult(metrics={"loss": 1.0}, example_scores=[])), "train returned 0 example_scores"),
        (make_trainer(TrialResult(metrics={"loss": 1.0}, example_weights=[1.0])), "example_weights that do not match"),
        (
            make_trainer(TrialResult(metrics={"loss": 1.0}, example_scores=[1.0], example_groups=[0, 1])),
            "example_groups that do not",
        ),
    ],
)
def test_invalid_results_are_refused_in_one_line(tmp_path: Path, train: Any, reason: str) -> None:
    with pytest.raises(AllTrialsFailedError) as caught:
        select_rank_with(train, tmp_path / "run", ranks=(1, 2, 4, 8, 16), learning_rates=(1e-3,))
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.trains
@pytest.mark.trains
@pytest.mark.parametrize(
    ("train", "reason"),
    [
        (
            make_trainer("0.5"),
            "train returned str '0.5'; return a number, a mapping such as {'loss': 1.23}, or a TrialResult",
        ),
        (lambda task: TrialResult(metrics={"loss": "low"}), "train gave metrics.loss = 'low': Input"),  # type: ignore[dict-item]
        (lambda task: TrialResult(metrics={"loss": 1.0}, scores=[1.0]), "the fields: metrics, example_scores,"),  # type: ignore[call-arg]
        (
            lambda task: task.report(1, {"loss": 1.0}),
            "train gave value = {'loss': 1.0}: Input should be a valid number",
        ),
        (
            lambda task: task.report(1, 0.5, {"a": 0.5}),
            "train gave example_scores = {'a': 0.5}: Input should be a valid list",
        ),
    ],
)
def test_a_wrong_result_ends_the_selection_after_the_first_training(tmp_path: Path, train: Any, reason: str) -> None:
    calls: list[int] = []

    def count_calls(task: TrialTask) -> Any:
        calls.append(task.rank)
        return train(task)

    with pytest.raises(AllTrialsFailedError, match="finished trials are kept: correct the function") as caught:
        select_rank_with(count_calls, tmp_path / "run", ranks=RANKS, learning_rates=(1e-3,))
    assert reason in str(caught.value)
    assert len(calls) == 1
    calls.clear()
    train = compute_loss
    assert select_rank_with(count_calls, tmp_path / "run", ranks=RANKS, learning_rates=(1e-3,)).decision.ranks


@pytest.mark.trains
def test_a_wrong_result_after_good_ones_fails_its_trial_alone(tmp_path: Path) -> None:
    def train(task: TrialTask) -> Any:
        return None if task.rank == 4 else compute_loss(task)

    selected = select_rank_with(train, tmp_path / "run", ranks=RANKS, learning_rates=(1e-3,), margin=0.1)
    assert {row.rank for row in selected.decision.ranks} == {1, 16}


@pytest.mark.trains
def test_a_wrong_evaluation_keeps_the_training(tmp_path: Path) -> None:
    trained: list[int] = []

    def train(task: TrialTask) -> TrialResult:
        trained.append(task.rank)
        make_adapter(make_base(tmp_path / "base"), task.folder, rank=task.rank)
        return TrialResult(metrics={"loss": 1.0}, example_scores=[1.0, 1.0])

    arguments: dict[str, Any] = {
        "ranks": (1, 2, 4),
        "learning_rates": (1e-3,),
        "goal": "adapter",
        "strategy": "bracket",
    }
    with pytest.raises(AllTrialsFailedError, match=r"evaluate returned str .*; .* finished trials are kept"):
        select_rank_with(train, tmp_path / "run", evaluate=lambda folder, task: "1.0", **arguments)  # type: ignore[arg-type, return-value]
    assert set(trained) == {4}
    trained.clear()
    right = TrialResult(metrics={"loss": 1.0}, example_scores=[1.0, 1.0])
    select_rank_with(train, tmp_path / "run", evaluate=lambda folder, task: right, **arguments)
    assert trained == []


@pytest.mark.trains
@pytest.mark.parametrize("convert", [float, np.float32, torch.tensor])
def test_a_function_may_return_the_metric_as_a_plain_number(tmp_path: Path, convert: Any) -> None:
    decisions = [
        select_rank_with(train, tmp_path / str(number), ranks=RANKS, learning_rates=(1e-3,)).decision
        for number, train in enumerate((compute_loss, lambda task: convert(compute_loss(task)["loss"])))
    ]
    assert decisions[1].rank == decisions[0].rank
    assert [row.value for row in decisions[1].ranks] == pytest.approx([row.value for row in decisions[0].ranks])


class WinShareFunction:
    metric, higher_is_better = "win_share", True

    def __call__(self, task: TrialTask) -> Mapping[str, float]:
        return {"win_share": 0.5 + task.rank / 100}


@pytest.mark.trains
def test_a_function_may_name_its_metric(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    selected = select_rank_with(
        WinShareFunction(), tmp_path / "run", ranks=RANKS, learning_rates=(1e-3,), progress=True
    ).decision
    assert (selected.metric, selected.higher_is_better, selected.reference_rank) == ("win_share", True, 16)
    err = capsys.readouterr().err
    assert (
        "trainer tests.runs.test_select_rank_with.WinShareFunction, by win_share (higher is better); the trainer sets the"
        in err
    )
    assert "examples: ;" not in err
    with pytest.raises(
        SettingsError, match="'loss': WinShareFunction scores examples by 'win_share'; leave metric out"
    ):
        select_rank_with(WinShareFunction(), tmp_path / "other", ranks=RANKS, learning_rates=(1e-3,), metric="loss")


@pytest.mark.trains
@pytest.mark.parametrize(("ranks", "num_calls"), [((1, 2, 4, 8, 16), 3), ((0, 1, 2, 4, 8), 4)])
def test_a_function_that_is_wrong_is_not_called_for_every_arm(
    tmp_path: Path, ranks: tuple[int, ...], num_calls: int
) -> None:
    """Stop after three trials, although the base may have a value."""
    calls: list[int] = []

    def train(task: TrialTask) -> Mapping[str, float]:
        calls.append(task.rank)
        if task.rank == 0:
            return {"loss": 1.0}
        raise TypeError("wrong")

    with pytest.raises(AllTrialsFailedError, match=r"the first 3 trials failed .*TypeError: wrong"):
        select_rank_with(train, tmp_path / "run", ranks=ranks, learning_rates=(1e-3,))
    assert len(calls) == num_calls


@pytest.mark.trains
def test_scores_of_other_examples_are_refused(tmp_path: Path) -> None:
    def train(task: TrialTask) -> TrialResult:
        return TrialResult(
            metrics={"loss": 1 / task.rank}, example_scores=[1 / task.rank] * (3 if task.rank == 4 else 2)
        )

    report = select_rank_with(train, tmp_path / "run", ranks=RANKS, learning_rates=(1e-3,)).report
    assert "but earlier trials returned 2; score the same examples" in report.read_text(encoding="utf-8")


@pytest.mark.trains
def test_several_workers_give_the_same_decision(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"ranks": RANKS, "learning_rates": RATES, "metric": "reward", "margin": 0.005}
    alone = select_rank_with(score_pair, tmp_path / "alone", **arguments).decision
    several = select_rank_with(score_pair, tmp_path / "several", workers=3, **arguments).decision
    measured = {"next_run", "next_runs"}  # they contain times of the next run
    assert several.model_dump(exclude=measured) == alone.model_dump(exclude=measured)


@pytest.mark.trains
def test_a_strategy_with_early_stopping_requests_complete_trainings(tmp_path: Path) -> None:
    calls: list[TrialTask] = []

    def train(task: TrialTask) -> TrialResult:
        calls.append(task)
        return score_pair(task)

    selected = select_rank_with(
        train, tmp_path / "run", ranks=(1, 2, 4, 8, 16), learning_rates=RATES, metric="reward", margin=0.005,
        strategy="bracket", max_steps=10,
    )  # fmt: skip
    assert selected.decision.rank == 4
    assert {task.steps for task in calls} == {10}
    assert len(calls) < 10


@pytest.mark.trains
@pytest.mark.trains
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranks": (0,)}, "rank 0 is not allowed"),
        ({"strategy": "gird"}, "did you mean 'grid'"),
        ({"executor": "moon"}, "executor is not a setting"),
        ({"train": 3}, "train: got a int"),
        ({"workers": 0}, "workers: got 0"),
        ({"workers": "2"}, "workers: got '2'"),
        ({"max_steps": -1}, "max_steps: got -1"),
        ({"goal": "adapter"}, "needs evaluate="),
        ({"ranks": 4}, "ranks: got 4 only"),
    ],
)
def test_bad_arguments_start_nothing(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"train": lambda task: {"loss": 1.0}, "out": tmp_path / "run"} | changes
    with pytest.raises(SettingsError) as caught:
        select_rank_with(**arguments)
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.trains
def test_another_run_s_folder_is_refused(tmp_path: Path) -> None:
    select_rank_with(compute_loss, tmp_path / "run", ranks=RANKS, learning_rates=(1e-3,))
    with pytest.raises(RunFolderError, match=r"trainer: .*compute_loss' → .*score_pair'"):
        select_rank_with(score_pair, tmp_path / "run", ranks=RANKS, learning_rates=(1e-3,), metric="loss")
    assert issubclass(RunFolderError, RightrankError)


@pytest.mark.trains
def test_answers_show_a_plot_in_a_notebook_and_convert_to_pandas(tmp_path: Path) -> None:
    selected = select_rank_with(score_pair, tmp_path / "run", ranks=RANKS, learning_rates=RATES, metric="reward")
    for html in (selected._repr_html_(), decide(selected.run)._repr_html_()):
        assert f"Verdict: {selected.decision.verdict}" in html
        assert "data:image/svg+xml" in html
        assert "<script" not in html
    frame = selected.decision.to_pandas()
    assert list(frame.index) == list(RANKS)
    assert frame.loc[4, "value"] == pytest.approx(selected.decision.ranks[1].value)


def make_adapter_result(rank: int) -> TrialResult:
    scores = [2.0 + ease + {1: 0.1, 2: 0.05}.get(rank, 0.001 / rank) for ease in EXAMPLE_SCORES]
    return TrialResult(metrics={"loss": sum(scores) / len(scores)}, example_scores=scores)


def make_adapter_trainer(base_folder: Path) -> Callable[[TrialTask], TrialResult]:
    base = make_base(base_folder)

    def train(task: TrialTask) -> TrialResult:
        make_adapter(base, task.folder, rank=task.rank)
        return make_adapter_result(task.rank)

    return train


@pytest.mark.trains
def test_with_evaluate_the_adapter_is_truncated_and_handed_over(tmp_path: Path) -> None:
    train = make_adapter_trainer(tmp_path / "base")

    def evaluate(folder: Path, task: TrialTask) -> TrialResult:
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["r"] == task.rank
        return make_adapter_result(task.rank)

    selected = select_rank_with(
        train, tmp_path / "run", evaluate=evaluate, goal="adapter", ranks=(1, 8), learning_rates=(1e-3,), margin=0.01,
        strategy="bracket",
    )  # fmt: skip
    handed_over = selected.exported_adapter
    assert (handed_over.rank, handed_over.method, handed_over.trained_rank) == (4, "truncated", 8)
    assert selected.decision_or_none is None
    assert json.loads((selected.adapter.path / "adapter_config.json").read_text())["r"] == 4
    assert (selected.run / handed_over.reference_adapter / "adapter_config.json").is_file()
    assert (selected.adapter.rank, selected.training) == (4, None)
    decision = select_rank_with(
        train,
        tmp_path / "run",
        evaluate=evaluate,
        ranks=(1, 8),
        learning_rates=(1e-3,),
        margin=0.01,
        strategy="bracket",
    ).decision
    assert decision.adapter_sentence == decide(tmp_path / "run").decision.adapter_sentence
    assert decision.adapter_sentence.startswith("The smallest adapter")


@pytest.mark.trains
@pytest.mark.parametrize(("metric", "sign"), [("perplexity", 1.0), ("accuracy", -1.0)])
def test_the_best_adapter_by_any_metric_is_that_of_twice_the_steps(tmp_path: Path, metric: str, sign: float) -> None:
    base = make_base(tmp_path / "base")

    def measure(task: TrialTask, steps: int) -> TrialResult:
        score = 0.5 + sign * 0.01 * (2 * (task.rank < 8) - (steps == 20))
        return TrialResult(metrics={metric: score}, example_scores=[score] * 100)

    def train(task: TrialTask) -> TrialResult:
        make_adapter(base, task.folder, rank=task.rank)
        (task.folder / "steps.txt").write_text(str(task.steps))
        return measure(task, task.steps)

    selected = select_rank_with(
        train, tmp_path / "run", evaluate=lambda _folder, task: measure(task, 0), goal="best-adapter", metric=metric, ranks=(1, 8),
        learning_rates=(1e-3,), max_steps=10, strategy="bracket",
    )  # fmt: skip
    assert (selected.adapter.rank, (selected.adapter.path / "steps.txt").read_text()) == (8, "20")


@pytest.mark.parametrize(
    ("metric", "margin"), [("perplexity", 0.1), ("accuracy", 0.005), ("min:cost", 0.2), ("loss", 0.005)]
)
def test_the_strategy_searches_at_the_default_margin_of_the_metric(tmp_path: Path, metric: str, margin: float) -> None:
    values = {"ranks": (1, 4), "learning_rates": (1e-3,), "seeds": (0,), "margin": None}
    request = custom_trainer.build_custom_request(compute_loss, None, metric, values, {})
    space = request.prepare(RunFolder(tmp_path / "run"), []).strategy.space
    assert space.metric == metric.removeprefix("min:")
    assert space.get_margin(20.0 if metric != "accuracy" else -0.8) == pytest.approx(margin)


@pytest.mark.trains
def test_an_adapter_that_can_not_be_truncated_leaves_the_trained_one(tmp_path: Path) -> None:
    selected = select_rank_with(
        compute_loss,
        tmp_path / "run",
        evaluate=lambda _folder, _task: {"loss": 1.0},
        ranks=(1, 4),
        learning_rates=(1e-3,),
    )
    assert selected.adapter is None
    assert selected.exported_adapter is None
    assert selected.decision.reference_rank == 4


@pytest.mark.trains
def test_a_single_value_is_a_list_of_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    selected = select_rank_with(
        compute_loss, tmp_path / "run", ranks=(1, 4), learning_rates=1e-3, seeds=0, metric="loss", progress=True
    )
    assert "held-out" in capsys.readouterr().err
    text = str(selected)
    assert text.count("next:") == 1
    assert "None" not in text


@pytest.mark.trains
def test_the_base_is_measured_by_default(tmp_path: Path) -> None:
    """Use a function whose adapters are worse than the base, which a comparison of the ranks alone can't show."""

    def train(task: TrialTask) -> TrialResult:
        loss = 1.0 if task.rank == 0 else 1.2 - 0.01 * min(task.rank, 4)
        scores = [loss + 1e-3 * ease for ease in EXAMPLE_SCORES]
        return TrialResult(metrics={"loss": sum(scores) / len(scores)}, example_scores=scores)

    decision = select_rank_with(train, tmp_path / "run", learning_rates=(1e-3,), margin=0.005).decision
    assert [evidence.rank for evidence in decision.ranks] == [0, 1, 4, 16, 64]
    assert decision.verdict == "no_gain"
    assert "not measured" not in decision.sentence


@pytest.mark.trains
@pytest.mark.trains
@pytest.mark.parametrize(
    ("ranks", "wrong", "reason"),
    [
        (RANKS, None, "add 0 to the ranks"),
        ((0, *RANKS), "raises", "train raised ZeroDivisionError: division by zero"),
        ((0, *RANKS), "returns nothing", "train returned NoneType None; return a number, a mapping such as"),
    ],
)
def test_an_answer_without_the_base_says_so(
    tmp_path: Path, ranks: tuple[int, ...], wrong: str | None, reason: str
) -> None:
    def train(task: TrialTask) -> Any:
        return None if task.rank == 0 and wrong == "returns nothing" else compute_loss(task)

    decision = select_rank_with(train, tmp_path / "run", ranks=ranks, learning_rates=(1e-3,), margin=0.1).decision
    assert {evidence.rank for evidence in decision.ranks} == set(RANKS)
    sentence = f"The base was not measured, so no gain over it is shown ({reason}"
    assert sentence in decision.sentence
    assert sentence in decide(tmp_path / "run").decision.sentence
    assert sentence in (tmp_path / "run" / "report.html").read_text(encoding="utf-8").replace("&#39;", "'")


@pytest.mark.trains
def test_files_of_a_custom_trainer_are_kept(tmp_path: Path) -> None:
    out = tmp_path / "run"

    def train(task: TrialTask) -> Mapping[str, float]:
        for name in ("checkpoints", "cache", "logs"):
            (out / name).mkdir(exist_ok=True)
            (out / name / f"{task.rank}.bin").write_text("mine")
        return compute_loss(task)

    select_rank_with(train, out, ranks=RANKS, learning_rates=(1e-3,), margin=0.1)
    for name in ("checkpoints", "cache", "logs"):
        assert sorted(path.name for path in (out / name).iterdir()) == ["1.bin", "16.bin", "4.bin"]


@pytest.mark.trains
def test_an_adapter_folder_with_other_files_is_moved(tmp_path: Path) -> None:
    train, out = make_adapter_trainer(tmp_path / "base"), tmp_path / "run"

    def select(margin: float) -> int:
        select_rank_with(
            train, out, evaluate=lambda _folder, task: make_adapter_result(task.rank), goal="adapter", ranks=(1, 8), learning_rates=(1e-3,),
            margin=margin, strategy="bracket",
        )  # fmt: skip
        rank: int = json.loads((out / "adapter" / "adapter_config.json").read_text())["r"]
        return rank

    assert select(0.01) == 4
    (out / "adapter" / "converted.gguf").write_text("mine")
    assert select(0.01) == 4  # the same answer keeps the folder
    assert (out / "adapter" / "converted.gguf").read_text() == "mine"
    assert select(0.2) == 1
    assert not (out / "adapter" / "converted.gguf").exists()
    assert (out / "earlier-1" / "adapter" / "converted.gguf").read_text() == "mine"
    assert json.loads((out / "earlier-1" / "adapter" / "adapter_config.json").read_text())["r"] == 4
    assert select(0.01) == 4
    assert not (out / "earlier-2").exists()  # a folder without other files is replaced


@pytest.mark.trains
def test_a_run_whose_function_never_returned_the_metric_does_not_block_its_folder(tmp_path: Path) -> None:
    out = tmp_path / "run"

    def train(task: TrialTask) -> Mapping[str, float]:
        return {"accuracy": 0.5 + 0.01 * task.rank}

    def select(metric: str, ranks: tuple[int, ...] = RANKS) -> str:
        return select_rank_with(train, out, ranks=ranks, learning_rates=(1e-3,), metric=metric).decision.metric

    with pytest.raises(AllTrialsFailedError, match=r"returned no 'acuracy' .* give another metric="):
        select("max:acuracy")
    assert select("accuracy") == "accuracy"
    assert (out / "earlier-1" / "journal.jsonl").is_file()
    with pytest.raises(RunFolderError, match="made with other settings"):  # the run has results
        select("max:acuracy")


def load_example(of: type, name: str, **names: Any) -> Any:
    """Return the class `name` in the docstring of a protocol."""
    code = re.search(rf"^    class {name}.*", inspect.getdoc(of) or "", re.DOTALL | re.MULTILINE)
    exec(textwrap.dedent(code[0]), names)
    return names[name]


def build_trials() -> list[Trial]:
    return [
        Trial(trial_id=f"t{rank}", arm=Arm(rank=rank, learning_rate=1e-3, lora_alpha=32.0, seed=0, steps=2))
        for rank in (1, 4, 16)
    ]


def test_the_executor_of_the_docstring_yields_one_outcome_per_trial() -> None:
    executor: Executor = load_example(
        Executor, "FormulaExecutor", **vars(rightrank.runs.selection) | vars(custom_trainer)
    )()
    outcomes = list(executor.run(build_trials(), None))
    assert [outcome.arm for outcome in outcomes] == [trial.arm for trial in build_trials()]
    assert all(isinstance(outcome, TrialFinished) for outcome in outcomes)
