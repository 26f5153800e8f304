"""Test what holds for every table: a wider margin never needs a larger rank, and the order of examples, seeds and ranks changes nothing."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rightrank.decision.rule import decide_table
from rightrank.decision.table import ScoreTable, build_table
from tests.decision.tables import make_trial

MARGINS = (0.005, 0.02, 0.08)
TABLES = st.tuples(st.integers(0, 2**32 - 1), st.integers(1, 3), st.sampled_from((1, 60)))


def draw_trials(number: int, seeds: int, examples: int) -> list[Any]:
    """Draw trainings of four ranks and the base, with losses of examples or one number each."""
    generator = np.random.default_rng(number)
    easy, gain = generator.normal(2, 0.4, examples), generator.choice([0.001, 0.05, 0.3])
    trials = []
    for rank in (0, 1, 4, 16, 64):
        taste = generator.normal(0, 0.02, examples)
        for seed in range(seeds if rank else 1):
            scores = (
                easy + gain / max(rank, 0.5) + taste + generator.normal(0, 0.01) + generator.normal(0, 0.02, examples)
            )
            more = {"example_scores": scores.tolist()} if examples > 1 else {}
            rate = 1e-3 if rank else 0.0
            trials.append(
                make_trial(f"{rank}-{seed}", rank, float(scores.mean()), learning_rate=rate, seed=seed, **more)
            )
    return trials


def build(trials: list[Any]) -> ScoreTable:
    return build_table(trials, "eval_loss", False)


@settings(max_examples=40)
@given(TABLES)
def test_a_wider_margin_never_needs_a_larger_rank(drawn: tuple[int, int, int]) -> None:
    decisions = [decide_table(build(draw_trials(*drawn)), margin) for margin in MARGINS]
    for narrow, wide in pairwise(decisions):
        assert narrow.rank is None or wide.rank is None or wide.rank <= narrow.rank
        for strict, lax in zip(narrow.ranks, wide.ranks, strict=True):
            assert (strict.low, strict.difference_high) == (lax.low, lax.difference_high)
            assert not strict.non_inferior or lax.non_inferior
            assert (strict.probability or 0.0) <= (lax.probability or 0.0) + 1e-9


@settings(max_examples=40)
@given(TABLES, st.randoms(use_true_random=False))
def test_the_order_of_examples_seeds_and_ranks_changes_nothing(drawn: tuple[int, int, int], random: Any) -> None:
    trials = draw_trials(*drawn)
    order = random.sample(range(drawn[2]), drawn[2])
    shuffled = [
        trial.model_copy(update={"example_scores": [trial.example_scores[index] for index in order]})
        if drawn[2] > 1
        else trial
        for trial in random.sample(trials, len(trials))
    ]
    ours, theirs = decide_table(build(trials), 0.02), decide_table(build(shuffled), 0.02)
    assert (ours.rank, ours.verdict, ours.flags, ours.sentence) == (
        theirs.rank,
        theirs.verdict,
        theirs.flags,
        theirs.sentence,
    )
    for evidence, expected in zip(ours.ranks, theirs.ranks, strict=True):
        assert evidence.difference == pytest.approx(expected.difference, abs=1e-9)
        assert evidence.difference_high == pytest.approx(expected.difference_high, abs=1e-9)
        assert evidence.probability == pytest.approx(expected.probability, abs=1e-6)
