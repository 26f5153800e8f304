"""The `upward` strategy: from the smallest rank, with full trainings, and with the seed noise first."""

from __future__ import annotations

import math
import random

import pytest

from rightrank.decision.seeds import compute_detectable_difference, compute_needed_seeds
from rightrank.decision.table import detect_collapse, exclude_collapsed_rates
from rightrank.schema.trials import Arm, EvalPoint, TrialCollapsed, TrialFinished, TrialOutcome
from rightrank.search.history import Space
from rightrank.search.upward import Upward
from tests.search.worlds import World, make_space, recommend, run_all

LOW, MIDDLE, HIGH = 1e-4, 3e-4, 1e-3


def make_upward_space(**changes: object) -> Space:
    return make_space(learning_rates=(LOW, MIDDLE, HIGH), seeds=tuple(range(8)), **changes)


class Collapsing(World):
    """A world in which every other seed collapses at the highest learning rate, and the remaining seeds are the best."""

    def run(self, arm: Arm) -> TrialOutcome:
        outcome = super().run(arm)
        if arm.learning_rate != HIGH or arm.seed % 2 == 0:
            return outcome
        return TrialCollapsed(
            trial_id=outcome.trial_id, **arm.model_dump(), step=100, value=3.0, best_step=20, best_value=1.0, reason="fell"
        )  # fmt: skip


def list_ranks(outcomes: list[TrialOutcome]) -> list[int]:
    return [outcome.rank for outcome in outcomes if outcome.rank > 0]


def test_every_learning_rate_at_the_smallest_rank_comes_first_then_its_seeds() -> None:
    strategy, world = Upward(make_upward_space()), World(gain=0.0, noise=0.001)
    outcomes: list[TrialOutcome] = [world.run(arm) for arm in strategy.ask([])]
    first = strategy.ask(outcomes)
    assert [(arm.rank, arm.learning_rate, arm.seed) for arm in first] == [(1, LOW, 0), (1, MIDDLE, 0), (1, HIGH, 0)]
    outcomes += [world.run(arm) for arm in first]
    assert {(arm.rank, arm.learning_rate, arm.seed) for arm in strategy.ask(outcomes)} == {
        (1, HIGH, 1),
        (1, HIGH, 2),
    }


@pytest.mark.parametrize(("gain", "ranks"), [(0.0, {1, 4}), (0.012, {1, 4}), (0.04, {1, 4, 16}), (1.0, {1, 4, 16, 64})])
def test_it_climbs_while_a_rank_gains_more_than_the_margin(gain: float, ranks: set[int]) -> None:
    strategy = Upward(make_upward_space())
    outcomes = run_all(strategy, World(gain=gain))
    assert set(list_ranks(outcomes)) == ranks
    assert list_ranks(outcomes) == sorted(list_ranks(outcomes))
    assert all(outcome.stop_at is None and outcome.truncate_from is None for outcome in outcomes)


@pytest.mark.parametrize(("gain", "chosen"), [(0.0, 1), (1.0, 64)])
def test_it_recommends_the_smallest_rank_that_none_beats(gain: float, chosen: int) -> None:
    strategy = Upward(make_upward_space())
    assert recommend(strategy, run_all(strategy, World(gain=gain))).rank == chosen


def test_the_noise_decides_how_many_seeds_are_trained() -> None:
    quiet, loud = Upward(make_upward_space()), Upward(make_upward_space())
    quiet_outcomes, loud_outcomes = (
        run_all(quiet, World(gain=0.0, noise=0.001)),
        run_all(loud, World(gain=0.0, noise=0.05)),
    )
    assert {outcome.seed for outcome in quiet_outcomes if outcome.rank == 4} == {0, 1}
    assert {outcome.seed for outcome in loud_outcomes if outcome.rank == 4} == set(range(8))
    (note,) = quiet.replay_trials(quiet_outcomes).notes
    assert note.startswith("Seed noise at rank 1: a standard deviation of ")
    assert note.endswith("takes about 2 seeds per rank; 2 of the 8 are used.")
    (note,) = loud.replay_trials(loud_outcomes).notes
    assert "; the 8 given seeds detect differences from about 0.0" in note


def test_the_note_comes_before_any_other_rank() -> None:
    strategy, world, outcomes = Upward(make_upward_space()), World(gain=0.0, noise=0.001), list[TrialOutcome]()
    while not strategy.replay_trials(outcomes).notes:
        outcomes += [world.run(arm) for arm in strategy.ask(outcomes)]
    assert {outcome.rank for outcome in outcomes} == {0, 1}


