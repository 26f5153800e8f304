"""Test hooks of users: the order of events, errors, requests to stop, and resumed runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rightrank import Selected, TrialTask, select_rank_with
from rightrank.runs.folder import Journal
from rightrank.runs.run import Hook, Run
from rightrank.schema.errors import InterruptedRun, RunError
from rightrank.schema.events import Event, SelectionPlanned
from rightrank.schema.trials import TrialFinished

RANKS = (1, 4, 16)


def train(task: TrialTask) -> dict[str, float]:
    (task.folder / "weights.txt").write_text("saved")
    return {"loss": 1 + 1 / task.rank}


def select(out: Path, *hooks: Hook) -> Selected:
    return select_rank_with(train, out, ranks=RANKS, learning_rates=(1e-3,), callbacks=hooks)


class RecordingHook(Hook):
    """A hook that records every call."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.events: list[Event] = []

    def on_start(self, run: Run) -> None:
        assert not run.folder.journal.path.exists()
        self.calls.append("start")

    def on_event(self, event: Event) -> None:
        self.calls.append(type(event).__name__)
        self.events.append(event)

    def on_end(self, selected: Selected) -> None:
        assert (selected.run / "adapter" / "weights.txt").exists()
        self.calls.append("end")


class RaisingHook(Hook):
    def __init__(self, num_events: int, error: Exception) -> None:
        self._left, self._error = num_events, error

    def on_event(self, event: Event) -> None:
        if isinstance(event, TrialFinished):
            self._left -= 1
            if self._left == 0:
                raise self._error


def read_finished(out: Path) -> list[int]:
    return [record.rank for record in Journal(out / "journal.jsonl").read() if isinstance(record, TrialFinished)]


def test_events_come_in_the_order_of_the_run(tmp_path: Path) -> None:
    recorder = RecordingHook()
    select(tmp_path / "run", recorder)
    trials = ["TrialStarted", "TrialFinished"] * len(RANKS)
    end = ["AdapterRecorded", "DecisionRecorded", "end"]
    assert recorder.calls == ["start", "RunStarted", "SelectionPlanned", *trials, *end]
    journal = Journal(tmp_path / "run" / "journal.jsonl").read()
    assert journal == [event for event in recorder.events if not isinstance(event, SelectionPlanned)]


@pytest.mark.parametrize("error", [KeyError("x"), StopIteration(), ZeroDivisionError("division by zero")])
def test_a_selection_continues_without_a_hook_that_raises_and_ends_with_its_error(
    tmp_path: Path, error: Exception
) -> None:
    run, recorder = tmp_path / "run", RecordingHook()
    with pytest.raises(
        RunError, match=r"^RaisingHook failed \(.*\); finished trials are kept, and the same call resumes$"
    ):
        select(run, RaisingHook(2, error), recorder)
    assert sorted(read_finished(run)) == [1, 4, 16]
    assert recorder.calls.count("Notice") == 1
    assert recorder.calls[-1] == "end"
    assert select(run).decision == select(tmp_path / "undisturbed").decision


def test_a_hook_stops_the_run_which_resumes(tmp_path: Path) -> None:
    class Stopping(Hook):
        def should_stop(self) -> bool:
            return len(read_finished(run)) == 2

    run, recorder = tmp_path / "run", RecordingHook()
    with pytest.raises(InterruptedRun, match="stopped after 2 trials"):
        select(run, recorder, Stopping())
    assert recorder.calls[-1] == "RunStopped"
    ended = read_finished(run)

    class Resumed(Hook):
        def on_event(self, event: Event) -> None:
            if isinstance(event, SelectionPlanned):
                trials.extend(outcome.rank for outcome in event.outcomes)

    trials: list[int] = []
    resumed: Any = select(run, Resumed())
    assert trials == ended
    assert resumed.decision == select(tmp_path / "whole").decision
