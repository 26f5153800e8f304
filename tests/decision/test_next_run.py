"""The power calculation does what it says, checked by simulation; what a next run buys and costs; and the next runs as commands."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from rightrank.decision.comparison import (
    CONFIDENCE,
    MAX_SEEDS,
    NORMAL,
    POWER,
    Estimate,
    estimate,
    examples_needed,
    seeds_needed,
    settles,
)
from rightrank.decision.evidence import Evidence
from rightrank.decision.next_run import SIZES, next_commands, time_told
from rightrank.decision.records import decide_run
from rightrank.decision.rule import ASKED_CONFIDENCE, decision_of
from rightrank.decision.seeds import BOUND_DEGREES, NOISE
from rightrank.decision.table import ScoreTable, table_of_results
from rightrank.schema.decision import Decision, NextRun, Result, ResultsTable
from rightrank.schema.events import RunStarted
from tests.decision.tables import bare, scored
from tests.decision.worlds import World, table_in
from tests.report.runs import made_up_run


def test_the_examples_needed_settle_it_in_four_of_five_runs() -> None:
    generator = np.random.default_rng(3)
    margin, true = 0.02, 0.012
    pilot = estimate(generator.normal(true, 0.09, size=(1, 96)), np.ones(96))
    pilot = type(pilot)(true, 0.09**2 / 96, 0.0, 0.0, 96, 1, 0.0, 0.0)
    items = examples_needed(pilot, margin)
    assert items is not None
    settled = 0
    for _ in range(400):
        run = estimate(generator.normal(true, 0.09, size=(1, items)), np.ones(items))
        settled += run.bound(CONFIDENCE) < margin
    assert 0.74 <= settled / 400 <= 0.92


def test_so_many_seeds_settle_it_four_times_in_five() -> None:
    generator = np.random.default_rng(4)
    margin, true, noise = 0.005, 0.0015, 0.002
    pilot = estimate(np.zeros((2, 1)), np.ones(1)).with_seeds(noise**2 / 2, 1.0)
    pilot = type(pilot)(true, 0.0, noise**2 / 2, 0.0, 0, 2, 1.0, 0.0)
    seeds = seeds_needed(pilot, margin)
    assert seeds is not None
    settled = 0
    for _ in range(600):
        run = estimate(generator.normal(true, noise, size=(seeds, 1)), np.ones(1))
        settled += run.bound(CONFIDENCE) < margin
    assert settled / 600 >= 0.74


def test_a_difference_at_the_margin_is_never_settled() -> None:
    pilot = estimate(np.random.default_rng(0).normal(0.005, 0.1, size=(1, 100)), np.ones(100))
    pilot = type(pilot)(0.005, 1e-4, 0.0, 0.0, 100, 1, 0.0, 0.0)
    assert not settles(pilot.at(6400, 1), 0.005)
    assert examples_needed(pilot, 0.005) is None


def started() -> RunStarted:
    """A run of two ranks, two learning rates and two seeds on 30 of 50 held-out examples."""
    made = made_up_run((1, 4), (1e-3, 3e-3), (0, 2)).started
    data = made.data.model_copy(update={"not_evaluated": 20})
    return made.model_copy(update={"data": data})


def command(wanted: dict[str, object], run: str = "out", margin: float | None = None, own: bool = False) -> str | None:
    """The command of one next run."""
    begun = started()
    if own:
        begun = begun.model_copy(update={"settings": begun.settings | {"trainer": "train"}})
    next_run = NextRun.model_validate({"sentence": "x"} | wanted)
    found = next_commands(begun, [next_run], run, margin)
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize(
    ("wanted", "options"),
    [
        ({"action": "seeds", "seeds": 4}, "--seeds 0,1,2,3"),  # the smallest that the run does not have
        ({"action": "seeds", "seeds": 2}, None),
        ({"action": "seeds"}, None),
        ({"action": "rank", "ranks": [8]}, "--ranks 1,4,8"),
        (
            {"action": "rank", "ranks": [8, 4], "learning_rates": [3e-4, 1e-3]},
            "--ranks 1,4,8 --learning-rates 0.0003,0.001,0.003",
        ),
        ({"action": "rank", "ranks": [4]}, None),
        ({"action": "rates", "ranks": [8], "learning_rates": [0.0123]}, "--learning-rates 0.001,0.003,0.0123"),
        ({"action": "rates", "learning_rates": [1e-3]}, None),
        ({"action": "items", "items": 50}, "--eval-items 50"),
        ({"action": "items", "items": 51}, None),  # more than there are
        ({"action": "items", "items": 30}, None),  # no more than now
        ({"action": "seeds", "seeds": 3, "items": 31}, "--eval-items 31 --seeds 0,1,2"),
        ({"action": "rank", "ranks": [8], "items": 31}, "--eval-items 31 --ranks 1,4,8"),
        ({"action": "rates", "learning_rates": [0.1], "items": 31}, "--eval-items 31 --learning-rates 0.001,0.003,0.1"),
        ({"action": "steps", "ranks": [8], "seeds": 9, "learning_rates": [0.1]}, None),
        ({"action": "test", "ranks": [8]}, None),
        ({"action": "data", "learning_rates": [0.1]}, None),
    ],
)
def test_a_next_run_that_select_can_do_is_a_command(wanted: dict[str, object], options: str | None) -> None:
    assert command(wanted) == (None if options is None else f"rightrank select --out out {options}")


def test_the_command_can_be_pasted_and_has_another_margin_where_one_is_given() -> None:
    assert command({"action": "seeds", "seeds": 3}, "a run") == "rightrank select --out 'a run' --seeds 0,1,2"
    assert command({"action": "rank", "ranks": [8]}, margin=0.0125) == (
        "rightrank select --out out --ranks 1,4,8 --margin 0.0125"
    )
    assert command({"action": "test"}, margin=0.01) is None


def test_a_custom_trainer_has_no_commands() -> None:
    assert command({"action": "seeds", "seeds": 3}, own=True) is None


def test_trainings_of_unequal_length_are_to_be_made_equal() -> None:
    records = made_up_run((1, 4, 16), (1e-3,))
    base, one, four, sixteen = records.finished()
    records.outcomes[:] = [base, one.model_copy(update={"steps": 10}), four.model_copy(update={"steps": 20}), sixteen]
    (found,) = [one for one in decide_run(records).next_runs if one.action == "steps"]
    assert (found.ranks, found.steps, found.trials) == ([1, 4], sixteen.steps, 2)
    assert found.sentence == (
        f"Train ranks 1 and 4 for {sixteen.steps} steps too (2 trainings): trainings of unequal length are compared."
    )


@pytest.mark.parametrize(
    ("minutes", "told"),
    [
        (None, ""),
        (0.5, " (about 30 seconds)"),
        (1.4, " (about 84 seconds)"),
        (1.5, " (about 2 minutes)"),
        (89.9, " (about 90 minutes)"),
        (90.0, " (about 1.5 hours)"),
        (60_000.0, " (about 1,000.0 hours)"),
    ],
)
def test_a_time_is_told_in_the_unit_that_it_is_read_in(minutes: float | None, told: str) -> None:
    assert time_told(minutes) == told
    assert time_told(minutes, ", ") == told.replace(" (", ", ").replace(")", "")


TRAIN, EVALUATE = 601.0, 33.0  # seconds


def timed(table: ScoreTable) -> ScoreTable:
    cells = {
        key: replace(cell, train_seconds=TRAIN, eval_seconds=EVALUATE if key[0] else 0.0)
        for key, cell in table.cells.items()
    }
    return replace(table, cells=cells)


def without(table: ScoreTable, *dropped: tuple[int, int]) -> ScoreTable:
    """The table without trainings of a rank and a seed."""
    return replace(table, cells={key: cell for key, cell in table.cells.items() if (key[0], key[2]) not in dropped})


def require_counted(decision: Decision) -> list[NextRun]:
    """The runs that train further seeds; each counts the trainings that are missing, in its field and in its sentence."""
    at_hand = {evidence.rank: evidence.seeds for evidence in decision.ranks}
    runs = [run for run in decision.next_runs if run.action == "seeds"]
    for run in runs:
        assert run.seeds is not None
        assert run.trials == sum(max(0, run.seeds - at_hand[rank]) for rank in run.ranks) > 0
        assert re.findall(r"\b(\d+) trainings?\b", run.sentence) == [str(run.trials)]
        assert f" with {run.seeds} seeds" in run.sentence
    return runs


@pytest.mark.parametrize(
    ("margin", "actions"),
    [
        (0.0001, ["seeds"]),
        (0.0005, ["seeds"]),
        (0.001, ["items"]),
        (0.0015, ["items", "seeds"]),
        (0.002, ["items", "seeds"]),
    ],
)
def test_what_is_bought_is_enough_and_less_is_not(margin: float, actions: list[str]) -> None:
    table = timed(scored({4: 2.002, 64: 2.0}, seeds=(0, 1), items=100, noise=0.03))
    evidence, decision = Evidence(table), decision_of(table, margin)
    sizes = (100, *SIZES)

    def reached(seeds: int, items: int) -> bool:
        return min(evidence.margins_at(ASKED_CONFIDENCE, seeds, items).values()) <= margin

    assert [run.action for run in decision.next_runs] == actions
    for run in decision.next_runs:
        seeds, items = run.seeds or 2, run.items or 100
        assert run.ranks == [4, 64]
        assert reached(seeds, items)
        if run.action == "items":
            assert not reached(seeds, sizes[sizes.index(items) - 1])
            assert ("further seeds alone would not do it" in run.sentence) is (actions == ["items"])
            assert run.minutes == round(items * 4 * EVALUATE / 100 / 60, 1)
        else:
            assert not reached(seeds - 1, items if items == 100 else SIZES[-1])
            assert run.minutes == round(run.trials * (TRAIN + EVALUATE) / 60, 1)
            assert ("examples" in run.sentence) is (run.items is not None)
        assert time_told(run.minutes, "") in run.sentence
        assert re.fullmatch(
            r"To test the margin, score about [\d,]+ held-out examples \(now 100\) at ranks 4 and 64 \(about [^()]+\)(; [^()]+)?\."
            r"|Train ranks 4 and 64 with \d+ seeds \(now 2\)( and score about [\d,]+ held-out examples \(now 100\))? to test it "
            r"\(\d+ trainings?, about [^()]+\)\.",
            run.sentence,
        )
        assert (f"score about {items:,} held-out examples (now 100)" in run.sentence) is (run.items is not None)
    assert len(require_counted(decision)) == ("seeds" in actions)


def test_where_nothing_that_can_be_bought_is_enough_the_smallest_rank_is_to_be_taken() -> None:
    table = scored({4: 2.0}, seeds=(0, 1), items=100)
    tilted = {
        (64, lr, seed): replace(cell, trial_id=f"64-{seed}", sums=cell.sums + np.resize([0.03, -0.03], 100))
        for (_, lr, seed), cell in table.cells.items()
    }
    (run,) = decision_of(replace(table, cells={**table.cells, **tilted}), 1e-9).next_runs
    assert (run.action, run.ranks, run.trials) == ("none", [4], 0)
    assert re.search(r"Not even 32 seeds .* take rank 4, or choose another margin", run.sentence)


@pytest.mark.parametrize("confidence", [ASKED_CONFIDENCE, None])
@pytest.mark.parametrize("margin", [0.001, 0.005, 0.01, 0.05])
@pytest.mark.parametrize("left", [{4: (0, 1, 2, 3, 4), 64: (0, 1)}, {4: (0, 1, 2, 3), 64: (4,)}, {4: (0,), 64: (0, 1)}])
def test_seeds_that_a_rank_has_are_not_trained_again(
    left: dict[int, tuple[int, ...]], margin: float, confidence: float | None
) -> None:
    table = scored({4: 2.002, 64: 2.0}, seeds=(0, 1, 2, 3, 4), items=100, noise=0.03)
    few = without(table, *((rank, seed) for rank in (4, 64) for seed in range(5) if seed not in left[rank]))
    require_counted(decision_of(few, margin, confidence=confidence))


def rated(values: Mapping[tuple[int, float], float]) -> ScoreTable:
    """One number for each rank and learning rate."""
    results = [
        Result(trial_id=f"{rank} {rate}", rank=rank, learning_rate=rate, value=value)
        for (rank, rate), value in values.items()
    ]
    return table_of_results(ResultsTable(metric="eval_loss", higher_is_better=False, results=results, understood=[]))


@pytest.mark.parametrize(
    ("values", "ranks", "rate"),
    [
        # the last step outward once more, on the side of the best, rounded to a digit
        ({(4, 1e-3): 2.0, (4, 3e-3): 2.1, (16, 1e-3): 2.0}, [4], 3e-4),
        ({(4, 1e-3): 2.1, (4, 3e-3): 2.0, (16, 3e-3): 2.0}, [4], 0.009),
        ({(4, 1e-4): 2.2, (4, 1e-3): 2.1, (4, 2.5e-3): 2.0, (16, 3e-3): 2.001}, [4], 0.006),
        ({(4, 1e-3): 2.1, (4, 1.2e-3): 2.0, (16, 3e-3): 2.001}, [4], 0.00144),  # no round number is as near as a step
        # a rate of another rank where one is near
        ({(4, 1e-3): 2.1, (4, 3e-3): 2.0, (16, 3e-3): 2.0, (16, 8e-3): 2.2}, [4], 8e-3),
        ({(4, 1e-3): 2.1, (4, 3e-3): 2.0, (16, 3e-3): 2.0, (16, 5e-3): 2.2}, [4], 0.009),
        # of the answer and of the reference
        ({(4, 1e-3): 2.0, (4, 3e-3): 2.1, (16, 1e-3): 1.999}, [4, 16], 3e-4),
        # a rate of 0 has no factor
        ({(4, 0.0): 2.1, (4, 3e-3): 2.0, (16, 3e-3): 2.0}, [4], 9e-3),
        ({(4, 0.0): 2.0, (4, 3e-3): 2.1, (16, 3e-3): 2.0}, [4], 1e-3),
    ],
)
def test_beyond_the_edge_is_one_step_further(
    values: dict[tuple[int, float], float], ranks: list[int], rate: float
) -> None:
    decision = decision_of(rated(values), 0.01)
    assert "lr_edge" in decision.flags
    (run,) = [run for run in decision.next_runs if run.action == "rates"]
    assert (run.ranks, run.trials) == (ranks, len(ranks))
    assert run.learning_rates == [pytest.approx(rate)]
    assert f" at {rate:.2g} too" in run.sentence


def test_a_larger_rank_has_a_learning_rate_where_one_is_known() -> None:
    losses = {(1, 1e-3): 2.2, (4, 1e-3): 2.1, (16, 1e-3): 2.0}
    rates = decision_of(rated(losses), 0.01).next_runs[0]
    assert (rates.action, rates.ranks, rates.trials) == ("rank", [32], 2)
    assert rates.learning_rates == [pytest.approx(3e-4), 1e-3]  # lower too: larger ranks often want less
    assert rates.sentence.startswith("Train rank 32 at learning rates 0.0003 and 0.001 (2 trainings)")
    none = decision_of(bare({1: 2.2, 4: 2.1, 16: 2.0}), 0.01).next_runs[0]
    assert (none.action, none.ranks, none.learning_rates, none.trials) == ("rank", [32], [], 1)
    assert none.sentence.startswith("Train rank 32 (1 training)")


@pytest.mark.parametrize("seeds", [2, 3, 9])
def test_so_many_seeds_are_expected_to_show_a_difference_at_the_noise_of_earlier_grids(seeds: int) -> None:
    table = table_in(World("flat", items=80, seeds=(0, 1), learning_rates=(1e-3, 9e-4, 8e-4), noise=0.02))
    evidence = Evidence(table)
    worse = next(one for one in evidence.contenders.values() if one.rank != evidence.reference.rank)
    now, then = evidence.difference(worse), evidence.expected(worse, seeds)
    each = [worse.cells[seed].sums - evidence.reference.cells[seed].sums for seed in (0, 1)]
    spread = float(np.mean([of_seed.var(ddof=1) for of_seed in each]))
    assert worse.gap != evidence.reference.gap
    assert (then.mean, then.examples_variance) == pytest.approx((now.mean, now.examples_variance))
    assert (then.seeds, then.seeds_variance) == (seeds, pytest.approx(NOISE.over_seeds(80) * spread / seeds))
    assert then.seeds_degrees == pytest.approx(BOUND_DEGREES + seeds - 1)


@pytest.mark.parametrize("margin", [0.003, 0.005, 0.006, 0.007, 0.008, 0.01, 0.02])
def test_further_seeds_make_a_decision_of_an_indication_and_one_less_does_not(margin: float) -> None:
    table = scored({4: 2.003, 64: 2.0}, seeds=(0,), items=400, noise=0.02)
    evidence, decision = Evidence(table), decision_of(table, margin, confidence=None)
    assert "one_seed" in decision.flags
    (run,) = require_counted(decision)
    assert run.seeds is not None
    assert run.ranks == [4, 64]

    def is_enough(seeds: int) -> bool:
        return settles(evidence.expected(evidence.contenders[4], seeds), margin)

    if is_enough(MAX_SEEDS):
        assert is_enough(run.seeds)
        assert run.seeds == 2 or not is_enough(run.seeds - 1)
        assert "to make it a decision" in run.sentence
    else:
        assert run.seeds == 2
        assert f"{MAX_SEEDS} seeds would not make it a decision" in run.sentence


def smallest_margin(planned: Estimate) -> float:
    """From which a run of this size is expected to settle the difference."""
    return planned.bound(CONFIDENCE) + NORMAL.inv_cdf(POWER) * planned.standard_error


NEAR = 1e-6


def test_a_plan_ends_at_64_times_the_examples_and_at_32_seeds() -> None:
    found = replace(estimate(np.random.default_rng(5).normal(size=(1, 100)), np.ones(100)), mean=0.0, skewness=0.0)
    most = smallest_margin(found.at(5800, 1))  # 58 times as many; the next step is 66 times
    assert examples_needed(found, most * (1 + NEAR)) == 5800
    assert examples_needed(found, most * (1 - NEAR)) is None
    noisy = Estimate(0.0, 0.0, 0.01, 0.0, 0, 2, 1.0, 0.0)
    most = smallest_margin(noisy.at(0, MAX_SEEDS))
    assert seeds_needed(noisy, most * (1 + NEAR)) == MAX_SEEDS == 32
    assert seeds_needed(noisy, most * (1 - NEAR)) is None
    assert seeds_needed(noisy, 10.0) == 3  # at least one more


def test_no_more_than_32_seeds_are_bought_or_planned() -> None:
    table = scored({4: 2.002, 64: 2.0}, seeds=(0, 1), items=100, noise=0.03)
    most = min(Evidence(table).margins_at(ASKED_CONFIDENCE, MAX_SEEDS).values())
    bought = [[run.seeds for run in decision_of(table, most * near).next_runs] for near in (1 + NEAR, 1 - NEAR)]
    assert bought == [[None, MAX_SEEDS], [None]]
    one_seed = scored({4: 2.003, 64: 2.0}, seeds=(0,), items=400, noise=0.02)
    evidence = Evidence(one_seed)
    most = smallest_margin(evidence.expected(evidence.contenders[4], MAX_SEEDS))
    planned = [decision_of(one_seed, most * near, confidence=None).next_runs[-1] for near in (1 + NEAR, 1 - NEAR)]
    assert [run.seeds for run in planned] == [MAX_SEEDS, 2]


@pytest.mark.parametrize(("rate", "told"), [(0.0, "at a higher learning rate"), (2e-3, "at learning rate 0.006")])
def test_without_a_gain_the_data_are_checked_and_a_higher_rate_tried(rate: float, told: str) -> None:
    (run,) = decision_of(rated({(0, 0.0): 2.0, (4, 1e-3 if rate else 0.0): 2.0, (16, rate): 2.0}), 0.02).next_runs
    assert (run.action, run.ranks, run.trials) == ("data", [4], 1)
    assert run.learning_rates == ([pytest.approx(3 * rate)] if rate else [])
    assert f"then train once {told}, or longer" in run.sentence
