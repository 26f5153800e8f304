"""The command line run in this process, and `rightrank select` with small settings in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TypeVar

import click
import pytest

from rightrank.cli import cli, main
from rightrank.runs.folder import Journal
from rightrank.schema.trials import TrialFinished
from tests.watch import GENEROUS_SECONDS, wait_until

Record = TypeVar("Record")
SMALL = [
    "--goal", "training-rank", "--strategy", "grid", "--ranks", "1,4", "--learning-rates", "1e-2", "--max-steps", "8", "--batch-size", "4",
    "--seq-len", "32", "--max-eval-examples", "12", "--set", "num_evaluations=2", "--device", "cpu",
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


def build_select_arguments(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    return ["select", str(model), str(data), "--out", str(out), *SMALL, *more]


def read_journal_records(run: Path, kind: type[Record]) -> list[Record]:
    """Return the records of one type in the journal of a run."""
    return [record for record in Journal(run / "journal.jsonl").read() if isinstance(record, kind)]


def read_trial_values(folder: Path) -> dict[str, float]:
    return {record.trial_id: record.value for record in read_journal_records(folder, TrialFinished)}


@dataclass(frozen=True)
class ChildProcess:
    """A command in a process of its own."""

    process: BaseProcess
    log: Path  # of its stderr

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def end(self) -> tuple[int | None, str]:
        """Exit status and stderr, once it has ended."""
        self.process.join(GENEROUS_SECONDS)
        return self.process.exitcode, self.log.read_text(encoding="utf-8")


def start(model: Path, data: Path, out: Path, *more: str) -> ChildProcess:
    return run_forked(partial(main, build_select_arguments(model, data, out, *more)), out.with_suffix(".log"))


def run_forked(work: Callable[[], object], log: Path) -> ChildProcess:
    """Work in a process that is forked from this one, so that nothing is imported again."""
    process = multiprocessing.get_context("fork").Process(target=_run_in_child, args=(work, log))
    process.start()
    return ChildProcess(process, log)


def _run_in_child(work: Callable[[], object], log: Path) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, "utf-8") for number in (1, 2))
    work()


def wait_for_trial(out: Path, started: ChildProcess) -> None:
    """Until a trained trial has started."""

    def has_started() -> bool:
        assert started.process.exitcode is None, started.end()
        journal = out / "journal.jsonl"
        lines = journal.read_text().splitlines() if journal.exists() else []
        return any('"trial_started"' in line and '"rank":0' not in line for line in lines)

    wait_until(has_started, "a trial has started")
