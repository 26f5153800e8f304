"""Test that a failing figure or view does not end a run.

The adapter is exported, the journal is complete, and one line names the failure.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rightrank.runs.folder import Journal
from rightrank.schema.events import AdapterRecorded, DecisionRecorded
from tests.commands import run

VIEWS = [
    "rightrank.runs.hooks.build_figures",
    "rightrank.runs.hooks.render_model_card",
    "rightrank.runs.hooks.write_figures",
    "rightrank.runs.hooks.build_answers",
    "rightrank.runs.hooks.render_report",
]
FAULTS = [StopIteration(), KeyError("x"), ZeroDivisionError("division by zero"), AttributeError("no such field")]


def make_failing(error: Exception) -> Callable[..., Any]:
    def fail(*_args: Any, **_named: Any) -> Any:
        raise error

    return fail


def break_view(monkeypatch: pytest.MonkeyPatch, view: str, error: Exception) -> None:
    module, _, name = view.rpartition(".")
    monkeypatch.setattr(importlib.import_module(module), name, make_failing(error))


@pytest.fixture(scope="module")
def complete_run(model_folder: Path, completion_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a run whose trainings are finished and that has exported nothing."""
    from rightrank.api.selecting import select_rank
    from tests.tiny import build_small_settings

    out = tmp_path_factory.mktemp("whole") / "run"
    select_rank(str(model_folder), completion_file, out, settings=build_small_settings(device="cpu"))
    shutil.rmtree(out / "adapter")
    journal = out / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    later = ('"type":"adapter_recorded"', '"type":"adapter"', '"type":"decided"', '"type":"test_evaluated"')
    journal.write_text("".join(line for line in lines if not any(kind in line[:60] for kind in later)))
    return out


@pytest.mark.trains
@pytest.mark.parametrize("view", VIEWS)
def test_a_failing_view_keeps_adapter_and_journal(
    view: str,
    complete_run: Path,
    model_folder: Path,
    completion_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    shutil.copytree(complete_run, out)
    arguments = ["select", "--out", str(out), "--quiet"]
    error = FAULTS[VIEWS.index(view) % len(FAULTS)]
    with monkeypatch.context() as patched:
        break_view(patched, view, error)
        status, printed, stderr = run(arguments, capsys)
    kinds = [type(record) for record in Journal(out / "journal.jsonl").read()]
    assert AdapterRecorded in kinds
    assert DecisionRecorded in kinds
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
    assert (status, printed) == (1, ""), stderr
    assert stderr.count("\n") == 1
    assert f"failed ({type(error).__name__}" in stderr
    status, printed, stderr = run(arguments, capsys)
    assert (status, stderr) == (0, "")
    assert "adapter: " in printed
