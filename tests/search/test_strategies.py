"""Answers of each strategy in simulated worlds with a known answer."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rightrank.decision.adapter import Criterion
from rightrank.schema.errors import SettingsError
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import Arm, TrialDiverged, TrialFinished, TrialOutcome
from rightrank.search.protocol import Strategy, build_space
from rightrank.search.rates import RATES
from rightrank.search.strategies import STRATEGIES, make_strategy
from tests.examples import limit_examples
from tests.search.worlds import EXACT, STEPS, World, make_space, recommend, run_all, run_rounds


def make_named_strategy(**values: Any) -> Strategy:
    settings = SelectSettings(**values)
    return make_strategy(settings.strategy, build_space(settings, 100))


def test_the_search_leaves_the_budget_that_the_goal_needs() -> None:
    for goal in ["adapter", "best-adapter", "training-rank"]:
        minimum_cost = STRATEGIES["bracket"](make_space(goal=goal)).estimate_cost().minimum
        space = make_space(goal=goal, budget_steps=minimum_cost * STEPS)
        outcomes = run_all(STRATEGIES["bracket"](space), World(best_learning_rate=1e-2))
        ends = {(outcome.rank, outcome.steps) for outcome in outcomes if outcome.arm.is_direct and outcome.rank}
        assert (64, 100) in ends
        assert goal != "best-adapter" or (64, 200) in ends
        assert goal != "training-rank" or len({rank for rank, _ in ends}) > 1


def test_learning_rates_are_not_compared_after_the_first_step_of_a_warm_up() -> None:
    for steps, is_staged in [(1, False), (3, False), (5, False), (6, True), (8, True)]:

        class WarmsUp(World):
            def loss(self, arm: Arm) -> float:
                return 1.6 if arm.rank and arm.end <= 1 < arm.steps else super().loss(arm)

        space = make_space(goal="adapter", steps=steps)
        outcomes = run_all(STRATEGIES["bracket"](space), WarmsUp(best_learning_rate=1e-3))
        finished = {outcome.learning_rate for outcome in outcomes if outcome.arm.is_direct and outcome.rank}
        assert finished == ({1e-3} if is_staged else {*space.learning_rates})


WALK = {"learning_rates": RATES, "start_rates": (1e-3, 3e-3)}


@pytest.mark.parametrize(
    ("best", "visited"),
    [
        (1e-3, [1e-3, 3e-3, 3e-4]),
        (3e-3, [1e-3, 3e-3, 1e-2]),
        (1e-4, [1e-3, 3e-3, 3e-4, 1e-4, 3e-5]),
        (1e-5, [1e-3, 3e-3, 3e-4, 1e-4, 3e-5, 1e-5]),
        (1e-1, [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]),
    ],
)
def test_a_walk_ends_beside_the_best_learning_rate(best: float, visited: list[float]) -> None:
    strategy = STRATEGIES["bracket"](make_space(goal="adapter", **WALK))
    outcomes = run_all(strategy, World(best_learning_rate=best))
    assert [outcome.learning_rate for outcome in outcomes if outcome.arm.stop_at] == visited
    whole = [outcome for outcome in outcomes if outcome.arm.is_direct and outcome.rank and not outcome.arm.stop_at]
    assert [outcome.learning_rate for outcome in whole] == [best]
    assert strategy.replay_trials(outcomes).adapter is not None


def test_a_walk_trains_its_first_two_rates_together_and_then_one_after_the_other() -> None:
    strategy = STRATEGIES["bracket"](make_space(goal="adapter", **WALK))
    rounds = []

    def note_round(arms: list[Arm]) -> list[Arm]:
        rounds.append([arm.learning_rate for arm in arms if arm.stop_at])
        return arms

    run_all(strategy, World(best_learning_rate=1e-3), note_round)
    assert [rates for rates in rounds if rates] == [[1e-3, 3e-3], [3e-4]]


@pytest.mark.parametrize("at", ["quarter", "end"])
def test_a_walk_turns_back_where_a_training_diverges_and_says_so(at: str) -> None:
    class Diverges(World):
        def run(self, arm: Arm) -> TrialOutcome:
            if arm.rank and arm.learning_rate >= 3e-3 and (at == "quarter" or arm.stop_at is None):
                return TrialDiverged(trial_id=f"x{arm.learning_rate}", **arm.model_dump(), step=1, reason="loss")
            return super().run(arm)

    strategy = STRATEGIES["bracket"](make_space(goal="adapter", **WALK))
    outcomes = run_all(strategy, Diverges(best_learning_rate=3e-3))
    trials = strategy.replay_trials(outcomes)
    assert trials.adapter is not None
    whole = [outcome for outcome in outcomes if outcome.arm.is_direct and outcome.rank and not outcome.arm.stop_at]
    assert whole[-1].learning_rate == 1e-3
    assert 3e-4 in {outcome.learning_rate for outcome in outcomes}  # the walk visits the other side of the new best
    assert trials.notes == ["At learning rate 0.003 the training diverged, so the search continues at lower ones."]


@pytest.mark.parametrize(("goal", "reserve"), [("adapter", 0), ("training-rank", 1), ("best-adapter", 2)])
def test_a_walk_ends_early_where_the_budget_would_allow_no_answer_after_another_rate(goal: str, reserve: int) -> None:
    for budget, visited in [(1.25, 2), (1.49, 2), (1.5, 3), (1.75, 4)]:
        strategy = STRATEGIES["bracket"](make_space(goal=goal, budget_steps=(budget + reserve) * STEPS, **WALK))
        outcomes = run_all(strategy, World(best_learning_rate=1e-5))
        assert len([outcome for outcome in outcomes if outcome.arm.stop_at and outcome.rank == 64]) == visited
        assert strategy.replay_trials(outcomes).adapter is not None


def test_a_grid_has_the_rates_that_the_walk_of_its_largest_rank_visits() -> None:
    space = make_space(**WALK)
    outcomes = run_all(STRATEGIES["grid"](space), World(best_learning_rate=3e-4))
    cells = {(outcome.rank, outcome.learning_rate) for outcome in outcomes if outcome.arm.is_direct and outcome.rank}
    assert cells == {(rank, rate) for rank in space.ranks for rate in (1e-4, 3e-4, 1e-3, 3e-3)}


def test_rates_that_differ_in_their_last_bits_are_one() -> None:
    assert SelectSettings(learning_rates=(3 * 1e-4, 3e-4, 1e-3)).learning_rates == (3e-4, 1e-3)


def test_a_given_rate_or_list_is_not_walked_from() -> None:
    for rates in [(1e-3,), (1e-4, 1e-3)]:
        space = build_space(SelectSettings(learning_rates=rates), STEPS)
        assert (space.learning_rates, space.start_rates, space.first_rates) == (rates, (), rates)


def test_truncations_are_evaluated_although_the_time_is_over() -> None:
    class Slow(World):
        """Simulate a training whose last half takes longer than the pace before predicts."""

        def run(self, arm: Arm) -> Any:
            outcome = super().run(arm)
            is_slow = isinstance(outcome, TrialFinished) and arm.rank and arm.is_direct
            return outcome.model_copy(update={"train_seconds": 1000.0}) if is_slow else outcome

    strategy = STRATEGIES["bracket"](make_space(goal="adapter", budget_seconds=200.0, criterion=EXACT))
    trials = strategy.replay_trials(run_all(strategy, Slow(gain=0.001)))
    assert trials.adapter is not None
    assert trials.adapter.rank == 1


@pytest.mark.parametrize(("spread", "start"), [(1e-4, 4), (0.01, 16)])
def test_the_walk_begins_where_a_further_seed_would_find_the_truncation_enough(spread: float, start: int) -> None:
    """Simulate a truncation to rank 4 that is .0099 worse, within the margin of .01, with examples that differ by `spread`."""

    class Scattered(World):
        def run(self, arm: Any) -> Any:
            outcome = super().run(arm)
            if not isinstance(outcome, TrialFinished) or arm.rank == 0:
                return outcome
            swing = spread * (arm.truncate_from is not None)
            losses = [outcome.value + swing * (-1) ** example for example in range(100)]
            return outcome.model_copy(update={"example_losses": losses, "example_tokens": [1] * 100})

    outcomes = run_all(STRATEGIES["bracket"](make_space()), Scattered(gain=0.02))
    assert next(outcome.rank for outcome in outcomes if 0 < outcome.rank < 64 and outcome.arm.is_direct) == start


def test_bad_settings_are_one_clear_line() -> None:
    for values, words in [
        ({"strategy": "brackt"}, "did you mean 'bracket'"),
        ({"strategy": "x"}, "there are: bracket, grid"),
        ({"ranks": (8,), "goal": "training-rank"}, "8 only"),
        ({"budget_trainings": 1.2}, "give budget_trainings 1.25"),
        ({"budget_trainings": 1.2, "learning_rates": (1e-4, 3e-4, 1e-3)}, "give budget_trainings 1.5"),
        ({"budget_hours": -1}, "budget_hours"),
    ]:
        with pytest.raises(SettingsError) as caught:
            make_named_strategy(**values)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


@limit_examples(40)
@given(gain=st.floats(0.01, 1.0), share=st.integers(5, 300), has_head=st.booleans())
def test_the_adapter_is_the_smallest_truncation_that_keeps_the_share_of_the_gain(
    gain: float, share: int, has_head: bool
) -> None:
    """With a trained head, the gain is that over the zero update, which is better than the base without the head."""

    class Headed(World):
        def loss(self, arm: Arm) -> float:
            return 1.2 + 2 * gain if arm.rank == 0 and arm.truncate_from else super().loss(arm)

    criterion = Criterion("loss", False, f"{share / 10}%", "loss", trusts_values=True)
    space = make_space(goal="adapter", criterion=criterion, trains_other_modules=has_head)
    strategy, world = STRATEGIES["bracket"](space), Headed(gain=gain)
    answer = strategy.replay_trials(run_all(strategy, world)).adapter
    assert answer is not None
    top, base = 1 + gain * 64**-0.57, (1.2 if has_head else 1.5) + 2 * gain
    margin = share / 1000 * (base - top)
    enough = [rank for rank in (1, 2, 4, 8, 16, 32) if 1.3 * gain * rank**-0.57 <= top - 1 + margin]
    assert answer.rank == min(enough, default=64)
    assert answer.margin == pytest.approx(margin)


def test_the_first_question_is_answered_before_the_second() -> None:
    space = make_space(criterion=EXACT)
    strategy, world = STRATEGIES["bracket"](space), World(gain=0.02)
    outcomes: list[Any] = []
    answered_after = None
    for arm in run_rounds(strategy, world, outcomes, lambda arms: arms[:1]):
        if answered_after is None and strategy.replay_trials(outcomes).adapter is not None:
            answered_after = arm
    answer = strategy.replay_trials(outcomes).adapter
    assert answer is not None
    assert answered_after is not None
    assert answered_after.truncate_from is not None
    # The truncated rank r loses .02·1.3·r^-.57 - .02·64^-.57 (1.05 for 1.3 with recovery): rank 4 is the smallest within .01.
    assert (answer.rank, answer.method, answer.trained_rank) == (4, "truncated", 64)
    alone = STRATEGIES["bracket"](make_space(criterion=EXACT, goal="adapter"))
    first = run_all(alone, world)
    assert [outcome.arm for outcome in first] == [outcome.arm for outcome in outcomes][: len(first)]
    assert alone.replay_trials(first).adapter == answer


def test_another_seed_can_correct_the_learning_rate() -> None:
    class Seeded(World):
        """The first seed's quarter favours 3e-3; the other seeds, and the mean, favour 1e-3."""

        def loss(self, arm: Any) -> float:
            return super().loss(arm) - (0.03 if arm.learning_rate == 3e-3 and arm.seed == 0 and arm.rank else 0.0)

    strategy = STRATEGIES["bracket"](make_space(seeds=(0, 1, 2)))
    assert recommend(strategy, run_all(strategy, Seeded(best_learning_rate=1e-3))).learning_rate == 1e-3
