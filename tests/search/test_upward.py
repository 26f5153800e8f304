"""`upward`: from the smallest rank, in whole trainings, with the seed noise first."""

from __future__ import annotations

import math
import random

import pytest

from rightrank.decision.seeds import detectable_difference, needed_seeds
from rightrank.decision.table import collapse_of, without_collapsing
from rightrank.schema.trials import Arm, EvalPoint, TrialCollapsed, TrialFinished, TrialOutcome
from rightrank.search.history import Space
from rightrank.search.upward import Upward
from tests.search.worlds import World, make_space, recommend, run_all

LOW, MIDDLE, HIGH = 1e-4, 3e-4, 1e-3


def space(**changes: object) -> Space:
    return make_space(learning_rates=(LOW, MIDDLE, HIGH), seeds=tuple(range(8)), **changes)


class Collapsing(World):
    """Trainings at the highest learning rate collapse with every other seed, and are the best where they do not."""

    def run(self, arm: Arm) -> TrialOutcome:
        found = super().run(arm)
        if arm.learning_rate != HIGH or arm.seed % 2 == 0:
            return found
        return TrialCollapsed(
            trial_id=found.trial_id, **arm.model_dump(), step=100, value=3.0, best_step=20, best_value=1.0, reason="fell"
        )  # fmt: skip


def ranks_of(outcomes: list[TrialOutcome]) -> list[int]:
    return [outcome.rank for outcome in outcomes if outcome.rank > 0]


def test_every_learning_rate_at_the_smallest_rank_comes_first_then_its_seeds() -> None:
    strategy, world = Upward(space()), World(gain=0.0, noise=0.001)
    known: list[TrialOutcome] = [world.run(arm) for arm in strategy.ask([])]
    first = strategy.ask(known)
    assert [(arm.rank, arm.learning_rate, arm.seed) for arm in first] == [(1, LOW, 0), (1, MIDDLE, 0), (1, HIGH, 0)]
    known += [world.run(arm) for arm in first]
    assert {(arm.rank, arm.learning_rate, arm.seed) for arm in strategy.ask(known)} == {
        (1, HIGH, 1),
        (1, HIGH, 2),
    }


@pytest.mark.parametrize(("gain", "ranks"), [(0.0, {1, 4}), (0.012, {1, 4}), (0.04, {1, 4, 16}), (1.0, {1, 4, 16, 64})])
def test_it_climbs_while_a_rank_gains_more_than_the_margin(gain: float, ranks: set[int]) -> None:
    strategy = Upward(space())
    known = run_all(strategy, World(gain=gain))
    assert set(ranks_of(known)) == ranks
    assert ranks_of(known) == sorted(ranks_of(known))
    assert all(outcome.stop_at is None and outcome.truncate_from is None for outcome in known)


@pytest.mark.parametrize(("gain", "chosen"), [(0.0, 1), (1.0, 64)])
def test_it_recommends_the_smallest_rank_that_none_beats(gain: float, chosen: int) -> None:
    strategy = Upward(space())
    assert recommend(strategy, run_all(strategy, World(gain=gain))).rank == chosen


def test_the_noise_decides_how_many_seeds_are_trained() -> None:
    quiet, loud = Upward(space()), Upward(space())
    few, many = run_all(quiet, World(gain=0.0, noise=0.001)), run_all(loud, World(gain=0.0, noise=0.05))
    assert {outcome.seed for outcome in few if outcome.rank == 4} == {0, 1}
    assert {outcome.seed for outcome in many if outcome.rank == 4} == set(range(8))
    (note,) = quiet.trials(few).notes
    assert note.startswith("Seed noise at rank 1: a standard deviation of ")
    assert note.endswith("takes about 2 seeds a rank; 2 of the 8 are used.")
    (note,) = loud.trials(many).notes
    assert "; the 8 given show differences from about 0.0" in note


def test_the_note_comes_before_any_other_rank() -> None:
    strategy, world, known = Upward(space()), World(gain=0.0, noise=0.001), list[TrialOutcome]()
    while not strategy.trials(known).notes:
        known += [world.run(arm) for arm in strategy.ask(known)]
    assert {outcome.rank for outcome in known} == {0, 1}


def test_a_learning_rate_that_a_seed_does_not_survive_is_left() -> None:
    strategy = Upward(space())
    known = run_all(strategy, Collapsing(gain=0.0, noise=0.001))
    best = {rank: {one.learning_rate for one in known if one.rank == rank and one.seed > 0} for rank in (1, 4)}
    assert best == {1: {HIGH, MIDDLE}, 4: {HIGH, MIDDLE}}
    evidence = without_collapsing(known)
    assert {one.learning_rate for one in evidence if isinstance(one, TrialFinished) and one.rank > 0} == {LOW, MIDDLE}
    assert recommend(strategy, known).learning_rate == MIDDLE


def test_where_every_learning_rate_collapses_the_survivors_are_the_evidence() -> None:
    strategy = Upward(make_space(learning_rates=(HIGH,), seeds=(0, 1, 2)))
    known = run_all(strategy, Collapsing(gain=0.0))
    assert {type(one) for one in known if one.rank == 1} == {TrialFinished, TrialCollapsed}
    assert without_collapsing(known) == known


def test_a_rank_without_a_result_does_not_end_the_climb() -> None:
    known = run_all(Upward(space()), World(gain=0.0, breaks=lambda arm: arm.rank == 4))
    assert set(ranks_of(known)) == {1, 4, 16}


def points(*values: float, scores: list[list[float]] | None = None) -> list[EvalPoint]:
    return [
        EvalPoint(step=10 * place, value=value, item_scores=None if scores is None else scores[place])
        for place, value in enumerate(values)
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
    assert (collapse_of(points(*values), 0.05) is not None) is collapses
    assert (collapse_of(points(*(-value for value in values)), 0.05, higher_is_better=False) is not None) is collapses


def test_a_fall_within_the_noise_of_few_prompts_is_no_collapse() -> None:
    generator = random.Random(0)

    def scores(mean: float, count: int) -> list[float]:
        return [float(generator.random() < mean) for _ in range(count)]

    for count, collapses in ((20, False), (2000, True)):
        both = [scores(0.62, count), scores(0.5, count)]
        found = collapse_of(points(0.62, 0.5, scores=both), 0.05)
        assert (found is not None) is collapses
    assert found == {
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
    assert (collapse_of(points(best, last, scores=scores), 0.05) is not None) is collapses


def test_seeds_that_agree_exactly_measure_no_noise() -> None:
    strategy = Upward(make_space(learning_rates=(LOW,), seeds=(0, 1)))
    known = run_all(strategy, World(gain=0.0))
    (note,) = strategy.trials(known).notes
    assert note == (
        "Seed noise: not measured at rank 1 (2 seeds with the same result); seeds=(0, 1, 2) or more measure it."
    )


def test_needed_seeds_show_the_difference() -> None:
    assert needed_seeds(0.02, 0.02) == 13
    assert needed_seeds(0.0, 0.02) == 1
    for deviation in (0.01, 0.02, 0.04):
        needed = needed_seeds(deviation, 0.02)
        assert detectable_difference(deviation, needed) <= 0.02 < detectable_difference(deviation, needed - 1)
    assert math.isclose(detectable_difference(0.02, 8), 0.02 * 2.4865 * math.sqrt(2 / 8), rel_tol=1e-3)
