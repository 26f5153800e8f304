"""The progress of a running selection: what has ended, what runs, and the time left.

Trials that share a forward pass each count an equal share of its time. The shares add up to the wall time, so the sum
over the remaining work is the time left, however many adapters train per pass.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from rightrank.records import (
    ArmFields,
    Preparing,
    RunEvent,
    RunStarted,
    StepDone,
    TrialCollapsed,
    TrialDiverged,
    TrialFailed,
    TrialFinished,
    TrialLook,
    TrialOutcome,
    TrialStarted,
)
from rightrank.report.format import duration, size


class Progress:
    """Follows a selection from its events and reports where it is, as text and in seconds."""

    def __init__(self) -> None:
        self._arms = 1
        self._expected: float | None = None  # whole trainings; None: counted in trials
        self._whole_steps = 0  # of a whole training; 0: a custom trainer's own number
        self._spent = 0.0  # whole trainings that have ended
        self._ends_at: dict[str, int] = {}  # the last step of each trial that has ended
        self._ended = 0
        self._running: dict[str, TrialStarted] = {}
        self._started_at: dict[str, float] = {}
        self._steps: dict[str, StepDone] = {}  # the last step of each trial
        self._looks: dict[str, TrialLook] = {}  # the last look of each trial of a custom trainer
        self._totals: dict[str, float] = {}  # seconds of each ended trial, including the one that it continued
        self._costs: list[float] = []  # seconds of each training alone
        self._preparing: Preparing | None = None
        self._higher_is_better = False
        self._best: dict[int, float] = {}
        self._truncated: dict[int, float] = {}
        self._peak_bytes = 0

    def plan(self, started: RunStarted, arms: int, steps: int = 0) -> None:
        self._arms = arms
        self._whole_steps = steps
        self._higher_is_better = started.higher_is_better

    def expect(self, trainings: float) -> None:
        """Count in whole trainings, of which so many are expected."""
        self._expected = trainings

    def resume(self, outcomes: Sequence[TrialOutcome]) -> None:
        """Record the trials that ended before this process began."""
        for outcome in outcomes:
            self._end(outcome)

    def event(self, event: RunEvent) -> str | None:
        """Record the event; return a line for the log if a trial ended."""
        match event:
            case Preparing():
                self._preparing = event
            case TrialStarted():
                self._preparing = None
                self._running[event.trial_id] = event
                self._started_at[event.trial_id] = time.monotonic()
            case StepDone():
                self._steps[event.trial_id] = event
            case TrialFinished():
                return self._line(event, held_out_text(event))
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
        if self._preparing is not None:
            done, of, seconds = self._preparing.items, self._preparing.of_items, self._preparing.seconds
            left = seconds / done * (of - done)
            return f"frozen layers, once for all trials: {done} of {of} examples · about {duration(left)} left"
        parts = [self._position(), *self._at_work()]
        if (remaining := self.remaining_seconds()) is not None:
            parts.append(f"about {duration(remaining)} left")
        return " · ".join(parts)

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
        known = [*self._costs, *(seconds for key in self._running if (seconds := self._whole(key)) is not None)]
        if not known:
            return None
        if self._expected is not None and self._spent > 0:
            return self._remaining_by_cost(self._expected)
        mean = sum(known) / len(known)
        waiting = max(0, self._arms - self._ended - len(self._running))
        return waiting * mean + sum(self._left(key, mean) for key in self._running)

    def _remaining_by_cost(self, expected: float) -> float:
        """The running trials, and the trainings to come at the pace so far, evaluations included."""
        pace = sum(self._costs) / self._spent
        running = sum(self._share(arm) for arm in self._running.values())
        return max(0.0, expected - self._spent - running) * pace + sum(self._left(key, pace) for key in self._running)

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
        """`1.4 of about 3.8 trainings`, or `trial 3 of 9`; the total grows if more runs than expected."""
        if self._expected is not None:
            spent = self._spent_now()
            return f"{spent:.1f} of about {max(self._expected, spent):.1f} trainings"
        first, last = self._ended + 1, self._ended + max(1, len(self._running))
        end = max(self._arms, self._ended + len(self._running))
        return f"trials {first} to {last} of {end}" if last > first else f"trial {min(first, end)} of {end}"

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

    def _whole(self, key: str) -> float | None:
        """Seconds of a running training from its first step to its last, at its pace so far."""
        step, arm = self._steps.get(key), self._running[key]
        if step is None or arm.rank == 0:
            return None
        return max(0.0, step.seconds / step.step * _last_step(arm) - self._before(arm))

    def _left(self, key: str, mean: float) -> float:
        step, arm = self._steps.get(key), self._running[key]
        if arm.rank == 0:
            return 0.0
        if step is None:  # a custom trainer reports no steps
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
        self._ended += 1
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


def held_out_text(trial: TrialFinished) -> str:
    """The value, its metric if another one decides, and for the base the time of its generated answers."""
    text = f"held-out {trial.value:.4f}" + (f" ({trial.value_metric})" if trial.value_metric else "")
    if trial.rank == 0 and trial.answer_seconds >= 1:
        text += f"; generating answers took {duration(trial.answer_seconds)}, and takes as long after each training"
    return text