def test_a_learning_rate_that_a_seed_does_not_survive_is_left() -> None:
    strategy = Upward(make_upward_space())
    outcomes = run_all(strategy, Collapsing(gain=0.0, noise=0.001))
    best = {
        rank: {outcome.learning_rate for outcome in outcomes if outcome.rank == rank and outcome.seed > 0}
        for rank in (1, 4)
    }
    assert best == {1: {HIGH, MIDDLE}, 4: {HIGH, MIDDLE}}
    evidence = exclude_collapsed_rates(outcomes)
    assert {
        outcome.learning_rate for outcome in evidence if isinstance(outcome, TrialFinished) and outcome.rank > 0
    } == {LOW, MIDDLE}
    assert recommend(strategy, outcomes).learning_rate == MIDDLE


def test_where_every_learning_rate_collapses_the_survivors_are_the_evidence() -> None:
    strategy = Upward(make_space(learning_rates=(HIGH,), seeds=(0, 1, 2)))
    outcomes = run_all(strategy, Collapsing(gain=0.0))
    assert {type(outcome) for outcome in outcomes if outcome.rank == 1} == {TrialFinished, TrialCollapsed}
    assert exclude_collapsed_rates(outcomes) == outcomes


def test_a_rank_without_a_result_does_not_end_the_climb() -> None:
    outcomes = run_all(Upward(make_upward_space()), World(gain=0.0, breaks=lambda arm: arm.rank == 4))
    assert set(list_ranks(outcomes)) == {1, 4, 16}


def make_points(*values: float, scores: list[list[float]] | None = None) -> list[EvalPoint]:
    return [
        EvalPoint(step=10 * index, value=value, example_scores=None if scores is None else scores[index])
        for index, value in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("values", "collapses"),
    [
        ((0.2, 0.6, 0.5), True),
        ((0.2, 0.6, 0.56), False),
        ((0.2, 0.6, 0.3, 0.58), False),
        ((0.6, 0.2), True),
        ((0.6,), False),
        ((), False),
    ],
)
def test_a_collapse_is_a_last_value_far_below_the_best(values: tuple[float, ...], collapses: bool) -> None:
    assert (detect_collapse(make_points(*values), 0.05) is not None) is collapses
    assert (
        detect_collapse(make_points(*(-value for value in values)), 0.05, higher_is_better=False) is not None
    ) is collapses


def test_a_fall_within_the_noise_of_few_prompts_is_no_collapse() -> None:
    generator = random.Random(0)

    def scores(mean: float, count: int) -> list[float]:
        return [float(generator.random() < mean) for _ in range(count)]

    for count, collapses in ((20, False), (2000, True)):
        prompt_scores = [scores(0.62, count), scores(0.5, count)]
        collapse = detect_collapse(make_points(0.62, 0.5, scores=prompt_scores), 0.05)
        assert (collapse is not None) is collapses
    assert collapse == {
        "step": 10,
        "value": 0.5,
        "best_step": 0,
        "best_value": 0.62,
        "reason": "the held-out value fell from 0.62 at step 0 to 0.5 at step 10",
    }


@pytest.mark.parametrize(
    ("scores", "collapses"),
    [
        ([[1.0, 0.5], [0.0, 0.45]], False),  # a fall of .525 by 1 and .05: a standard error of .475
        ([[0.7, 0.5, 0.7, 0.5], [0.0, 0.0, 0.0, 0.0]], True),
        ([[1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]], False),  # three standard errors of .25 are the fall itself
    ],
)
def test_a_collapse_is_more_than_three_standard_errors(scores: list[list[float]], collapses: bool) -> None:
    best, last = (sum(values) / len(values) for values in scores)
    assert (detect_collapse(make_points(best, last, scores=scores), 0.05) is not None) is collapses


def test_seeds_that_agree_exactly_measure_no_noise() -> None:
    strategy = Upward(make_space(learning_rates=(LOW,), seeds=(0, 1)))
    outcomes = run_all(strategy, World(gain=0.0))
    (note,) = strategy.replay_trials(outcomes).notes
    assert note == (
        "Seed noise: not measured at rank 1 (2 seeds with the same result); give seeds=(0, 1, 2) or more to measure it."
    )


def test_needed_seeds_show_the_difference() -> None:
    assert compute_needed_seeds(0.02, 0.02) == 13
    assert compute_needed_seeds(0.0, 0.02) == 1
    for deviation in (0.01, 0.02, 0.04):
        needed = compute_needed_seeds(deviation, 0.02)
        assert (
            compute_detectable_difference(deviation, needed)
            <= 0.02
            < compute_detectable_difference(deviation, needed - 1)
        )
    assert math.isclose(compute_detectable_difference(0.02, 8), 0.02 * 2.4865 * math.sqrt(2 / 8), rel_tol=1e-3)
