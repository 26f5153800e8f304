"""Test the planned next runs: their size against simulations, their price, and their commands."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from rightrank.decision.comparison import (
    CONFIDENCE,
    NORMAL,
    POWER,
    Estimate,
    compute_required_examples,
    estimate_mean,
)
from rightrank.decision.evidence import Evidence
from rightrank.decision.rule import EXAMPLE_COUNTS, decide_table
from rightrank.decision.table import ScoreTable, build_table
from rightrank.schema.events import RunStarted, build_next_commands
from rightrank.schema.results import Decision, NextRun
from tests.decision.tables import build_example_table, make_trial
from tests.report.runs import make_run


def test_the_required_examples_decide_four_of_five_runs() -> None:
    generator = np.random.default_rng(3)
    margin, true = 0.02, 0.012
    pilot = estimate_mean(generator.normal(true, 0.09, size=(1, 96)), np.ones(96))
    pilot = type(pilot)(true, 0.09**2 / 96, 0.0, 0.0, 96, 1, 0.0, 0.0)
    num_examples = compute_required_examples(pilot, margin)
    assert num_examples is not None
    num_settled = 0
    for _ in range(400):
        run = estimate_mean(generator.normal(true, 0.09, size=(1, num_examples)), np.ones(num_examples))
        num_settled += run.compute_bound(CONFIDENCE) < margin
    assert 0.74 <= num_settled / 400 <= 0.92


def test_a_difference_at_the_margin_is_never_decided() -> None:
    pilot = estimate_mean(np.random.default_rng(0).normal(0.005, 0.1, size=(1, 100)), np.ones(100))
    pilot = type(pilot)(0.005, 1e-4, 0.0, 0.0, 100, 1, 0.0, 0.0)
    assert compute_required_examples(pilot, 0.005) is None


def make_run_start() -> RunStarted:
    """Make the start of a run of two ranks, two learning rates and two seeds on 30 of 50 held-out examples."""
    started = make_run((1, 4), (1e-3, 3e-3), (0, 2)).started
    data = started.data.model_copy(update={"not_evaluated": 20})
    return started.model_copy(update={"data": data})


def format_command(
    next_run_fields: dict[str, object], run: str = "out", margin: float | None = None, is_custom_trainer: bool = False
) -> str | None:
    """Return the command of a next run, or None if `select` cannot do it."""
    started = make_run_start()
    if is_custom_trainer:
        started = started.model_copy(update={"kind": "custom_trainer"})
    next_run = NextRun.model_validate({"sentence": "x"} | next_run_fields)
    commands = build_next_commands(started, [next_run], run, margin)
    assert len(commands) == 1
    return commands[0]


@pytest.mark.parametrize(
    ("next_run_fields", "options"),
    [
        ({"action": "seeds", "seeds": 4}, "--seeds 0,1,2,3"),  # the smallest unused seed numbers
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
        ({"action": "examples", "examples": 51}, None),  # more than there are examples
        ({"action": "examples", "examples": 30}, None),  # no more than are used now
        ({"action": "test", "ranks": [8]}, None),
    ],
)
def test_a_next_run_that_select_can_do_is_a_command(next_run_fields: dict[str, object], options: str | None) -> None:
    assert format_command(next_run_fields) == (None if options is None else f"rightrank select --out out {options}")


@pytest.mark.parametrize(
    ("next_run_fields", "options"),
    [
        ({"action": "examples", "examples": 50}, ["--max-eval-examples 50"]),
        ({"action": "seeds", "seeds": 3, "examples": 31}, ["--max-eval-examples 31", "--seeds 0,1,2"]),
    ],
)
def test_more_examples_are_another_run(next_run_fields: dict[str, object], options: list[str]) -> None:
    started = make_run_start()
    command = format_command(next_run_fields)
    assert command is not None
    assert command.startswith(f"rightrank select {started.model_name} {started.data_name} --out out-more-examples --")
    assert "--learning-rates 0.001,0.003" in command
    assert all(option in command for option in options)


HIGH_CONFIDENCE = 0.75


def drop_trainings(table: ScoreTable, *dropped: tuple[int, int]) -> ScoreTable:
    """Return the table without these trainings, given by rank and seed."""
    return replace(table, cells={key: cell for key, cell in table.cells.items() if (key[0], key[2]) not in dropped})


def require_trial_counts(decision: Decision) -> list[NextRun]:
    """Return the next runs that train more seeds, and require each to count the missing trainings in its field and sentence."""
    at_hand = {evidence.rank: evidence.seeds for evidence in decision.ranks}
    runs = [run for run in decision.next_runs if run.action == "seeds"]
    for run in runs:
        assert run.seeds is not None
        assert run.trials == sum(max(0, run.seeds - at_hand[rank]) for rank in run.ranks) > 0
        assert re.findall(r"\b(\d+) trainings?\b", run.sentence) == [str(run.trials)]
        assert f" with {run.seeds} seeds" in run.sentence
    return runs


@pytest.mark.parametrize(
    ("margin", "actions"), [(0.0001, ["none"]), (0.001, ["examples"]), (0.0015, ["examples", "seeds"])]
)
def test_a_planned_run_is_the_smallest_that_is_enough(margin: float, actions: list[str]) -> None:
    table = build_example_table({4: 2.002, 64: 2.0}, seeds=(0, 1), num_examples=100, noise=0.03)
    table = replace(table, kind="accuracy")  # no run removes the noise of the learning rates of losses
    evidence, decision = Evidence(table), decide_table(table, margin, confidence=HIGH_CONFIDENCE)
    sizes = (100, *EXAMPLE_COUNTS)

    def is_reached(seeds: int, num_examples: int) -> bool:
        return min(evidence.compute_margins(HIGH_CONFIDENCE, seeds, num_examples).values()) <= margin

    assert [run.action for run in decision.next_runs] == actions
    for run in decision.next_runs if actions != ["none"] else ():
        assert run.ranks == [4, 64]
        assert is_reached(run.seeds or 2, run.examples or 100)
        if run.examples is not None:
            assert not is_reached(2, sizes[sizes.index(run.examples) - 1])
            assert f"score about {run.examples:,} held-out examples (now 100) at ranks 4 and 64." in run.sentence
        else:
            assert run.seeds is not None
            assert not is_reached(run.seeds - 1, 100)
    assert len(require_trial_counts(decision)) == ("seeds" in actions)


def test_the_smallest_rank_is_recommended_if_no_run_is_enough() -> None:
    table = build_example_table({4: 2.0}, seeds=(0, 1), num_examples=100)
    tilted = {
        (64, lr, seed): replace(cell, trial_id=f"64-{seed}", sums=cell.sums + np.resize([0.03, -0.03], 100))
        for (_, lr, seed), cell in table.cells.items()
    }
    (run,) = decide_table(replace(table, cells={**table.cells, **tilted}), 1e-9).next_runs
    assert (run.action, run.ranks, run.trials) == ("none", [4], 0)
    assert run.sentence.endswith("take rank 4, or choose another margin.")


@pytest.mark.parametrize("margin", [0.001, 0.005, 0.01, 0.05])
@pytest.mark.parametrize(
    "seeds_by_rank", [{4: (0, 1, 2, 3, 4), 64: (0, 1)}, {4: (0, 1, 2, 3), 64: (4,)}, {4: (0,), 64: (0, 1)}]
)
def test_existing_seeds_are_not_trained_again(seeds_by_rank: dict[int, tuple[int, ...]], margin: float) -> None:
    table = build_example_table({4: 2.002, 64: 2.0}, seeds=(0, 1, 2, 3, 4), num_examples=100, noise=0.03)
    table_with_fewer_seeds = drop_trainings(
        table, *((rank, seed) for rank in (4, 64) for seed in range(5) if seed not in seeds_by_rank[rank])
    )
    require_trial_counts(decide_table(table_with_fewer_seeds, margin))


def build_rate_table(values: Mapping[tuple[int, float], float]) -> ScoreTable:
    """Build a table with one number for each rank and learning rate."""
    results = [
        make_trial(trial_id=f"{rank} {rate}", rank=rank, learning_rate=rate, value=value)
        for (rank, rate), value in values.items()
    ]
    return build_table(results, "eval_loss", False)


@pytest.mark.parametrize(
    ("values", "ranks", "rate"),
    [
        # Repeat the last step beyond the best rate, rounded to one digit.
        ({(4, 1e-3): 2.0, (4, 3e-3): 2.1, (16, 1e-3): 2.0}, [4], 3e-4),
        ({(4, 1e-3): 2.1, (4, 3e-3): 2.0, (16, 3e-3): 2.0}, [4], 0.009),
        ({(4, 1e-4): 2.2, (4, 1e-3): 2.1, (4, 2.5e-3): 2.0, (16, 3e-3): 2.001}, [4], 0.006),
        ({(4, 1e-3): 2.1, (4, 1.2e-3): 2.0, (16, 3e-3): 2.001}, [4], 0.00144),  # the step is smaller than any rounding
        # Use a nearby rate of another rank.
        ({(4, 1e-3): 2.1, (4, 3e-3): 2.0, (16, 3e-3): 2.0, (16, 8e-3): 2.2}, [4], 8e-3),
        ({(4, 1e-3): 2.1, (4, 3e-3): 2.0, (16, 3e-3): 2.0, (16, 5e-3): 2.2}, [4], 0.009),
        # The ranks are the answer and the reference.
        ({(4, 1e-3): 2.0, (4, 3e-3): 2.1, (16, 1e-3): 1.999}, [4, 16], 3e-4),
        # A rate of 0 has no ratio.
        ({(4, 0.0): 2.1, (4, 3e-3): 2.0, (16, 3e-3): 2.0}, [4], 9e-3),
        ({(4, 0.0): 2.0, (4, 3e-3): 2.1, (16, 3e-3): 2.0}, [4], 1e-3),
    ],
)
def test_a_best_rate_at_the_edge_extends_the_rates_by_one_step(
    values: dict[tuple[int, float], float], ranks: list[int], rate: float
) -> None:
    decision = decide_table(build_rate_table(values), 0.01)
    assert "lr_edge" in decision.flags
    (run,) = [run for run in decision.next_runs if run.action == "rates"]
    assert (run.ranks, run.trials) == (ranks, len(ranks))
    assert run.learning_rates == [pytest.approx(rate)]
    assert f" at {rate:.2g} too" in run.sentence


def test_a_plan_ends_at_64_times_the_examples() -> None:
    error = 1 / 100**0.5
    estimated = Estimate(0.0, error**2, 0.0, 0.0, 100, 1, 0.0, 0.0)
    reach = (NORMAL.inv_cdf(CONFIDENCE) + NORMAL.inv_cdf(POWER)) * error
    assert compute_required_examples(estimated, reach / 7.6) == 5800  # 57.8 times as many
    assert compute_required_examples(estimated, reach / 8.01) is None


@pytest.mark.parametrize("rate", [0.0, 2e-3])
def test_no_gain_suggests_learning_rates_first(rate: float) -> None:
    (run,) = decide_table(
        build_rate_table({(0, 0.0): 2.0, (4, 1e-3 if rate else 0.0): 2.0, (16, rate): 2.0}), 0.02
    ).next_runs
    assert (run.action, run.ranks, run.trials) == ("rates", [4], 1)
    assert run.learning_rates == ([pytest.approx(3 * rate)] if rate else [])
    tried = "those tried, such as 0.006" if rate else "those tried"
    assert run.sentence == f"Try learning rates beyond {tried}, then more steps, then more data."
