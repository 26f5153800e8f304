"""What each strategy makes of worlds whose answer is known."""

from __future__ import annotations

import math
import textwrap
from typing import Any

import pytest

from rightrank.errors import SettingsError
from rightrank.records import TrialFinished
from rightrank.settings import make_settings
from rightrank.strategies import History, Strategy, make_strategy, strategy_named
from rightrank.strategies.climb import Requests
from rightrank.strategies.grid import outside_in
from rightrank.strategies.learning_rates import find_learning_rate, stops_at_half, stops_at_quarter
from rightrank.strategies.moves import try_rank
from rightrank.strategies.script import Scripted
from rightrank.strategies.trials import Trials, excess_of
from tests.strategies.worlds import STEPS, World, make_space, run_all


def whole_grid_pick(world: World, ranks: tuple[int, ...], margin: float) -> int:
    losses = {rank: 1.0 + world.gain * rank**-0.57 for rank in ranks}
    return next(rank for rank in ranks if losses[rank] <= min(losses.values()) + margin)


@pytest.mark.parametrize("gain", [0.003, 0.02, 0.05, 0.1, 1.0])
@pytest.mark.parametrize("name", ["grid", "ladder", "bracket", "ascend"])
@pytest.mark.parametrize("ranks", [(1, 4, 16, 64), (1, 2, 4, 8, 16, 32, 64)])
def test_finds_the_whole_grids_pick(name: str, gain: float, ranks: tuple[int, ...]) -> None:
    space, world = make_space(ranks=ranks), World(gain=gain)
    strategy = strategy_named(name)(space)
    answer = strategy.recommend(History.of(run_all(strategy, world)))
    expected = whole_grid_pick(world, ranks, 0.01)
    if name == "ascend":  # sees the ranks up to where it stops: a step off at most, for it can't know the top
        assert abs(ranks.index(answer.rank or 0) - ranks.index(expected)) <= 1
    else:
        assert answer.rank == expected
    assert answer.learning_rate == world.best_learning_rate


@pytest.mark.parametrize("name", ["ladder", "bracket", "ascend", "descend"])
def test_costs_far_less_than_the_grid(name: str) -> None:
    space, world = make_space(), World()
    strategy = strategy_named(name)(space)
    known = run_all(strategy, world)
    steps = sum(
        (outcome.stop_at or outcome.steps) - (_parent_steps(known, outcome))
        for outcome in known
        if isinstance(outcome, TrialFinished)
    )
    assert steps <= 6 * STEPS < 16 * STEPS


def _parent_steps(known: list[Any], outcome: TrialFinished) -> int:
    return next((other.stop_at or 0 for other in known if other.trial_id == outcome.continue_from), 0)


def test_a_high_learning_rate_behind_at_half_resumes() -> None:
    """Decaying schedules favour high learning rates late."""

    class Late(World):
        def loss(self, arm: Any) -> float:
            late = arm.learning_rate > 5e-4 and arm.stop_at is not None
            return super().loss(arm) + (0.021 if late else 0.0)

    strategy = strategy_named("bracket")(make_space())
    known = run_all(strategy, Late(best_learning_rate=1e-3))
    assert strategy.recommend(History.of(known)).learning_rate == 1e-3


def stages(known: list[Any], rank: int, learning_rate: float) -> set[int]:
    """The steps at which trainings of the rank at the learning rate stopped or ended."""
    return {
        outcome.stop_at or outcome.steps
        for outcome in known
        if (outcome.rank, outcome.learning_rate, outcome.truncate_from) == (rank, learning_rate, None)
    }


def test_a_lower_learning_rate_behind_at_half_stops_early() -> None:
    known = run_all(strategy_named("bracket")(make_space()), World(best_learning_rate=1e-3))
    assert stages(known, 64, 1e-3) == {25, 50, 100}
    assert stages(known, 64, 3e-4) <= {25, 50}


