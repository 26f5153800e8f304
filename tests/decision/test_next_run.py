"""The power calculation does what it says, checked by simulation; and the next runs as commands."""

from __future__ import annotations

import numpy as np
import pytest

from rightrank.decision.comparison import CONFIDENCE, estimate, examples_needed, seeds_needed, settles
from rightrank.decision.next_run import next_commands, time_told
from rightrank.decision.records import decide_run
from rightrank.schema.decision import NextRun
from rightrank.schema.events import RunStarted
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
    decision = decide_run(made_up_run()).model_copy(update={"next_runs": [next_run]})
    found = next_commands(begun, decision, run, margin)
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


def test_a_custom_trainer_has_no_commands_and_without_a_decision_there_are_none() -> None:
    assert command({"action": "seeds", "seeds": 3}, own=True) is None
    assert next_commands(started(), None, "out") == []


def test_trainings_of_unequal_length_are_to_be_made_equal() -> None:
    records = made_up_run((1, 4, 16), (1e-3,))
    base, one, four, sixteen = records.finished()
    outcomes = [base, one.model_copy(update={"steps": 10}), four.model_copy(update={"steps": 20}), sixteen]
    (found,) = [one for one in decide_run(records, outcomes).next_runs if one.action == "steps"]
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
