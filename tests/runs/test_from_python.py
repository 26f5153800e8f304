"""Test selections that are called from a script or a notebook: progress, Ctrl-C, and a short result."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rightrank.api.selecting import select_rank
from rightrank.runs.journal import Journal
from rightrank.schema.events import Event, StepDone
from rightrank.schema.trials import TrialFinished, TrialStarted
from tests.tiny import build_small_settings
from tests.watch import Watch


def test_progress_and_a_result_on_one_screen(
    model_folder: Path, completion_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events: list[str] = []
    selected = select_rank(
        str(model_folder),
        completion_file,
        tmp_path / "run",
        settings=build_small_settings(max_steps=2),
        callbacks=[Watch(notice=events.append)],
        progress=True,
    )
    captured = capsys.readouterr()
    assert "base model" in captured.err
    assert all(line in captured.err for line in events)  # both the user's observer and the view receive the lines
    assert captured.out == ""
    lines = str(selected).splitlines()
    assert len(lines) <= 10
    assert max(map(len, lines)) < 400
    assert lines[-1].endswith("report.html")


@pytest.fixture
def default_interrupt() -> Iterator[None]:
    """Install Python's handler of Ctrl-C, which a process in the background lacks."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("default_interrupt")
def test_ctrl_c_ends_the_step_writes_a_checkpoint_and_the_same_call_resumes(
    model_folder: Path, completion_file: Path, tmp_path: Path
) -> None:
    steps: list[int] = []

    def interrupt(event: Event) -> None:
        if isinstance(event, StepDone):
            steps.append(event.step)
            if len(steps) == 3:
                signal.raise_signal(signal.SIGINT)

    settings = build_small_settings(max_steps=6, ranks=(1, 2), adapters_per_pass=1)
    arguments: Any = (str(model_folder), completion_file, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt, match="the same call resumes the run"):
        select_rank(*arguments, settings=settings, callbacks=[Watch(on_event=interrupt)])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert list((tmp_path / "run").rglob("*checkpoint*"))
    later: list[int] = []
    watching = Watch(on_event=lambda event: later.append(event.step) if isinstance(event, StepDone) else None)
    select_rank(*arguments, settings=settings, callbacks=[watching])
    assert later[0] == 4  # not step 1
    uninterrupted = select_rank(str(model_folder), completion_file, tmp_path / "whole", settings=settings)
    assert values(tmp_path / "run") == values(uninterrupted.run)


def values(run: Path) -> dict[int, float]:
    records = Journal(run / "journal.jsonl").read()
    assert any(isinstance(record, TrialStarted) for record in records)
    return {
        outcome.rank: outcome.value
        for outcome in records
        if isinstance(outcome, TrialFinished) and outcome.arm.is_direct
    }