def test_a_lower_learning_rate_resumes_where_the_best_one_gets_worse() -> None:
    """On few examples a high learning rate is ahead early and overfits."""

    class Overfits(World):
        def loss(self, arm: Any) -> float:
            done = (arm.stop_at or arm.steps) / arm.steps if arm.steps else 1.0
            late = 0.7 * (done - 0.25) if arm.learning_rate > 5e-4 else 0.0
            return super().loss(arm) + late

    strategy = strategy_named("bracket")(make_space())
    known = run_all(strategy, Overfits(best_learning_rate=8e-4))
    assert strategy.recommend(History.of(known)).learning_rate == 3e-4


@pytest.mark.parametrize("can_stop_early", [True, False])
def test_learning_rates_too_high_to_train_do_not_win(can_stop_early: bool) -> None:
    """The loss of broken trainings is flat: the highest learning rate is the better of two that are worse than the base."""

    class Broken(World):
        def loss(self, arm: Any) -> float:
            broken = {1e-3: 1.0, 3e-3: 0.8}.get(arm.learning_rate, 0.0) if arm.rank else 0.0
            return super().loss(arm) + broken

    strategy = strategy_named("bracket")(make_space())
    known = run_all(strategy, Broken(best_learning_rate=3e-4, can_stop_early=can_stop_early))
    assert strategy.recommend(History.of(known)).learning_rate == 3e-4


def test_a_large_gain_of_the_highest_learning_rate_is_doubted_where_the_base_is_unknown() -> None:
    class Broken(World):
        def loss(self, arm: Any) -> float:
            return super().loss(arm) + {1e-3: 1.0, 3e-3: 0.8}.get(arm.learning_rate, 0.0)

    strategy = strategy_named("bracket")(make_space())
    table = Broken(best_learning_rate=3e-4, can_stop_early=False, can_truncate=False, breaks=lambda arm: arm.rank == 0)
    assert strategy.recommend(History.of(run_all(strategy, table))).learning_rate == 3e-4


@pytest.mark.parametrize("lost", [1e-3, 3e-3, 3e-4])
def test_a_missing_cell_hides_no_better_learning_rate(lost: float) -> None:
    """The climb steps over a missing cell of a table."""
    world = World(
        best_learning_rate=1e-4, can_stop_early=False, can_truncate=False, breaks=lambda arm: arm.learning_rate == lost
    )
    strategy = strategy_named("bracket")(make_space())
    assert strategy.recommend(History.of(run_all(strategy, world))).learning_rate == 1e-4


def test_a_climb_whose_start_diverges_goes_downward_with_early_stopping() -> None:
    world = World(best_learning_rate=1e-3, diverges=lambda arm: arm.learning_rate > 5e-4)
    strategy = strategy_named("bracket")(make_space())
    known = run_all(strategy, world)
    assert strategy.recommend(History.of(known)).learning_rate == 3e-4
    assert stages(known, 64, 1e-3) == {25}
    assert not stages(known, 64, 3e-3)


def test_a_high_learning_rate_that_has_not_settled_at_a_quarter_resumes() -> None:
    """Far behind after a short warm-up, but still below the base, closing in, and the best at the end."""

    class Unsettled(World):
        def loss(self, arm: Any) -> float:
            if arm.rank == 0:
                return 2.5
            late = {25: 0.65, 50: 0.25}.get(arm.stop_at or 0, 0.0) if arm.learning_rate > 2e-3 else 0.0
            return super().loss(arm) + late

    strategy = strategy_named("bracket")(make_space())
    known = run_all(strategy, Unsettled(best_learning_rate=2.4e-3))
    assert stages(known, 64, 3e-3) == {25, 50, 100}
    assert strategy.recommend(History.of(known)).learning_rate == 3e-3


def test_after_a_higher_learning_rate_wins_late_the_next_one_is_tried() -> None:
    class Late(World):
        def loss(self, arm: Any) -> float:
            behind = 0.15 * math.log(arm.learning_rate / 1e-4) if arm.stop_at is not None and arm.rank else 0.0
            return super().loss(arm) + behind * (1 - (arm.stop_at or 100) / 100)

    strategy = strategy_named("bracket")(make_space(learning_rates=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2)))
    known = run_all(strategy, Late(best_learning_rate=1e-2))
    assert strategy.recommend(History.of(known)).learning_rate == 1e-2


