"""The progress of a running selection: what has ended, what runs, and the time left.

Trials that share a forward pass each count an equal share of its time. The shares add up to the wall time, so the sum
over the remaining work is the time left, however many adapters train per pass.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from rightrank.report.format import duration, size
from rightrank.schema.events import Evaluating, Event, Preparing, SelectionPlanned, StepDone, TimeExpected
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


class Progress:
    """Follows a selection from its events and reports where it is, as text and in seconds."""

    def __init__(self) -> None:
        self._expected = 0.0  # whole trainings
        self._first_pace: float | None = None  # seconds of a whole training, before any step of this process
        self._whole_steps = 0  # of a whole training; 0: a custom trainer's own number
        self._spent = 0.0  # whole trainings that have ended
        self._ends_at: dict[str, int] = {}  # the last step of each trial that has ended
        self._running: dict[str, TrialStarted] = {}
        self._started_at: dict[str, float] = {}
        self._steps: dict[str, StepDone] = {}  # the last step of each trial
        self._looks: dict[str, TrialLook] = {}  # the last look of each trial of a custom trainer
        self._totals: dict[str, float] = {}  # seconds of each ended trial, including the one that it continued
        self._costs: list[float] = []  # seconds of each training alone
        self._work: Preparing | Evaluating | None = None  # besides trials
        self._higher_is_better = False
        self._best: dict[int, float] = {}
        self._truncated: dict[int, float] = {}
        self._peak_bytes = 0
        self._top = 0  # the largest rank of the run; 0: unknown

    def _plan(self, planned: SelectionPlanned) -> None:
        settings = planned.started.settings
        self._whole_steps = planned.steps
        self._expected = planned.expected_trainings
        self._higher_is_better = planned.started.higher_is_better
        ranks = settings.get("ranks")
        self._top = max((rank for rank in ranks if isinstance(rank, int)), default=0) if isinstance(ranks, list) else 0

    def _resume(self, outcomes: Sequence[TrialOutcome]) -> None:
        """Record the trials that ended before this process began.

        A run that was continued with a higher rank begins with a training at it, so what was expected is to come.
        """
        for outcome in outcomes:
            self._end(outcome)
        if self._spent > 0 and self._top and not any(one.rank == self._top for one in outcomes):
            self._expected += self._spent

    def event(self, event: Event) -> str | None:
        """Record the event; return a line for the log if a trial ended."""
        match event:
            case SelectionPlanned():
                self._plan(event)
                self._resume(event.outcomes)
            case TimeExpected() if self._expected:
                self._first_pace = event.expected_seconds / self._expected
            case Preparing() | Evaluating():
                self._work = event
            case TrialStarted():
                self._work = None
                self._running[event.trial_id] = event
                self._started_at[event.trial_id] = time.monotonic()
            case StepDone():
                self._steps[event.trial_id] = event
            case TrialFinished():
                return self._line(event, _held_out_text(event))
            case TrialLook():
                self._looks[event.trial_id] = event
            case TrialCollapsed():
                return self._line(event, f"collapsed: {event.reason}")
            case TrialDiverged():
                return self._line(event, f"diverged at step {event.step}: {event.reason}")
            case TrialFailed():
                return self._line(event, event.reason)
        return None

    def curve(self) -> list[tuple[int, float]]:
        """The best trained value of each rank so far."""
        return sorted(self._best.items())

    def truncated(self) -> list[tuple[int, float]]:
        """The best truncation of each rank so far, recovered or not."""
        return sorted(self._truncated.items())

    def progress_line(self) -> str:
        if (work := self._work) is not None:
            left = duration(work.seconds / work.items * (work.of_items - work.items))
            what = work.what if isinstance(work, Evaluating) else "frozen layers, once for all trials"
            return f"{what}: {work.items:,} of {work.of_items:,} examples, about {left} left"
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
        to_come = max(0.0, self._expected - self._spent - sum(map(self._share, self._running.values())))
        return to_come * pace + sum(self._left(key, pace) for key in self._running)

    def _pace(self) -> float | None:
        """Seconds of a whole training with its evaluations: of those that ended, of the one that runs, or expected."""
        if self._costs and self._spent > 0:
            return sum(self._costs) / self._spent
        running = [step.seconds / step.step for step in self._steps.values() if step.step > 0]
        if not running or not self._whole_steps:
            return self._first_pace
        return self._whole_steps * sum(running) / len(running)

    def _share(self, arm: ArmFields) -> float:
        """The whole trainings that an arm adds to those of the one that it resumes."""
        before = self._ends_at.get(arm.continue_from or "", 0)
        return (_last_step(arm) - before) / self._whole_steps if self._whole_steps else float(arm.rank > 0)

    def _spent_now(self) -> float:
        """Whole trainings so far, the running ones in proportion."""
        running = 0.0
        for key, arm in self._running.items():
            step, before = self._steps.get(key), self._ends_at.get(arm.continue_from or "", 0)
            if step is not None and self._whole_steps:
                running += max(0, step.step - before) / self._whole_steps
        return self._spent + running

    def _position(self) -> str:
        """`1.4 of about 3.8 trainings`."""
        spent = self._spent_now()
        if not self._expected:
            return "measuring before the first training"
        if spent > self._expected:
            return f"{spent:.1f} trainings, more than the {self._expected:.1f} expected"
        return f"{spent:.1f} of about {self._expected:.1f} trainings"

    def _at_work(self) -> list[str]:
        running = list(self._running.values())
        if not running:
            return []
        if len(running) == 1:
            arm = running[0]
            named = "base model" if arm.rank == 0 else f"rank {arm.rank}, learning rate {arm.learning_rate:g}"
        else:
            ranks = sorted({arm.rank for arm in running})
            named = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
        steps = [self._steps[arm.trial_id] for arm in running if arm.trial_id in self._steps]
        looks = [self._looks[arm.trial_id] for arm in running if arm.trial_id in self._looks]
        if not steps and looks:
            behind_look = min(looks, key=lambda look: look.step)
            return [named, f"step {behind_look.step}, held-out {behind_look.value:.4g}"]
        if not steps:
            return [named]
        behind = min(steps, key=lambda step: step.step / step.steps)
        return [named, f"step {behind.step}/{behind.steps}, loss {behind.loss:.3f}"]

    def _left(self, key: str, mean: float) -> float:
        """Seconds left of a running training; `mean` is a whole training's, for a custom trainer, which reports no steps."""
        step, arm = self._steps.get(key), self._running[key]
        if arm.rank == 0:
            return 0.0
        if step is None:
            return max(0.0, mean - (time.monotonic() - self._started_at[key]))
        return step.seconds / step.step * max(0, _last_step(arm) - step.step)

    def _before(self, arm: ArmFields) -> float:
        """Seconds of the training that this one continues."""
        return self._totals.get(arm.continue_from or "", 0.0)

    def _end(self, event: TrialOutcome) -> float:
        """Record an outcome; return the seconds of this trial alone."""
        step = self._steps.pop(event.trial_id, None)
        self._looks.pop(event.trial_id, None)
        self._running.pop(event.trial_id, None)
        total = step.seconds if step is not None else 0.0
        if isinstance(event, TrialFinished):
            total = event.train_seconds + event.eval_seconds
            self._peak_bytes = max(self._peak_bytes, event.peak_bytes)
            self._note_value(event)
        self._spent += self._share(event)
        self._ends_at[event.trial_id] = _last_step(event)
        seconds = max(0.0, total - self._before(event))
        self._totals[event.trial_id] = total
        if event.rank > 0 and total > 0:
            self._costs.append(seconds)
        return seconds

    def _note_value(self, event: TrialFinished) -> None:
        if event.rank == 0 or event.stop_at is not None:
            return
        values = self._best if event.arm.is_direct else self._truncated
        better = max if self._higher_is_better else min
        values[event.rank] = better(event.value, values.get(event.rank, event.value))

    def _line(self, event: TrialOutcome, text: str) -> str:
        seconds = self._end(event)
        name = (
            "base model" if event.rank == 0 else f"rank {event.rank:>3}  lr {event.learning_rate:<7g} seed {event.seed}"
        )
        stage = event.arm.stage()
        return f"{name:<32} {text}  ({stage + ', ' if stage else ''}{duration(seconds)})"


def _last_step(arm: ArmFields) -> int:
    return arm.steps if arm.stop_at is None else arm.stop_at


def _held_out_text(trial: TrialFinished) -> str:
    """The value, its metric if another one decides, and for the base the time of its generated answers."""
    text = f"held-out {trial.value:.4f}" + (f" ({trial.value_metric})" if trial.value_metric else "")
    if trial.rank == 0 and trial.answer_seconds >= 1:
        text += f"; generating answers took {duration(trial.answer_seconds)}, and takes as long after each training"
    return text
