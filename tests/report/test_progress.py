"""Test the estimated time left on selections with a given true time: one trial at a time, several together, continued, resumed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from rightrank.report.progress import Progress
from rightrank.schema.events import Event, SelectionPlanned, StepDone
from rightrank.schema.trials import Arm, Trial, TrialFinished, TrialOutcome, TrialStarted
from tests.report.runs import make_run

STEP_SECONDS, EVAL_SECONDS = 2.0, 6.0  # an equal share per arm, whatever shares the passes


def make_trials(count: int, steps: int = 20) -> list[Trial]:
    return [
        Trial(trial_id=f"t{index}", arm=Arm(rank=2**index, learning_rate=1e-3, lora_alpha=32, seed=0, steps=steps))
        for index in range(count)
    ]


def start_trial(trial: Trial) -> TrialStarted:
    return TrialStarted(trial_id=trial.trial_id, **trial.arm.model_dump())


def finish_trial(trial: Trial, seconds: float | None = None) -> TrialFinished:
    last = trial.arm.stop_at or trial.arm.steps
    template = make_run(with_base=True).outcomes[-1]
    assert isinstance(template, TrialFinished)
    changes = trial.arm.model_dump() | {"trial_id": trial.trial_id, "eval_seconds": EVAL_SECONDS}
    changes["train_seconds"] = last * STEP_SECONDS if seconds is None else seconds
    return template.model_copy(update=changes)


def simulate_events(trials: Sequence[Trial], adapters_per_pass: int) -> Iterator[tuple[float, Event]]:
    """Yield `(true seconds left, event)` of trials trained with several adapters per pass and evaluated once at their end."""
    seconds_left = sum(trial.arm.steps * STEP_SECONDS + EVAL_SECONDS for trial in trials)
    for first in range(0, len(trials), adapters_per_pass):
        group = trials[first : first + adapters_per_pass]
        for trial in group:
            yield seconds_left, start_trial(trial)
        for step in range(1, group[0].arm.steps + 1):
            seconds_left -= STEP_SECONDS * len(group)
            for trial in group:
                yield (
                    seconds_left,
                    StepDone(
                        trial_id=trial.trial_id,
                        step=step,
                        steps=trial.arm.steps,
                        loss=3.0,
                        seconds=step * STEP_SECONDS,
                    ),
                )
        seconds_left -= EVAL_SECONDS * len(group)
        for trial in group:
            yield seconds_left, finish_trial(trial)


def make_progress(count: int, outcomes: Sequence[TrialOutcome] = (), **settings: object) -> Progress:
    progress = Progress()
    progress.record_event(make_planned_progress(count, 2.0 * count, outcomes, **settings))
    return progress


def make_planned_progress(
    expected: float, most_seconds: float, outcomes: Sequence[TrialOutcome] = (), **settings: object
) -> SelectionPlanned:
    started = make_run().started
    started = started.model_copy(update={"settings": started.settings | settings})
    return SelectionPlanned(
        started=started,
        expected_trials=9,
        steps=20,
        expected_trainings=expected,
        trainings_at_most=most_seconds,
        outcomes=list(outcomes),
    )


@pytest.mark.parametrize("adapters_per_pass", [1, 3, 8])
def test_the_time_left_is_the_time_left(adapters_per_pass: int) -> None:
    """Within one evaluation an arm: until one has ended, nobody knows what that takes."""
    progress, trials = make_progress(8), make_trials(8)
    checked = 0
    for seconds_left, event in simulate_events(trials, adapters_per_pass):
        progress.record_event(event)
        if (isinstance(event, StepDone) and event.trial_id == trials[-1].trial_id) or isinstance(event, TrialFinished):
            remaining = progress.estimate_remaining_seconds()
            assert remaining is not None
            assert abs(remaining - seconds_left) <= EVAL_SECONDS * len(trials) + 1e-6
            checked += 1
    assert checked > 8
    assert progress.estimate_remaining_seconds() == pytest.approx(0)


def test_a_resumed_run_counts_what_is_done(tmp_path: object) -> None:
    trials = make_trials(6)
    progress = make_progress(6, [finish_trial(trial) for trial in trials[:4]], ranks=[1, 8])
    full_seconds = 20 * STEP_SECONDS + EVAL_SECONDS
    assert progress.estimate_remaining_seconds() == pytest.approx(2 * full_seconds)
    progress.record_event(start_trial(trials[4]))
    # from its checkpoint at step 15: its seconds are those of all its steps, this process's and the last one's
    progress.record_event(StepDone(trial_id="t4", step=15, steps=20, loss=3.0, seconds=15 * STEP_SECONDS))
    assert progress.estimate_remaining_seconds() == pytest.approx(5 * STEP_SECONDS + full_seconds, abs=EVAL_SECONDS)
    assert progress.format_progress().startswith("4.8 of about 6.0 trainings · rank 16, ")