def test_ranks_between_the_best_and_a_worse_top_are_tried() -> None:
    """The best rank lies between the one that beat the top and the top, and becomes the reference."""

    class Between(World):
        def loss(self, arm: Any) -> float:
            if arm.rank == 0 or arm.truncate_from is not None or arm.stop_at is not None:
                return super().loss(arm)
            return {64: 1.06, 16: 1.0, 4: 1.04, 1: 1.2}[arm.rank]

    for name in ("bracket", "ladder"):
        strategy = strategy_named(name)(make_space())
        answer = strategy.recommend(History.of(run_all(strategy, Between(gain=0.001))))
        assert (answer.rank, answer.reference_rank) == (16, 16)


def test_a_learning_rate_at_which_the_top_is_far_worse_is_not_tried_at_lower_ranks() -> None:
    class Steep(World):
        def loss(self, arm: Any) -> float:
            return super().loss(arm) + (0.5 if arm.rank > 0 and arm.learning_rate > 2e-3 else 0.0)

    known = run_all(strategy_named("bracket")(make_space()), Steep(gain=0.04, best_learning_rate=6e-4))
    failed = {outcome.rank for outcome in known if outcome.rank < 64 and outcome.learning_rate == 3e-4}
    assert failed  # a rank came short of the margin and was tried at the next lower learning rate
    assert not [outcome for outcome in known if 0 < outcome.rank < 64 and outcome.learning_rate == 3e-3]


def test_an_undertrained_rank_gets_a_higher_learning_rate() -> None:
    """Its truncation holds, and its training at the top's learning rate was still improving."""

    class Slow(World):
        def loss(self, arm: Any) -> float:
            is_slow = arm.rank == 4 and arm.learning_rate < 2e-3 and arm.truncate_from is None
            done = (arm.stop_at or arm.steps) / arm.steps if arm.steps else 1.0
            return super().loss(arm) + (0.8 * (1.05 - done) if is_slow else 0.0)

    strategy = strategy_named("bracket")(make_space())
    known = run_all(strategy, Slow(gain=0.015, best_learning_rate=1e-3))
    assert [outcome for outcome in known if outcome.rank == 4 and outcome.learning_rate == 3e-3]


@pytest.mark.parametrize(
    ("is_higher", "behind", "gain", "at_quarter", "at_half"),
    [
        (False, 0.01, 0.1, False, True),
        (False, 0.2, 0.1, True, True),
        (False, -0.01, 0.1, False, False),
        (False, 0.01, -0.1, False, False),
        (True, 0.01, 0.1, False, False),
        (True, 0.2, 0.1, True, True),
        (True, 0.01, -0.1, True, True),
        (False, 0.0, 0.1, False, False),
    ],
)
def test_the_decision_table_of_early_stopping(
    is_higher: bool, behind: float, gain: float, at_quarter: bool, at_half: bool
) -> None:
    assert stops_at_quarter(is_higher, behind, gain) is at_quarter
    assert stops_at_half(is_higher, behind, gain) is at_half


def test_a_learning_rate_that_has_not_settled_or_closes_in_does_not_stop() -> None:
    assert stops_at_quarter(True, 0.5, 0.1, learned=0.4)  # worse than the base
    assert stops_at_quarter(True, 0.5, 0.1, learned=2.0)  # it has learned nearly as much: settled
    assert not stops_at_quarter(True, 0.5, 0.1, learned=1.0)
    assert stops_at_quarter(False, 0.5, 0.1, learned=1.0)
    assert stops_at_half(True, 0.3, 0.1, closing=0.2)
    assert not stops_at_half(True, 0.3, 0.1, closing=0.4)


def test_confirms_with_further_seeds() -> None:
    strategy = strategy_named("bracket")(make_space(seeds=(0, 1, 2)))
    known = run_all(strategy, World())
    answer = strategy.recommend(History.of(known))
    for rank in (answer.rank, answer.reference_rank):
        assert {outcome.seed for outcome in known if outcome.rank == rank and outcome.arm.is_direct} == {0, 1, 2}


