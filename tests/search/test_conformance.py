"""The rules of the strategy protocol, checked for every strategy."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rightrank.decision.adapter import Criterion
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import Arm, TrialDiverged, TrialFinished, TrialOutcome, count_added_steps
from rightrank.search.protocol import Space, Trials, build_space
from rightrank.search.rates import RATES
from rightrank.search.strategies import STRATEGIES, find_learning_rate, make_strategy
from tests.examples import limit_examples
from tests.search.worlds import EXACT, STEPS, World, make_space, recommend, run_all, run_rounds

WORLDS = {
    "law": World,
    "steep": lambda: World(gain=1.0),
    "flat": lambda: World(gain=0.0),
    "noisy": lambda: World(noise=0.02),
    "high learning rates": lambda: World(best_learning_rate=3e-3),
    "low learning rates": lambda: World(best_learning_rate=3e-5),
    "a table": lambda: World(can_stop_early=False, can_truncate=False),
    "no truncation": lambda: World(can_truncate=False),
    "no early stop": lambda: World(can_stop_early=False, noise=0.01),
}
SPACES = {
    "usual": {},
    "three seeds": {"seeds": (0, 1, 2)},
    "one learning rate": {"learning_rates": (1e-3,)},
    "two learning rates": {"learning_rates": (1e-3, 3e-3)},
    "two ranks": {"ranks": (8, 16)},
    "powers of two": {"ranks": (1, 2, 4, 8, 16, 32, 64)},
    "relative margin": {"criterion": Criterion("loss", False, None, "loss")},
    "no base": {"evaluates_base": False},
    "the adapter alone": {"goal": "adapter", "criterion": EXACT},
    "the best adapter": {"goal": "best-adapter"},
    "a walk": {"learning_rates": RATES, "start_rates": (1e-3, 3e-3)},
    "a walk of a large model": {"learning_rates": RATES, "start_rates": (3e-4, 1e-3), "seeds": (0, 1)},
}


@pytest.fixture(params=sorted(STRATEGIES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


CASES = [(world, "usual") for world in WORLDS] + [("law", space) for space in SPACES if space != "usual"]
CASES += [("noisy", "a walk"), ("a table", "a walk"), ("low learning rates", "a walk of a large model")]
CASES += [("noisy", "powers of two"), ("a table", "three seeds"), ("flat", "two ranks")]


def iterate_cases() -> Iterator[tuple[World, Space]]:
    for world, space in CASES:
        yield WORLDS[world](), make_space(**SPACES[space])


def test_arms_lie_in_the_space_and_are_asked_for_once(name: str) -> None:
    for world, space in iterate_cases():
        outcomes = run_all(STRATEGIES[name](space), world)
        arms = [outcome.arm for outcome in outcomes]
        assert len(set(arms)) == len(arms)
        finished = {outcome.trial_id for outcome in outcomes if isinstance(outcome, TrialFinished)}
        for arm in arms:
            assert arm.rank in (0, *space.ranks) or (arm.truncate_from and arm.rank in space.truncated_ranks)
            assert arm.seed in (0, *space.seeds)
            assert arm.steps <= space.steps * (2 if space.goal == "best-adapter" else 1)
        assert {arm.learning_rate for arm in arms if arm.rank > 0} <= {*space.learning_rates}
        for arm in arms:
            for parent in (arm.continue_from, arm.truncate_from):
                assert parent is None or parent in finished


@limit_examples(40)
@given(
    gain=st.floats(1e-3, 1.0),
    num_rates=st.integers(1, 6),
    num_ranks=st.integers(2, 6),
    num_seeds=st.integers(1, 3),
    goal=st.sampled_from(["adapter", "best-adapter", "training-rank"]),
    steps=st.sampled_from([4, 100]),
)
def test_costs_are_as_estimated_where_nothing_fails(
    gain: float, num_rates: int, num_ranks: int, num_seeds: int, goal: str, steps: int
) -> None:
    """For an adapter the estimate is exact; for the training rank it depends on what the trainings show."""
    rates = tuple(1e-4 * 3**index for index in range(num_rates))
    ranks, seeds = tuple(4**index for index in range(num_ranks)), tuple(range(num_seeds))
    space = make_space(learning_rates=rates, ranks=ranks, seeds=seeds, goal=goal, steps=steps)
    for name in STRATEGIES:
        strategy = STRATEGIES[name](space)
        gained = 1e-3 if name == "upward" else gain  # which ends at the second rank
        outcomes = run_all(strategy, World(gain=gained, best_learning_rate=rates[num_rates // 2]))
        cost, trainings, cells = (
            strategy.estimate_cost(),
            count_steps(outcomes) / steps,
            num_rates * num_ranks * num_seeds,
        )
        assert cost.minimum <= trainings <= cost.maximum <= 1.25 * cells + 2
        assert len(outcomes) <= cost.max_arms
        if goal == "training-rank" and name == "bracket":
            assert 0.4 <= trainings / cost.expected <= 1.6
            assert cost.expected_until_adapter < trainings
        else:
            assert trainings == cost.expected


@limit_examples(40)
@given(
    kind=st.sampled_from(["law", "noisy", "high learning rates"]),
    ranks=st.sampled_from([(1, 4, 16, 64), (4, 16)]),
    share=st.floats(0, 1),
    is_time=st.booleans(),
)
def test_a_budget_ends_a_search_exactly_where_it_is_spent(
    kind: str, ranks: tuple[int, ...], share: float, is_time: bool
) -> None:
    """Give as much as the first arms cost, or a little less; truncations are free, and a second trains one step."""
    values: dict[str, Any] = {"ranks": ranks, "learning_rates": (1e-4, 3e-4, 1e-3, 3e-3), "seeds": (0, 1)}
    for name in STRATEGIES:
        limit = {"budget_hours": None} if is_time else {"budget_trainings": None}
        unlimited = run_one_by_one(name, values | limit, WORLDS[kind]())
        finished = {outcome.trial_id: outcome for outcome in unlimited if isinstance(outcome, TrialFinished)}
        steps = [count_added_steps(outcome.arm, finished) for outcome in unlimited]
        minimum = STRATEGIES[name](make_space(seeds=(0, 1))).estimate_cost().minimum * STEPS
        for less in (0.0, 0.02 if is_time else 1.0):
            budget = max(minimum, sum(steps[: round(share * len(steps))]) - less)
            spent = list(accumulate(steps))
            end = next((index for index, paid in enumerate(spent) if steps[index] and paid > budget), len(steps))
            limit = {"budget_hours": budget / 3600} if is_time else {"budget_trainings": budget / STEPS}
            outcomes = run_one_by_one(name, values | limit, WORLDS[kind]())
            assert [outcome.arm for outcome in outcomes] == [outcome.arm for outcome in unlimited[:end]]


def run_one_by_one(name: str, values: dict[str, Any], world: World) -> list[TrialOutcome]:
    selection = SelectSettings(strategy=name, goal="training-rank", margin=0.01, **values)
    strategy = make_strategy(name, build_space(selection, STEPS, "loss"))
    return run_all(strategy, world, lambda arms: arms[:1])


@limit_examples(40)
@given(gain=st.floats(1e-4, 2.0), ranks=st.sampled_from([(1, 4, 16, 64), (1, 2, 4, 8, 16, 32, 64), (3, 12, 50)]))
def test_the_walk_begins_at_the_pick_where_losses_follow_the_law(gain: float, ranks: tuple[int, ...]) -> None:
    """Without truncations, a rank of at most a quarter of the top one predicts the pick, and only its next lower rank is trained."""
    world = World(gain=gain, can_stop_early=False, can_truncate=False)
    outcomes = run_all(STRATEGIES["bracket"](make_space(ranks=ranks, can_stop_early=False, can_truncate=False)), world)
    trained = list(dict.fromkeys(outcome.rank for outcome in outcomes if outcome.rank))
    losses = {rank: gain * rank**-0.57 for rank in ranks}
    pick = next(rank for rank in ranks if losses[rank] <= losses[ranks[-1]] + 0.01)
    second = max(rank for rank in ranks if rank <= ranks[-1] / 4)
    lower = [rank for rank in ranks if rank < pick][-1:]
    assert trained == list(dict.fromkeys([ranks[-1], second, pick, *lower]))
    for name in ("bracket", "grid"):
        strategy = STRATEGIES[name](make_space(ranks=ranks))
        answer = recommend(strategy, run_all(strategy, World(gain=gain)))
        assert (answer.rank, answer.learning_rate) == (pick, world.best_learning_rate)


def test_the_order_of_arrival_does_not_matter(name: str) -> None:
    for world, space in iterate_cases():
        expected = run_all(STRATEGIES[name](space), world)
        generator = random.Random(1)
        strategy = STRATEGIES[name](space)
        for order in (lambda arms: arms[::-1], lambda arms, generator=generator: [generator.choice(arms)]):
            outcomes = run_all(strategy, world, order)
            assert {outcome.arm for outcome in outcomes} == {outcome.arm for outcome in expected}
            generator.shuffle(outcomes)
            assert recommend(strategy, outcomes) == recommend(strategy, expected)
            assert not strategy.replay_trials(outcomes).waiting


def test_resumes_identically_from_every_prefix(name: str) -> None:
    for kind, values in [("law", {}), ("a table", {}), ("noisy", {}), ("low learning rates", SPACES["a walk"])]:
        world = WORLDS[kind]()
        space = make_space(seeds=(0, 1), **values)
        all_outcomes = run_all(STRATEGIES[name](space), world)
        for length in range(len(all_outcomes)):
            outcomes = all_outcomes[:length]
            for _ in run_rounds(STRATEGIES[name](space), world, outcomes, list):
                pass
            assert {outcome.arm for outcome in outcomes} == {outcome.arm for outcome in all_outcomes}


def test_ends_without_an_answer_where_everything_fails(name: str) -> None:
    strategy = STRATEGIES[name](make_space())
    outcomes = run_all(strategy, World(breaks=lambda arm: arm.rank > 0))
    assert recommend(strategy, outcomes).rank is None


def test_outcomes_of_other_arms_change_nothing(name: str) -> None:
    space, world = make_space(), World()
    strategy = STRATEGIES[name](space)
    outcomes = run_all(strategy, world)
    foreign = world.run(space.make_arm(space.top, 1e-3).model_copy(update={"steps": STEPS - 1}))
    assert recommend(strategy, [foreign, *outcomes]) == recommend(strategy, outcomes)
    assert foreign.arm not in strategy.replay_trials([foreign, *outcomes]).outcomes


def count_steps(outcomes: list[TrialOutcome]) -> int:
    """Return the number of optimizer steps, without failed arms."""
    finished = {outcome.trial_id: outcome for outcome in outcomes if isinstance(outcome, TrialFinished)}
    return sum(count_added_steps(outcome, finished) for outcome in finished.values() if outcome.rank > 0)


def test_without_the_base_it_requests_what_it_requests_when_the_base_fails(name: str) -> None:
    for seeds in [(0,), (0, 1)]:
        world = World(breaks=lambda arm: arm.rank == 0)
        without = STRATEGIES[name](make_space(seeds=seeds, evaluates_base=False))
        failing = STRATEGIES[name](make_space(seeds=seeds))
        arms = [outcome.arm for outcome in run_all(without, world)]
        assert arms == [outcome.arm for outcome in run_all(failing, world)][1:]
        assert 0 not in {arm.rank for arm in arms}
        assert without.estimate_arms() == failing.estimate_arms() - 1
        assert without.estimate_cost().max_arms == failing.estimate_cost().max_arms - 1


@limit_examples(25)
@given(number=st.integers(0, 2**32 - 1), kind=st.sampled_from(sorted(SPACES)))
def test_every_strategy_ends_on_random_tables(number: int, kind: str) -> None:
    """Draw the value of every arm, or its failure, at random."""

    class RandomTable(World):
        def loss(self, arm: Arm) -> float:
            return random.Random(f"{number} {arm}").lognormvariate(0.5, 0.3)

    space = make_space(**SPACES[kind])
    for strategy_class in STRATEGIES.values():
        strategy = strategy_class(space)
        world = RandomTable(breaks=lambda arm: random.Random(f"{arm} {number}").random() < 0.1)
        outcomes = run_all(strategy, world)
        assert count_steps(outcomes) <= strategy.estimate_cost().maximum * space.steps
        assert len(outcomes) <= strategy.estimate_cost().max_arms
        assert recommend(strategy, outcomes).rank in (
            None,
            *(outcome.rank for outcome in outcomes if outcome.is_direct),
        )


@limit_examples(150)
@given(
    number=st.integers(0, 2**32 - 1), seed=st.sampled_from([None, 0, 2]), is_score=st.booleans(), stops=st.booleans()
)
def test_the_learning_rate_is_the_best_at_a_quarter_that_finishes_or_the_best_of_whole_trainings(
    number: int, seed: int | None, is_score: bool, stops: bool
) -> None:
    """If the best at a quarter does not finish, a lower one follows. Whole trainings run if no quarter has begun."""
    space = make_space(seeds=(0, 1, 2), criterion=Criterion("reward" if is_score else "loss", is_score, 0.01, "loss"))
    world, trials, drawn = World(can_stop_early=stops), Trials(space), random.Random(number)
    losses: dict[bool, dict[float, float]] = {True: {}, False: {}}  # of quarters, and at the end
    rates: list[float | None] = []
    requested: list[Arm] = []

    def search() -> Iterator[Sequence[Arm]]:
        rates.append((yield from find_learning_rate(trials, 16, seed=seed)))

    share = drawn.choice([0.1, 0.6, 0.9])
    for arms in search():
        assert {arm.seed for arm in arms} == {seed or 0}
        requested += arms
        for arm in arms:
            outcome = world.run(arm)
            if isinstance(outcome, TrialFinished) and drawn.random() < share:
                loss = losses[arm.stop_at is not None][arm.learning_rate] = drawn.uniform(1, 2)
                changes = {"value": -loss if is_score else loss, "metrics": {}}
                trials.outcomes[arm] = outcome.model_copy(update=changes)
            elif drawn.random() < 0.2:
                trials.outcomes[arm] = TrialDiverged(trial_id="x", **arm.model_dump(), step=1, reason="loss")
    at_quarter, at_end = losses[True], losses[False]
    order = sorted(at_quarter, key=lambda rate: at_quarter[rate])
    while order and order[0] not in at_end:
        order = [rate for rate in order if rate < order[0]]
    has_begun = any(arm.stop_at for arm in trials.outcomes)
    expected = order[0] if order else None
    if not has_begun:
        expected = min(at_end, key=lambda rate: at_end[rate], default=None)
    assert rates == [expected]
    whole_rates = [arm.learning_rate for arm in requested if arm.stop_at is arm.continue_from is None]
    assert whole_rates == ([] if has_begun else [*space.learning_rates])


@limit_examples(25)
@given(number=st.integers(0, 2**32 - 1), kind=st.sampled_from(sorted(WORLDS)))
def test_the_ranks_that_decide_have_every_seed_at_the_end(number: int, kind: str) -> None:
    """Also, the rank below the answer has been tried."""
    space = make_space(seeds=(0, 1, 2))
    world = WORLDS[kind]()
    world.noise = random.Random(number).choice([0.0, 0.01, 0.05])
    world.gain *= random.Random(number).uniform(0.5, 2)
    strategy = STRATEGIES["bracket"](space)
    outcomes = run_all(strategy, world)
    trials, answer = strategy.replay_trials(outcomes), recommend(strategy, outcomes)
    assert answer.rank is not None
    for rank in (answer.rank, answer.reference_rank):
        rate = trials.find_best_learning_rate(rank)
        assert set(trials.get_trials_by_seed(rank, rate)) == set(space.seeds)
    lower = space.get_lower_rank(answer.rank)
    assert lower is None or lower in {outcome.rank for outcome in outcomes if outcome.is_direct}
