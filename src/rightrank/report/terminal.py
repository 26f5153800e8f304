"""A running selection in the terminal: live where there is one, plain lines where there is not."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from rightrank.records import (
    Decided,
    Preparing,
    RunEvent,
    RunStarted,
    StepDone,
    TrialDiverged,
    TrialFailed,
    TrialFinished,
    TrialStarted,
)
from rightrank.report.rank_curve import terminal_curve
from rightrank.report.wording import duration, size

CURVE_WIDTH, CURVE_HEIGHT = 72, 14
PLAIN_SECONDS = 15.0  # between progress lines where nothing can be redrawn


class View(Protocol):
    """Something that shows a selection as it goes."""

    def plan(self, started: RunStarted, arms: int, steps: int) -> None: ...
    def event(self, event: RunEvent) -> None: ...
    def notice(self, text: str) -> None: ...
    def __enter__(self) -> View: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Tally:
    """Where a selection is: what has ended, what runs, how long the rest will take."""

    def __init__(self) -> None:
        self._arms = 1
        self._ended = 0
        self._current: TrialStarted | None = None
        self._preparing: Preparing | None = None
        self._step: StepDone | None = None
        self._seconds: list[float] = []  # of each trained arm
        self._begun = time.monotonic()
        self._higher_is_better = False
        self._best: dict[int, float] = {}
        self._peak_bytes = 0

    def plan(self, started: RunStarted, arms: int) -> None:
        self._arms = arms
        self._higher_is_better = started.higher_is_better

    def event(self, event: RunEvent) -> str | None:
        """Take note; a line worth keeping, if the event is worth one."""
        match event:
            case Preparing():
                self._preparing = event
            case TrialStarted():
                self._current, self._step, self._begun = event, None, time.monotonic()
                self._preparing = None
            case StepDone():
                self._step = event
            case TrialFinished():
                return self._end(event, held_out_words(event))
            case TrialDiverged():
                return self._end(event, f"diverged at step {event.step}: {event.reason}")
            case TrialFailed():
                return self._end(event, event.reason)
            case Decided():
                pass
        return None

    def curve(self) -> list[tuple[int, float]]:
        return sorted(self._best.items())

    def progress_line(self) -> str:
        if self._preparing is not None:
            done, of, seconds = self._preparing.items, self._preparing.of_items, self._preparing.seconds
            left = seconds / done * (of - done)
            return f"frozen layers, once for all trials: {done} of {of} items · about {duration(left)} left"
        parts = [f"trial {min(self._ended + 1, self._arms)} of {self._arms}"]
        if self._current is not None:
            parts.append(
                "base model"
                if self._current.rank == 0
                else f"rank {self._current.rank}, learning rate {self._current.learning_rate:g}"
            )
        if self._step is not None:
            parts.append(f"step {self._step.step}/{self._step.steps}, loss {self._step.loss:.3f}")
        remaining = self.remaining_seconds()
        if remaining is not None:
            parts.append(f"about {duration(remaining)} left")
        return " · ".join(parts)

    def remaining_seconds(self) -> float | None:
        """From the mean of the arms so far and the pace of the one that runs; None before the first step."""
        whole = sum(self._seconds) / len(self._seconds) if self._seconds else None
        left_here = 0.0
        if self._step is not None:
            pace = (time.monotonic() - self._begun) / self._step.step
            left_here = pace * (self._step.steps - self._step.step)
            whole = whole or pace * self._step.steps
        if whole is None:
            return None
        waiting = self._arms - self._ended - (1 if self._current is not None else 0)
        return max(0.0, waiting * whole + left_here)

    def _end(self, event: TrialFinished | TrialDiverged | TrialFailed, text: str) -> str:
        self._ended += 1
        seconds = time.monotonic() - self._begun
        if event.rank > 0:
            self._seconds.append(seconds)
        if isinstance(event, TrialFinished):
            self._peak_bytes = max(self._peak_bytes, event.peak_bytes)
        if isinstance(event, TrialFinished) and event.rank > 0 and event.arm.is_direct:
            better = max if self._higher_is_better else min
            self._best[event.rank] = better(event.value, self._best.get(event.rank, event.value))
        self._current = self._step = None
        name = (
            "base model" if event.rank == 0 else f"rank {event.rank:>3}  lr {event.learning_rate:<7g} seed {event.seed}"
        )
        stage = event.arm.stage()
        return f"{name:<32} {text}  ({stage + ', ' if stage else ''}{duration(seconds)})"

    def so_far_line(self) -> str:
        """The best rank so far and the memory it took; empty before there is one."""
        if not self._best:
            return ""
        pick = max if self._higher_is_better else min
        rank = pick(self._best, key=lambda rank: self._best[rank])
        memory = f" · peak memory {size(self._peak_bytes)}" if self._peak_bytes else ""
        return f"best so far: rank {rank} ({self._best[rank]:.4f}){memory}"


class LiveView:
    """Redraws progress and curve in place; finished trials scroll by above."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._tally = Tally()
        self._live = Live(console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> LiveView:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)
        curve = self._curve()
        if curve and error is None:
            self._console.print(Text.from_ansi(curve))

    def plan(self, started: RunStarted, arms: int, steps: int) -> None:
        self._tally.plan(started, arms)
        self.notice(plan_line(started, arms, steps))

    def event(self, event: RunEvent) -> None:
        line = self._tally.event(event)
        if line is not None:
            self._console.print(line, highlight=False)
        lines = [Text.from_ansi(self._curve()), Text(self._tally.so_far_line())]
        self._live.update(Group(*lines, Text(self._tally.progress_line(), style="bold")))

    def notice(self, text: str) -> None:
        self._console.print(text, highlight=False)

    def _curve(self) -> str:
        width = min(CURVE_WIDTH, self._console.width)
        return terminal_curve(self._tally.curve(), width, CURVE_HEIGHT, colour=not self._console.no_color)


