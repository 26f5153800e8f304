"""Test what holds for every table: a wider margin never needs a larger rank, and the order of examples, seeds and ranks changes nothing."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rightrank.decision.evidence import Evidence, compute_detectable_difference, compute_needed_seeds
from rightrank.decision.rule import decide_table
from rightrank.decision.table import ScoreTable, build_table
from tests.decision.tables import build_example_table, make_trial
from tests.examples import limit_examples

MARGINS = (0.005, 0.02, 0.08)
PLAN_CONFIDENCE = 0.9
TABLES = st.tuples(st.integers(0, 2**32 - 1), st.integers(1, 3), st.sampled_from((1, 60)))


def draw_trials(number: int, seeds: int, examples: int) -> list[Any]:
    """Draw trainings of four ranks and the base, with losses of examples in pairs or one number each."""
    generator = np.random.default_rng(number)
    easy, gain = generator.normal(2, 0.4, examples), generator.choice([0.001, 0.05, 0.3])
    trials = []
    for rank in (0, 1, 4, 16, 64):
        taste = generator.normal(0, 0.02, examples)
        for seed in range(seeds if rank else 1):
            scores = (
                easy + gain / max(rank, 0.5) + taste + generator.normal(0, 0.01) + generator.normal(0, 0.02, examples)
            )
            groups = [example // 2 for example in range(examples)] if number % 2 else None
            more = {"example_scores": scores.tolist(), "example_groups": groups} if examples > 1 else {}
            rate = 1e-3 if rank else 0.0
            trials.append(
                make_trial(f"{rank}-{seed}", rank, float(scores.mean()), learning_rate=rate, seed=seed, **more)
            )
    return trials


def build(trials: list[Any]) -> ScoreTable:
    return build_table(trials, "eval_loss", False)


@limit_examples(40)
@given(TABLES)
def test_a_wider_margin_never_needs_a_larger_rank(drawn: tuple[int, int, int]) -> None:
    decisions = [decide_table(build(draw_trials(*drawn)), margin) for margin in MARGINS]
    for narrow, wide in pairwise(decisions):
        assert narrow.rank is None or wide.rank is None or wide.rank <= narrow.rank
        for strict, lax in zip(narrow.ranks, wide.ranks, strict=True):
            assert (strict.low, strict.difference_high) == (lax.low, lax.difference_high)
            assert not strict.non_inferior or lax.non_inferior
            assert (strict.probability or 0.0) <= (lax.probability or 0.0) + 1e-9


@limit_examples(40)
@given(TABLES, st.randoms(use_true_random=False), st.sampled_from([1.0, 2.0**-12, 2.0**8]))
def test_neither_the_order_of_examples_seeds_and_ranks_nor_the_unit_changes_anything(
    drawn: tuple[int, int, int], random: Any, unit: float
) -> None:
    trials, unit = draw_trials(*drawn), unit if drawn[2] > 1 else 1.0
    order = random.sample(range(drawn[2]), drawn[2])
    shuffled = []
    for trial in random.sample(trials, len(trials)):
        changed: dict[str, Any] = {"value": unit * trial.value}
        for name, factor in (("example_scores", unit), ("example_groups", 1)):
            if (numbers := getattr(trial, name)) is not None:
                changed[name] = [factor * numbers[index] for index in order]
        shuffled.append(trial.model_copy(update=changed))
    ours, theirs = decide_table(build(trials), 0.02), decide_table(build(shuffled), 0.02 * unit)
    assert (ours.rank, ours.verdict, ours.flags) == (theirs.rank, theirs.verdict, theirs.flags)
    assert unit != 1 or ours.sentence == theirs.sentence
    for evidence, expected in zip(ours.ranks, theirs.ranks, strict=True):
        assert unit * evidence.difference == pytest.approx(expected.difference, abs=1e-9 * unit)
        assert unit * (evidence.difference_high or 0.0) == pytest.approx(
            expected.difference_high or 0.0, abs=1e-9 * unit
        )
        assert evidence.probability == pytest.approx(expected.probability, abs=1e-6)


@given(st.floats(1e-6, 10), st.floats(1e-6, 10))
def test_the_detectable_difference_of_the_needed_seeds_is_the_difference(deviation: float, difference: float) -> None:
    assume(deviation / difference < 1e4)
    seeds = compute_needed_seeds(deviation, difference)
    assert compute_detectable_difference(deviation, seeds) <= difference * (1 + 1e-9)
    assert seeds == 1 or compute_detectable_difference(deviation, seeds - 1) > difference


@limit_examples(300)
@given(
    st.lists(st.integers(0, 60), min_size=4, max_size=4),
    st.none() | st.integers(0, 90),
    st.integers(1, 4),
    st.none() | st.lists(st.integers(0, 3), min_size=4, max_size=4),
    st.lists(st.booleans(), min_size=4, max_size=4),
)
def test_one_number_for_each_rank_is_decided_by_the_values(
    losses: list[int], base: int | None, margin: int, train_losses: list[int] | None, has_lower_rates: list[bool]
) -> None:
    """Compare with the rule in whole numbers, of which many lie exactly at the margin."""
    ranks, unit = (1, 4, 16, 64), 1 / 64
    trials = [] if base is None else [make_trial("base", 0, 2 + base * unit, learning_rate=0.0)]
    for index, rank in enumerate(ranks):
        train = {} if train_losses is None else {"train_value": 1 + train_losses[index] * unit}
        trials.append(make_trial(f"r{rank}", rank, 2 + losses[index] * unit, learning_rate=1e-3, **train))
        if has_lower_rates[index]:
            trials.append(make_trial(f"low{rank}", rank, 4.0, learning_rate=1e-4, **train))
    decided = decide_table(build(trials), margin * unit)

    best = losses.index(min(losses))
    worse = [loss - losses[best] for loss in losses]
    chosen = next((index + 1 for index in reversed(range(best)) if worse[index] > margin), 0)
    is_better_trained = [train_losses is not None and loss < train_losses[best] for loss in train_losses or losses]

    def is_unexplained(index: int) -> bool:
        has_failed = worse[index] > 20 * margin and not has_lower_rates[index]
        is_above_base = base is not None and losses[index] > base
        is_gradual = not is_above_base and (
            (index - 1 > best and 8 * worse[index - 1] >= worse[index])
            or (index < 3 and 8 * worse[index + 1] >= 9 * worse[index])
        )
        return has_failed and not is_better_trained[index] and not is_gradual

    if base is not None and base - losses[best] <= margin:
        verdict = "no_gain"
    elif any(map(is_unexplained, range(best + 1, 4))):
        verdict = "undecided"
    elif worse[3] > margin and is_better_trained[3]:
        verdict = "overfitting"
    elif max(worse) <= margin:
        verdict = "flat"
    else:
        verdict = "rising" if best == 3 and min(worse[:3]) > margin else "saturated"
    assert (decided.verdict, decided.recommended_rank, decided.reference_rank) == (verdict, ranks[chosen], ranks[best])
    assert decided.rank == (None if verdict in ("no_gain", "undecided") else ranks[chosen])
    assert {evidence.non_inferior for evidence in decided.ranks} == {None, True}  # of the reference alone
    assert "underpowered" in decided.flags
    reached = list(accumulate(reversed(worse[: best + 1]), max))
    steps = {step * unit: ranks[best - lower] for lower, step in enumerate(reached)}
    assert {step.margin: step.rank for step in decided.staircase} == steps


@limit_examples(30)
@given(st.integers(0, 99), st.floats(0.1, 2.0), st.integers(1, 3))
def test_there_is_no_gain_exactly_where_the_base_is_within_the_margin(number: int, share: float, seeds: int) -> None:
    """Also where the base is shown to be worse than the best rank, by less than the margin."""
    assume(abs(share - 1) > 0.15)
    losses = {0: 2 + share * 0.05, 1: 2.0, 4: 2.0005}
    table = build_example_table(losses, noise=0.003, seeds=range(seeds), seed=number)
    assert (decide_table(table, 0.05).verdict == "no_gain") == (share < 1)


def build_noisy_table(noise: float, gap: float) -> ScoreTable:
    """Build a table of two ranks with two seeds, whose losses are `gap` apart and differ by `noise` between seeds."""
    levels = {4: (2 + gap + noise, 2 + gap - noise), 64: (2 - noise, 2 + noise)}
    return build([
        make_trial(f"{rank}-{seed}", rank, value, learning_rate=1e-3, seed=seed)
        for rank, values in levels.items()
        for seed, value in enumerate(values)
    ])  # fmt: skip


def plan_seeds(table: ScoreTable, margin: float) -> float:
    """Return the planned number of seeds; infinite if none is planned."""
    runs = decide_table(table, margin, confidence=PLAN_CONFIDENCE).next_runs
    return next((run.seeds or math.inf for run in runs if run.action == "seeds"), math.inf)


@limit_examples(40)
@given(st.floats(1e-3, 0.05), st.floats(0, 0.5), st.integers(3, 12))
def test_the_planned_seeds_are_the_fewest_that_are_enough_and_not_fewer_with_more_noise(
    noise: float, gap: float, needed: int
) -> None:
    table = build_noisy_table(noise, gap * noise)
    evidence = Evidence(table)
    margin = min(evidence.compute_margins(PLAN_CONFIDENCE, needed).values())
    assume(0 < margin < 0.99 * min(evidence.compute_margins(PLAN_CONFIDENCE, needed - 1).values()))
    assert plan_seeds(table, margin) == needed
    assert plan_seeds(build_noisy_table(2 * noise, gap * noise), margin) >= needed
