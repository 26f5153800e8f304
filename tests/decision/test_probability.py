"""Test the probability that a rank is within the margin: its value, when there is none, and how a confidence uses it."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from scipy.stats import t as student

from rightrank.cli import cli
from rightrank.decision.records import decide_run
from rightrank.decision.rule import DEFAULT_CONFIDENCE, decide_table
from rightrank.decision.seeds import NOISE, NOISE_DEGREES, NoiseComponents
from rightrank.decision.sentences import format_probability
from rightrank.decision.table import ScoreTable
from rightrank.schema.decision import Decision
from rightrank.schema.errors import ResultsError
from tests.decision.tables import build_example_table, build_value_table
from tests.report import runs

STUDY = Path(__file__).parents[2] / "benchmarks" / "selection" / "noise_model.json"
LOSSES = {1: 2.3, 4: 2.012, 16: 2.002, 64: 2.0}


def build_one_seed_table(num_examples: int = 400, noise: float = 0.02) -> ScoreTable:
    return build_example_table(LOSSES, num_examples=num_examples, seeds=(0,), noise=noise)


def get_probabilities(decision: Decision) -> dict[int, float | None]:
    return {evidence.rank: evidence.probability for evidence in decision.ranks}


def test_the_probability_is_that_of_the_difference() -> None:
    table, margin = build_example_table({4: 2.012, 64: 2.0}, seeds=(0,)), 0.01
    worse = table.cells[4, 1e-3, 0].sums - table.cells[64, 1e-3, 0].sums
    deviation = NOISE.compute_ratio(1, worse.size) ** 0.5 * worse.std(ddof=1)
    expected = student.cdf((margin - worse.mean()) / deviation, NOISE_DEGREES)
    assert get_probabilities(decide_table(table, margin))[4] == pytest.approx(expected, abs=0.015)


def test_a_wider_margin_makes_every_rank_likelier_and_the_best_is_not_certain() -> None:
    at_small_margin, at_large_margin = (
        get_probabilities(decide_table(build_one_seed_table(), margin)) for margin in (0.002, 0.02)
    )
    assert all((at_small_margin[rank] or 0) < (at_large_margin[rank] or 0) for rank in (4, 16))
    assert (at_small_margin[64] or 0) < 0.8 < (at_large_margin[64] or 0)
    assert (at_large_margin[1] or 0) < 0.01 < (at_large_margin[4] or 0)


def test_the_sentence_gives_the_probability_and_a_larger_rank() -> None:
    decision = decide_table(build_one_seed_table(noise=0.005), 0.02)
    probabilities = {
        rank: format_probability(likely) for rank, likely in get_probabilities(decision).items() if likely is not None
    }
    assert decision.rank == 4
    assert f"Rank 4 looks enough ({probabilities[4]} likely" in decision.sentence
    assert probabilities[1] == "under 10%"
    assert decision.probability_note.startswith("The probability of a rank is that of being within the margin")


def test_several_seeds_are_decided_like_one_and_have_a_grade() -> None:
    table = build_example_table(LOSSES, seeds=(0, 1), num_examples=100, noise=0.03)
    decision = decide_table(table, 0.02)
    assert (decision.rank, decision.recommended_rank, decision.grade, decision.requested_confidence) == (
        4,
        4,
        "likely",
        DEFAULT_CONFIDENCE,
    )
    assert decision.probability == get_probabilities(decision)[4]
    assert f"Rank 4 looks enough ({format_probability(decision.probability or 0)} likely" in decision.sentence
    assert (decide_table(table, 0.02, confidence=None).verdict, decide_table(table, 0.02, confidence=None).grade) == (
        "undecided",
        "cannot tell",
    )
    decision_of_seeds = decide_table(build_example_table(LOSSES, seeds=(0, 1, 2), noise=0.005), 0.02)
    assert (decision_of_seeds.rank, decision_of_seeds.grade, decision_of_seeds.confidence) == (4, "shown", 0.95)
    assert decision_of_seeds.sentence.startswith("Rank 4 is enough (")
    assert decide_table(build_one_seed_table(noise=0.005), 0.02).grade == "likely"  # one seed is no evidence
    assert decide_table(build_value_table(LOSSES), 0.02).grade is None


def test_the_sentence_says_what_to_do_if_no_rank_is_likely_enough() -> None:
    decision = decide_table(build_example_table({0: 2.4, **LOSSES}, seeds=(0, 1), num_examples=100, noise=0.03), 0.002)
    assert (decision.rank, decision.verdict, decision.grade) == (None, "undecided", "cannot tell")
    assert (decision.indistinguishable_ranks, decision.probably_worse_ranks, decision.recommended_rank) == (
        [4, 16, 64],
        [1],
        64,
    )
    assert decision.sentence.startswith("Ranks 4, 16 and 64 cannot be distinguished (±0.0")
    for words in (
        "the margin is 0.002 nats",
        "Rank 1 is probably worse.",
        "Take rank 64: it is 75% likely to be within 0.00",
    ):
        assert words in decision.sentence
    assert decision.best_available_rank == 64
    assert 0 < (decision.resolvable_margin or 0) <= (decision.recommended_margin or 0)
    wider = decide_table(
        build_example_table({0: 2.4, **LOSSES}, seeds=(0, 1), num_examples=100, noise=0.03), decision.recommended_margin
    )
    assert wider.rank == 64
    more_examples, more_seeds = decision.next_runs
    assert (more_examples.action, more_examples.examples, more_seeds.action, more_seeds.minutes) == (
        "examples",
        500,
        "seeds",
        None,
    )
    precise_table = build_example_table({0: 2.4, **LOSSES}, seeds=(0, 1), num_examples=20_000, noise=0.03)
    assert decide_table(precise_table, 0.002).verdict != "undecided"


def test_next_runs_are_priced_by_earlier_trainings_and_evaluations() -> None:
    table = build_example_table({4: 2.002, 64: 2.0}, seeds=(0, 1), num_examples=100, noise=0.03)
    for train, evaluation, first in ((600.0, 1.0, "examples"), (1.0, 600.0, "seeds")):
        cells = {key: replace(cell, train_seconds=train, eval_seconds=evaluation) for key, cell in table.cells.items()}
        runs = decide_table(replace(table, cells=cells), 0.002).next_runs
        assert runs[0].action == first
        assert runs[0].minutes is not None
        assert runs[0].minutes < (runs[1].minutes or 0)
        assert "about" in runs[1].sentence.rpartition("(")[2]


def test_noisy_seeds_of_the_run_lower_the_probability() -> None:
    quiet, noisy = (
        build_example_table(LOSSES, seeds=(0, 1), num_examples=100, noise=0.03),
        build_example_table(LOSSES, seeds=(0, 1), num_examples=100, noise=0.03),
    )
    moved = {
        key: replace(cell, sums=cell.sums + (0.06 if key[0] == 4 else 0.0) * (1 if key[2] else -1))
        for key, cell in noisy.cells.items()
    }
    assert (get_probabilities(decide_table(quiet, 0.02))[4] or 0) > (
        get_probabilities(decide_table(replace(noisy, cells=moved), 0.02))[4] or 0
    ) + 0.02


def test_there_is_no_probability_if_its_assumptions_fail() -> None:
    table = build_one_seed_table()
    cells = dict(table.cells)
    uneven = {key: replace(cell, steps=400 if key[0] == 4 else 200) for key, cell in cells.items()}
    equal_cells = cells | {(16, 1e-3, 0): cells[64, 1e-3, 0]}
    cells_of_other_seeds = {(rank, lr, 7 if rank == 4 else seed): cell for (rank, lr, seed), cell in cells.items()}
    for cases, reason in {
        "values": (build_value_table(LOSSES), "there is one number per training, which shows no noise"),
        "few": (build_one_seed_table(num_examples=40), "40 examples are too few (at least 64)"),
        "steps": (replace(table, cells=uneven), "the trainings have unequal numbers of steps"),
        "alike": (replace(table, cells=equal_cells), "two ranks have the same scores"),
        "apart": (replace(table, cells=cells_of_other_seeds), "the ranks have no seed in common"),
        "own": (replace(table, metric="reward", kind="other"), "how reward varies between seeds is not known"),
    }.values():
        decision = decide_table(cases, 0.01, confidence=0.9)
        assert decision.probability_note == f"No probability: {reason}."
        assert set(get_probabilities(decision).values()) == {None}
        assert decision.rank == decide_table(cases, 0.01, confidence=None).rank == decide_table(cases, 0.01).rank


def test_a_confidence_picks_the_smallest_rank_that_has_it() -> None:
    table = build_one_seed_table(noise=0.005)
    probabilities = get_probabilities(decide_table(table, 0.02))
    for confidence in (0.5, 0.8, 0.9):
        decision = decide_table(table, 0.02, confidence=confidence)
        assert decision.rank == min(rank for rank in LOSSES if (probabilities[rank] or 0) >= confidence)
        assert decision.verdict == "saturated"


def test_the_staircase_follows_the_probabilities() -> None:
    equal_table = build_example_table({4: 2.002, 16: 2.001, 64: 2.0, 128: 2.0}, num_examples=100, seeds=(0,), noise=0.1)
    for table in (
        build_one_seed_table(num_examples=100, noise=0.03),
        build_example_table({0: 2.4, **LOSSES}, num_examples=100, seeds=(0,), noise=0.03),
        equal_table,
    ):
        steps = decide_table(table, 0.02).staircase
        assert all(step.rank > next_step.rank for step, next_step in pairwise(steps))
        assert len({step.rank for step in steps}) > (2 if table is not equal_table else 1)
        assert all(step.rank > 0 for step in steps)  # the base is not an answer and is not on the axis of ranks
        for step in steps[1:]:
            at_step, below_step = (decide_table(table, step.margin * factor) for factor in (1.0001, 0.9999))
            assert at_step.rank == step.rank
            assert below_step.rank is None or below_step.rank > step.rank


def test_rising_and_flat_curves_keep_their_verdicts() -> None:
    rising = build_example_table({1: 2.3, 4: 2.2, 16: 2.1, 64: 2.0}, num_examples=400, seeds=(0,), noise=0.02)
    flat = build_example_table({1: 2.001, 4: 2.0005, 16: 2.0, 64: 2.0002}, num_examples=400, seeds=(0,), noise=0.01)
    assert [
        (decision.rank, decision.verdict) for decision in (decide_table(rising, 0.01), decide_table(flat, 0.01))
    ] == [
        (64, "rising"),
        (1, "flat"),
    ]


def test_an_undecided_base_is_reported() -> None:
    decision = decide_table(build_example_table({0: 2.022, **LOSSES}, num_examples=100, seeds=(0,), noise=0.06), 0.02)
    likely = get_probabilities(decision)[0]
    assert likely is not None
    assert decision.sentence.endswith(
        f"The base model itself is {format_probability(likely)} likely to be within the margin."
    )
    surely = decide_table(
        build_example_table({0: 2.001, 4: 2.0, 64: 2.0}, num_examples=400, seeds=(0, 1), noise=0.01), 0.02
    )
    assert (surely.verdict, surely.rank, surely.grade) == ("no_gain", None, "shown")


def test_no_rank_at_the_confidence_is_undecided() -> None:
    decision = decide_table(build_one_seed_table(noise=0.1), 0.005, confidence=0.99)
    assert (decision.rank, decision.verdict, decision.requested_confidence) == (None, "undecided", 0.99)
    assert "99% likely to be within" in decision.sentence


@pytest.mark.parametrize("confidence", [0.4, 1.0, float("nan")])
def test_an_invalid_confidence_is_refused(confidence: float) -> None:
    with pytest.raises(ResultsError, match=r"give a probability from 0\.5 to below 1"):
        decide_table(build_one_seed_table(), 0.01, confidence=confidence)


def test_the_command_prints_the_probability(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    level = generator.normal(size=100)
    rows = [
        f"{rank},0,{example},{loss + level[example] + 0.005 * generator.normal():.6f}"
        for rank, loss in LOSSES.items()
        for example in range(100)
    ]
    file = tmp_path / "runs.csv"
    file.write_text("\n".join(["rank,seed,item,eval_loss", *rows]))
    result = CliRunner().invoke(cli, ["decide", str(file), "--margin", "0.02", "--confidence", "0.9", "--json"])
    assert result.exit_code == 0, result.output
    decision = json.loads(result.output)
    assert decision["rank"] == 4
    assert next(evidence for evidence in decision["ranks"] if evidence["rank"] == 4)["probability"] >= 0.9


def test_a_run_is_decided_at_its_own_confidence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "ITEMS", 200)
    records = runs.make_run()
    probabilities = get_probabilities(decide_run(records))
    likely = {rank: probability for rank, probability in probabilities.items() if probability is not None}
    assert set(likely) >= {1, 4, 16, 64}
    confidence = min(0.99, max(0.5, likely[16]))
    settings = records.started.settings | {"confidence": confidence}
    decision = decide_run(replace(records, started=records.started.model_copy(update={"settings": settings})))
    assert decision.rank == min((rank for rank in likely if rank and likely[rank] >= confidence), default=None)
    assert decide_run(records).rank == min(
        (rank for rank in likely if rank and likely[rank] >= DEFAULT_CONFIDENCE), default=None
    )


def test_the_constants_agree_with_the_study() -> None:
    study = json.loads(STUDY.read_text(encoding="utf-8"))
    assert (
        NoiseComponents(*(pytest.approx(study["parts"][name], rel=0.03) for name in ("seeds", "crossed", "examples")))
        == NOISE
    )
    assert study["confidence"] == DEFAULT_CONFIDENCE
    assert study["trade_off"][f"2 seeds, {DEFAULT_CONFIDENCE:g}"]["answered"] >= 0.85
    for rows in study["reliability"].values():  # The true values are noisy, so observed frequencies tend to the middle.
        assert all(abs(row["forecast"] - row["held"]) < 0.21 for row in rows if row["events"] >= 100)
        assert all(row["held"] < next_row["held"] + 0.05 for row, next_row in pairwise(rows))


@pytest.mark.parametrize("seeds", [1, 2])
def test_answers_below_a_worse_larger_rank_were_mostly_too_small(seeds: int) -> None:
    counts = json.loads(STUDY.read_text(encoding="utf-8"))["larger rank worse"]
    doubted, undoubted = (counts[f"{seeds} seeds, {which}"] for which in ("doubted", "others"))
    assert doubted["too small"] > doubted["answers"] / 2
    assert undoubted["too small"] < undoubted["answers"] / 8
    readme = (STUDY.parent / "README.md").read_text(encoding="utf-8")
    assert all(f"{count['too small']} of {count['answers']}" in readme for count in (doubted, undoubted))