class PlainView:
    """One line a finished trial, and a progress line now and then."""

    def __init__(self, console: Console, quiet: bool = False) -> None:
        self._console = console
        self._quiet = quiet
        self._tally = Tally()
        self._said = time.monotonic()

    def __enter__(self) -> PlainView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        curve = terminal_curve(self._tally.curve(), CURVE_WIDTH, CURVE_HEIGHT, colour=False)
        if curve and error is None:
            self.notice(curve)

    def plan(self, started: RunStarted, arms: int, steps: int) -> None:
        self._tally.plan(started, arms)
        self.notice(plan_line(started, arms, steps))

    def event(self, event: RunEvent) -> None:
        line = self._tally.event(event)
        if line is None and time.monotonic() - self._said > PLAIN_SECONDS:
            line = self._tally.progress_line()
        if line is not None:
            self._said = time.monotonic()
            self.notice(line)

    def notice(self, text: str) -> None:
        if not self._quiet:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def held_out_words(trial: TrialFinished) -> str:
    """The value, by which metric where it is not the decision's, and what the base's answers took."""
    words = f"held-out {trial.value:.4f}" + (f" ({trial.value_metric})" if trial.value_metric else "")
    if trial.rank == 0 and trial.answer_seconds >= 1:
        words += (
            f"; of which the model's answers took {duration(trial.answer_seconds)}, as they will after each training"
        )
    return words


def make_view(console: Console, quiet: bool) -> LiveView | PlainView:
    """Live on a terminal; plain lines in a pipe, with `NO_COLOR`, or where nothing is to be said."""
    return LiveView(console) if console.is_terminal and not (quiet or console.no_color) else PlainView(console, quiet)


def plan_line(started: RunStarted, arms: int, steps: int) -> str:
    splits = started.data.splits
    counts = ", ".join(f"{summary.items} {name}" for name, summary in splits.items())
    truncated = sum(summary.truncated for summary in splits.values())
    dropped = sum(summary.dropped for summary in splits.values())
    notes = [f"{truncated} cut to the length limit"] * bool(truncated) + [f"{dropped} dropped, no label left"] * bool(
        dropped
    )
    if started.data.duplicates_across_splits:
        notes.append(f"{started.data.duplicates_across_splits} exact duplicates across splits")
    return (
        f"items: {counts}{' (' + '; '.join(notes) + ')' if notes else ''}; form: {started.data.form}; "
        f"at most {arms} trials of {steps} steps on {started.environment['device']}"
    )
