"""Test the probability that a rank is within the margin: its value, when there is none, and how a confidence uses it."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import t as student

from rightrank.decision.evidence import LOSS_NOISE, NOISE, NOISE_DEGREES, NoiseComponents, get_noise
from rightrank.decision.rule import DEFAULT_CONFIDENCE, decide_table, format_probability
from rightrank.decision.table import Cell, ScoreTable
from rightrank.schema.errors import ResultsError
from rightrank.schema.results import Decision
from tests.decision.tables import build_example_table, build_value_table

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LOSSES = {1: 2.3, 4: 2.012, 16: 2.002, 64: 2.0}


def build_one_seed_table(num_examples: int = 400, noise: float = 0.02) -> ScoreTable:
    return build_example_table(LOSSES, num_examples=num_examples, seeds=(0,), noise=noise)


def build_seed_value_table(seeds: tuple[int, ...]) -> ScoreTable:
    cells = {
        (rank, 1e-3, seed): Cell(f"{rank}-{seed}", value, np.array([value]), np.ones(1))
        for rank, loss in LOSSES.items()
        for seed in seeds
        for value in [loss + (0.01 * (-1) ** seed if rank == 4 else 0.0)]
    }
    return ScoreTable("loss", False, cells)


def get_probabilities(decision: Decision) -> dict[int, float | None]:
    return {evidence.rank: evidence.probability for evidence in decision.ranks}


def test_the_probability_is_that_of_the_difference() -> None:
    table, margin = build_example_table({4: 2.012, 64: 2.0}, seeds=(0,)), 0.01
    worse = table.cells[4, 1e-3, 0].sums - table.cells[64, 1e-3, 0].sums
    deviation = LOSS_NOISE.compute_ratio(1, worse.size) ** 0.5 * worse.std(ddof=1)
    expected = student.cdf((margin - worse.mean()) / deviation, NOISE_DEGREES)
    assert get_probabilities(decide_table(table, margin))[4] == pytest.approx(expected, abs=0.015)


def test_a_wider_margin_makes_every_rank_likelier_and_the_best_is_not_certain() -> None:
    at_small_margin, at_large_margin = (
        get_probabilities(decide_table(build_one_seed_table(), margin)) for margin in (0.002, 0.02)
    )
    assert all((at_small_margin[rank] or 0) < (at_large_margin[rank] or 0) for rank in (4, 16))
    assert (at_small_margin[64] or 0) < 0.8 < (at_large_margin[64] or 0)
    assert (at_large_margin[1] or 0) < 0.01 < (at_large_margin[4] or 0)


def test_several_seeds_are_decided_like_one_and_can_be_sure() -> None:
    table = build_example_table(LOSSES, seeds=(0, 1), num_examples=100, noise=0.03)
    decision = decide_table(table, 0.02)
    assert (decision.rank, decision.recommended_rank, decision.requested_confidence) == (4, 4, DEFAULT_CONFIDENCE)
    assert decision.probability == get_probabilities(decision)[4]
    assert f"Rank 4 looks enough ({format_probability(decision.probability or 0)} likely" in decision.sentence
    decision_of_seeds = decide_table(build_example_table(LOSSES, seeds=(0, 1, 2), noise=0.005), 0.02)
    assert (decision_of_seeds.rank, decision_of_seeds.confidence) == (4, 0.95)
    assert decision_of_seeds.sentence.startswith("Rank 4 is enough (")
    for table in (build_one_seed_table(noise=0.005), build_value_table(LOSSES)):  # these show no noise over seeds
        assert decide_table(table, 0.02).sentence.startswith("Rank 4 looks enough")


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


def test_seeds_alone_give_a_probability_with_heavy_tails() -> None:
    two, four = (
        get_probabilities(decide_table(build_seed_value_table(seeds), 0.02))[4] or 0.0
        for seeds in ((0, 1), (0, 1, 2, 3))
    )
    assert 0.6 < two < four < 0.999


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


def test_no_rank_at_the_confidence_is_undecided() -> None:
    decision = decide_table(build_one_seed_table(noise=0.1), 0.005, confidence=0.99)
    assert (decision.rank, decision.verdict, decision.requested_confidence) == (None, "undecided", 0.99)
    assert "99% likely to be within" in decision.sentence


@pytest.mark.parametrize("confidence", [0.4, 1.0, float("nan")])
def test_an_invalid_confidence_is_refused(confidence: float) -> None:
    with pytest.raises(ResultsError, match=r"give a probability from 0\.5 to below 1"):
        decide_table(build_one_seed_table(), 0.01, confidence=confidence)


def test_the_constants_agree_with_the_studies() -> None:
    components = json.loads((BENCHMARKS / "selection" / "noise_model.json").read_text(encoding="utf-8"))["parts"]
    assert (
        NoiseComponents(*(pytest.approx(components[name], rel=0.03) for name in ("seeds", "crossed", "examples")))
        == NOISE
    )
    study = json.loads((BENCHMARKS / "decide" / "probability.json").read_text(encoding="utf-8"))
    assert study["learning_rates"]["accuracies"] == NOISE.learning_rates
    assert study["confidence"] == DEFAULT_CONFIDENCE
    outside = 0
    for seeds in ("1 seed", "2 seeds", "3 seeds"):  # each grid by the component of the other grids
        scores, bins = study["brier"][f"losses, {seeds}"], study["bins"][f"losses, {seeds}"]
        assert scores["with"] < scores["mixture"] < scores["without"]
        by_component = scores["by component"]
        assert by_component[f"{LOSS_NOISE.learning_rates:g}"] < min(by_component.values()) + 0.001
        outside += sum(not row["holds"] for row in bins["with"])
        assert not all(row["holds"] for row in bins["without"])
        answers = study["answers"][seeds]
        now, earlier = answers["with"][f"{DEFAULT_CONFIDENCE:g}"], answers["without"]["0.75"]
        assert earlier["answered"] - 0.07 < now["answered"] > 0.78
        assert now["too small"] < earlier["too small"] + 0.01
    assert outside <= 1  # of 15 intervals that hold with 95%


def test_the_pages_state_the_stored_calibration() -> None:
    study = json.loads((BENCHMARKS / "decide" / "probability.json").read_text(encoding="utf-8"))
    rows = study["bins"]["losses, 1 seed"]["with"]
    stated, true = ([f"{row[name]:.2f}"[1:] for row in rows] for name in ("stated", "true"))
    science = (BENCHMARKS.parent / "docs" / "explanation" / "science.md").read_text(encoding="utf-8")
    science = " ".join(science.split())
    for values in (stated, true):
        assert f"{', '.join(values[:-1])} and {values[-1]}" in science
    readme = (BENCHMARKS / "decide" / "README.md").read_text(encoding="utf-8")
    assert ", ".join(f"{first} → {second}" for first, second in zip(stated, true, strict=True)) in readme
    answers = [study["answers"][seeds]["with"][f"{DEFAULT_CONFIDENCE:g}"] for seeds in ("1 seed", "2 seeds", "3 seeds")]
    cells = [" · ".join(f"{100 * row[name]:.0f}" for name in ("answered", "too small", "exact")) for row in answers]
    assert f"| **{DEFAULT_CONFIDENCE:g}** | ".replace("0.", ".") + "% | ".join(cells) + "%" in readme
    caution = (BENCHMARKS.parent / "docs" / "explanation" / "when-not-to-trust-it.md").read_text(encoding="utf-8")
    caution = " ".join(caution.split())
    assert f"{rows[-1]['stated']:.2f}"[1:] + " on average" in caution
    assert f"in {rows[-1]['true']:.0%} of the cases" in caution


def test_the_noise_of_learning_rates_shrinks_with_neither_seeds_nor_examples() -> None:
    assert get_noise("accuracy") == NOISE
    for kind in ("loss", "token_loss", "pair_loss", "perplexity"):
        ratio = get_noise(kind).compute_ratio(10**9, 10**9)  # type: ignore[arg-type]
        assert ratio == pytest.approx(LOSS_NOISE.learning_rates, rel=1e-6)
    table = build_one_seed_table(noise=0.05)
    of_loss, of_accuracy = (
        get_probabilities(decide_table(replace(table, kind=kind), 0.02))[4] or 0.0  # type: ignore[arg-type]
        for kind in ("loss", "accuracy")
    )
    assert 0.5 < of_loss < of_accuracy - 0.05


@pytest.mark.parametrize("seeds", ["1 seed", "2 seeds"])
def test_answers_are_seldom_too_small_except_below_a_worse_larger_rank(seeds: str) -> None:
    study = json.loads((BENCHMARKS / "decide" / "probability.json").read_text(encoding="utf-8"))["larger rank worse"]
    doubted, others = (study[f"{seeds}, {group}"] for group in ("doubted", "others"))
    assert doubted["too small"] >= doubted["answers"] / 2
    assert others["too small"] < others["answers"] / 10