def test_example_losses_give_a_bound_above_the_mean() -> None:
    space = make_space()
    world = World()
    left, right = (world.run(space.arm(rank, 1e-3)) for rank in (4, 64))
    assert isinstance(left, TrialFinished)
    assert isinstance(right, TrialFinished)
    bare = excess_of([(left, right)], space)
    assert bare.high == bare.mean
    tokens = [2, 3, 5, 4]
    left = left.model_copy(update={"item_losses": [2.1, 3.3, 5.2, 4.6], "item_tokens": tokens, "value": 15.2 / 14})
    right = right.model_copy(update={"item_losses": [2.0, 3.0, 5.0, 4.0], "item_tokens": tokens, "value": 1.0})
    known = excess_of([(left, right)], space)
    assert known.mean == pytest.approx(1.2 / 14)
    assert known.high > known.mean


def test_higher_is_better_is_oriented() -> None:
    space = make_space(higher_is_better=True)
    trials = Trials(space)
    world = World()
    for rank, value in ((4, 0.7), (64, 0.9)):
        arm = space.arm(rank, 1e-3)
        outcome = world.run(arm)
        assert isinstance(outcome, TrialFinished)
        trials.add(arm, outcome.model_copy(update={"value": value}))
    assert trials.reference() == 64
    assert trials.excess(4, 64).mean == pytest.approx(0.2)


def test_outside_in() -> None:
    assert outside_in([1, 2, 4, 8]) == [8, 1, 4, 2]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"strategy": "ladde"}, "did you mean 'ladder'"),
        ({"strategy": "x"}, "there are: ladder"),
        ({"ranks": (8,)}, "8 alone"),
        ({"budget_trainings": 1.5}, "give budget_trainings"),
        ({"budget_steps": 150, "max_steps": 100}, "budget_steps"),
        ({"budget_hours": -1}, "budget_hours"),
    ],
)
def test_bad_settings_are_one_clear_line(values: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError) as caught:
        make_strategy(make_settings(values), 100)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_smallest_budget_compares_two_ranks() -> None:
    for name in ("grid", "ladder", "bracket"):
        strategy: Strategy = make_strategy(make_settings({"strategy": name}), 100)
        least = strategy.min_trainings()
        tight = make_strategy(make_settings({"strategy": name, "budget_trainings": least}), 100)
        known = run_all(tight, World(can_truncate=False))
        assert len({outcome.rank for outcome in tight.evidence(History.of(known)) if outcome.rank}) >= 2


class Itemed(World):
    """Example losses whose differences between ranks scatter widely about the value."""

    def run(self, arm: Any) -> Any:
        outcome = super().run(arm)
        if not isinstance(outcome, TrialFinished) or arm.rank == 0:
            return outcome
        swing = [0.2 * (1 if (item * arm.rank + arm.rank) % 3 else -1) for item in range(60)]
        mean = sum(swing) / len(swing)
        losses = [outcome.value + part - mean for part in swing]
        return outcome.model_copy(update={"item_losses": losses, "item_tokens": [1] * 60})


def test_values_guide_the_search_and_bounds_request_support() -> None:
    ranks = (1, 2, 4, 8, 16, 32, 64)
    strategy = strategy_named("bracket")(make_space(ranks=ranks))
    bare = strategy.recommend(History.of(run_all(strategy, World())))
    known = run_all(strategy, Itemed())
    answer = strategy.recommend(History.of(known))
    assert answer.rank == bare.rank  # the same values, the same search
    trained = {outcome.rank for outcome in strategy.evidence(History.of(known))}
    assert {rank for rank in ranks if rank > (answer.rank or 0)} <= trained  # no bound held: all above were tried


def test_the_example_in_the_protocol_keeps_the_rules() -> None:
    source = textwrap.dedent((Strategy.__doc__ or "").partition("::\n")[2])
    names: dict[str, Any] = {
        "Scripted": Scripted, "Trials": Trials, "Requests": Requests,
        "find_learning_rate": find_learning_rate, "try_rank": try_rank,
    }  # fmt: skip
    exec(source, names)
    space = make_space(seeds=(0, 1))
    strategy: Strategy = names["TopAndBottom"](space)
    known = run_all(strategy, World())
    assert {outcome.rank for outcome in known} == {0, space.ranks[0], space.top}
    assert strategy.recommend(History.of(known)).complete
    assert len(known) <= strategy.max_arms()
    assert sum(outcome.steps for outcome in strategy.evidence(History.of(known))) <= strategy.cost().maximum * STEPS
