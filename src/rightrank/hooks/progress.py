"""The progress of a running selection: what has ended, what runs, and the time left.

Trials that share a forward pass each count an equal share of its time. The shares add up to the wall time, so the sum
over the remaining work is the time left, however many adapters train per pass.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from rightrank.report.evidence_tables import end_text
from rightrank.report.figure import metric_label
from rightrank.report.format import duration, size
from rightrank.schema.events import Evaluating, Event, SelectionPlanned, StepDone, TimeExpected
from rightrank.schema.trials import (
    ArmFields,
    TrialCollapsed,
    TrialDiverged,
    TrialFailed,
    TrialFinished,
    TrialLook,
    TrialOutcome,
    TrialStarted,
)


@dataclass(slots=True)
class _Running:
    """A trial at work."""

    arm: TrialStarted
    since: float  # by the monotonic clock
    step: StepDone | None = None  # the last
    look: TrialLook | None = None  # the last of a custom trainer's


class Progress:
    """Follows a selection from its events and reports where it is, as text and in seconds."""

    def __init__(self) -> None:
        self._expected = 0.0  # whole trainings
        self._first_pace: float | None = None  # seconds of a whole training, before any step of this process
        self._whole_steps = 0  # of a whole training; 0: a custom trainer's own number
        self._spent = 0.0  # whole trainings that have ended
        self._running: dict[str, _Running] = {}
        # Last step, and seconds with those of the trial that it continued.
        self._ended: dict[str, tuple[int, float]] = {}
        self._costs: list[float] = []  # seconds of each training alone
        self._work: Evaluating | None = None  # besides trials
        self._metric, self._higher_is_better = "loss", False
        self._best: dict[int, float] = {}
        self._truncated: dict[int, float] = {}
        self._peak_bytes = 0

    def event(self, event: Event) -> str | None:
        """Record the event; return a line for the log if a trial ended."""
        match event:
            case SelectionPlanned():
                self._plan(event)
            case TimeExpected() if self._expected:
                self._first_pace = event.expected_seconds / self._expected
            case Evaluating():
                self._work = event
            case TrialStarted():
                self._work = None
                self._running[event.trial_id] = _Running(event, time.monotonic())
            case StepDone() if event.trial_id in self._running:
                self._running[event.trial_id].step = event
            case TrialLook() if event.trial_id in self._running:
                self._running[event.trial_id].look = event
            case TrialFinished() | TrialCollapsed() | TrialDiverged() | TrialFailed():
                return self._line(event)
        return None

    def _plan(self, planned: SelectionPlanned) -> None:
        """Record what is to come, and the trials that ended before this process began.

        A run that was continued with a higher rank begins with a training at it, so what was expected is to come.
        """
        self._whole_steps = planned.steps
        self._expected = planned.expected_trainings
        self._metric, self._higher_is_better = planned.started.metric, planned.started.higher_is_better
        for outcome in planned.outcomes:
            self._end(outcome)
        top = max(planned.started.select_settings.ranks)
        if self._spent > 0 and not any(outcome.rank == top for outcome in planned.outcomes):
            self._expected += self._spent

    def curves(self) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
        """The best trained value of each rank so far, and the best truncation."""
        return sorted(self._best.items()), sorted(self._truncated.items())

    def curve_label(self) -> str:
        """Return the name of the values of `curves`, with the better direction."""
        return metric_label(self._metric, self._higher_is_better)

    def progress_line(self) -> str:
        if (work := self._work) is not None:
            left = duration(work.seconds / work.items * (work.of_items - work.items))
            return f"{work.what}: {work.items:,} of {work.of_items:,} examples, about {left} left"
        remaining = self.remaining_seconds()
        time_left = [] if remaining is None else [f"about {duration(remaining)} left"]
        return " · ".join([self._position(), *self._at_work(), *time_left])

    def so_far_line(self) -> str:
        """The best rank so far and the peak memory; empty before the first result."""
        if not self._best:
            return ""
        pick = max if self._higher_is_better else min
        rank = pick(self._best, key=lambda rank: self._best[rank])
        memory = f" · peak memory {size(self._peak_bytes)}" if self._peak_bytes else ""
        return f"best so far: rank {rank} ({self._best[rank]:.4f}){memory}"

    def remaining_seconds(self) -> float | None:
        """Seconds left for the running trials and, at the mean cost, for those to come; None before the first step."""
        pace = self._pace()
        if pace is None:
            return None
        shares = sum(self._share(trial.arm, trial.arm.end) for trial in self._running.values())
        to_come = max(0.0, self._expected - self._spent - shares)
        return to_come * pace + sum(_left(trial, pace) for trial in self._running.values())

    def _pace(self) -> float | None:
        """Seconds of a whole training with its evaluations: of those that ended, of the one that runs, or expected."""
        if self._costs and self._spent > 0:
            return sum(self._costs) / self._spent
        steps = [trial.step for trial in self._running.values() if trial.step is not None and trial.step.step > 0]
        if not steps or not self._whole_steps:
            return self._first_pace
        return self._whole_steps * sum(step.seconds / step.step for step in steps) / len(steps)

    def _share(self, arm: ArmFields, until: int) -> float:
        """The whole trainings that an arm adds up to this step to those of the one that it resumes."""
        before, _ = self._ended.get(arm.continue_from or "", (0, 0.0))
        return max(0, until - before) / self._whole_steps if self._whole_steps else float(arm.rank > 0)

    def _position(self) -> str:
        """`1.4 of about 3.8 trainings`, the running ones in proportion."""
        spent = self._spent
        if self._whole_steps:
            spent += sum(
                self._share(trial.arm, trial.step.step) for trial in self._running.values() if trial.step is not None
            )
        if not self._expected:
            return "measuring before the first training"
        if spent > self._expected:
            return f"{spent:.1f} trainings, more than the {self._expected:.1f} expected"
        return f"{spent:.1f} of about {self._expected:.1f} trainings"

    def _at_work(self) -> list[str]:
        """The arms that run, and the step or the look of the one that is furthest behind."""
        running = list(self._running.values())
        if not running:
            return []
        if len(running) == 1:
            arm = running[0].arm
            named = "base model" if arm.rank == 0 else f"rank {arm.rank}, learning rate {arm.learning_rate:g}"
        else:
            ranks = sorted({trial.arm.rank for trial in running})
            named = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
        if steps := [trial.step for trial in running if trial.step is not None]:
            behind = min(steps, key=lambda step: step.step / step.steps)
            return [named, f"step {behind.step}/{behind.steps}, loss {behind.loss:.3f}"]
        if looks := [trial.look for trial in running if trial.look is not None]:
            look = min(looks, key=lambda look: look.step)
            return [named, f"step {look.step}, held-out {look.value:.4g}"]
        return [named]

    def _end(self, event: TrialOutcome) -> float:
        """Record an outcome; return the seconds of this trial alone."""
        running = self._running.pop(event.trial_id, None)
        total = running.step.seconds if running is not None and running.step is not None else 0.0
        if isinstance(event, TrialFinished):
            total = event.seconds
            self._peak_bytes = max(self._peak_bytes, event.peak_bytes)
            if event.rank > 0 and event.stop_at is None:
                values = self._best if event.arm.is_direct else self._truncated
                better = max if self._higher_is_better else min
                values[event.rank] = better(event.value, values.get(event.rank, event.value))
        self._spent += self._share(event, event.end)
        _, before = self._ended.get(event.continue_from or "", (0, 0.0))
        self._ended[event.trial_id] = event.end, total
        seconds = max(0.0, total - before)
        if event.rank > 0 and total > 0:
            self._costs.append(seconds)
        return seconds

    def _line(self, event: TrialOutcome) -> str:
        if isinstance(event, TrialFinished):
            text = f"held-out {event.value:.4f}" + (f" ({event.value_metric})" if event.value_metric else "")
            if event.rank == 0 and event.answer_seconds >= 1:
                text += (
                    f"; generating answers took {duration(event.answer_seconds)}, and takes as long after each training"
                )
        else:
            text = end_text(event)
        seconds = self._end(event)
        name = (
            "base model" if event.rank == 0 else f"rank {event.rank:>3}  lr {event.learning_rate:<7g} seed {event.seed}"
        )
        stage = event.arm.stage()
        return f"{name:<32} {text}  ({stage + ', ' if stage else ''}{duration(seconds)})"


def _left(running: _Running, pace: float) -> float:
    """Seconds left of a trial; `pace` is a whole training's, for a custom trainer, which reports no steps."""
    if running.arm.rank == 0:
        return 0.0
    if running.step is None:
        return max(0.0, pace - (time.monotonic() - running.since))
    return running.step.seconds / running.step.step * max(0, running.arm.end - running.step.step)
