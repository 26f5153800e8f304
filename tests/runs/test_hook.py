"""Test hooks of users: the order of events, errors, requests to stop, and resumed runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rightrank import Selected, TrialTask, select_rank_with
from rightrank.runs.hook import AdapterProposal, Hook, SelectionEnd, SelectionStart
from rightrank.runs.journal import Journal
from rightrank.schema.decision import AdapterAnswer
from rightrank.schema.errors import DataError, InterruptedRun, RunError
from rightrank.schema.events import AdapterRecorded, Event, SelectionPlanned
from rightrank.schema.trials import TrialFinished
from tests.commands import read_journal_records

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

    def on_start(self, started: SelectionStart) -> None:
        assert not started.folder.journal.path.exists()
        self.calls.append("start")

    def on_event(self, event: Event) -> None:
        self.calls.append(type(event).__name__)
        self.events.append(event)

    def on_adapter(self, answered: AdapterProposal) -> None:
        self.calls.append("adapter")

    def on_end(self, end: SelectionEnd) -> None:
        assert (end.folder.adapter / "weights.txt").exists()
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
    end = ["adapter", "AdapterRecorded", "DecisionRecorded", "end"]
    assert recorder.calls == ["start", "RunStarted", "SelectionPlanned", *trials, *end]
    journal = Journal(tmp_path / "run" / "journal.jsonl").read()
    assert journal == [event for event in recorder.events if not isinstance(event, SelectionPlanned)]


@pytest.mark.parametrize("error", [KeyError("x"), StopIteration(), ZeroDivisionError("division by zero")])
def test_a_hook_that_raises_ends_the_run_and_loses_nothing(tmp_path: Path, error: Exception) -> None:
    run = tmp_path / "run"
    with pytest.raises(
        RunError, match=r"^RaisingHook failed \(.*\); finished trials are kept, and the same call resumes$"
    ):
        select(run, RaisingHook(2, error))
    assert len(read_finished(run)) == 2
    select(run)
    assert sorted(read_finished(run)) == [1, 4, 16]


def test_an_optional_hook_that_fails_is_skipped(tmp_path: Path) -> None:
    run, hook = tmp_path / "run", RaisingHook(1, KeyError("x"))
    hook.is_required = False
    with pytest.raises(RunError, match=r"^RaisingHook failed \(KeyError: 'x'\)"):
        select(run, hook)
    assert sorted(read_finished(run)) == [1, 4, 16]
    assert (run / "adapter" / "weights.txt").exists()
    assert json.loads((run / "decision.json").read_text())["rank"] == 16


def test_an_input_error_is_raised_unchanged(tmp_path: Path) -> None:
    class Refusing(Hook):
        def on_start(self, started: SelectionStart) -> None:
            raise DataError("not this one")

    with pytest.raises(DataError, match=r"^not this one$"):
        select(tmp_path / "run", Refusing())
    assert not (tmp_path / "run" / "journal.jsonl").exists()


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


def test_the_next_hook_gets_a_changed_answer(tmp_path: Path) -> None:
    class Noting(Hook):
        def __init__(self, note: str) -> None:
            self._note = note

        def on_adapter(self, answered: AdapterProposal) -> AdapterAnswer:
            return answered.answer.model_copy(update={"notes": [*answered.answer.notes, self._note]})

    select(tmp_path / "run", Noting("first"), RecordingHook(), Noting("second"))
    recorded = read_journal_records(tmp_path / "run", AdapterRecorded)
    assert [record.answer.notes for record in recorded] == [["first", "second"]]


def test_hooks_get_immutable_records(tmp_path: Path) -> None:
    """Check that the records are frozen and hold a copy of the journal."""

    class Clearing(Hook):
        def on_start(self, started: SelectionStart) -> None:
            self.started = started
            with pytest.raises(AttributeError):
                started.selection = None  # type: ignore[misc,assignment]

        def on_event(self, event: Event) -> None:
            self.started.records().outcomes.clear()

        def on_adapter(self, answered: AdapterProposal) -> None:
            answered.records.outcomes.clear()

        def on_end(self, end: SelectionEnd) -> None:
            end.records.outcomes.clear()

    assert select(tmp_path / "run", Clearing()).decision == select(tmp_path / "plain").decision
