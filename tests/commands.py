"""The command line run in this process, and `rightrank select` with small settings in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from rightrank.cli import cli, main
from rightrank.runs.journal import Journal
from rightrank.schema.trials import TrialFinished
from tests.watch import wait_until

SMALL = [
    "--strategy", "grid", "--ranks", "1,4", "--learning-rates", "1e-2", "--max-steps", "8", "--batch-size", "4",
    "--seq-len", "32", "--eval-items", "12", "--set", "eval_points=2", "--device", "cpu",
]  # fmt: skip

_context = click.Context(cli)
COMMANDS = {name: command for name in cli.list_commands(_context) if (command := cli.get_command(_context, name))}
SELECT = ["select", "model", "data.jsonl", "--out", "run", *SMALL, "--quiet"]


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of one command."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    captured = capsys.readouterr()
    status = ended.value.code
    assert isinstance(status, int)
    return status, captured.out, captured.err


def select_arguments(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    return ["select", str(model), str(data), "--out", str(out), *SMALL, *more]


def values_of(folder: Path) -> dict[str, float]:
    return {
        record.trial_id: record.value
        for record in Journal(folder / "journal.jsonl").read()
        if isinstance(record, TrialFinished)
    }


def start(model: Path, data: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "rightrank", *select_arguments(model, data, out, *more)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def wait_for_trial(out: Path, process: subprocess.Popen[str]) -> None:
    """Until a trained trial has started."""

    def has_started() -> bool:
        assert process.poll() is None, process.communicate()[1]
        journal = out / "journal.jsonl"
        lines = journal.read_text().splitlines() if journal.exists() else []
        return any('"trial_started"' in line and '"rank":0' not in line for line in lines)

    wait_until(has_started, "a trial has started")
