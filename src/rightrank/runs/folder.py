"""The run folder: the paths of a selection's files, and the lock that admits one process."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from rightrank.data.files import sweep_leftovers
from rightrank.runs.journal import Journal
from rightrank.schema.errors import RunError, RunFolderError
from rightrank.schema.trials import TrialFinished

PROGRESS_FILE = "progress.json"  # in the run folder while a process works


class RunFolder:
    """The paths of a run's files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.journal = Journal(path / "journal.jsonl")
        self.config = path / "config.yaml"
        self.decision = path / "decision.json"
        self.report = path / "report.html"
        self.figures = path / "figures"
        self.adapter = path / "adapter"
        self.cache = path / "cache"

    @classmethod
    def existing(cls, path: str | Path) -> RunFolder:
        """The run folder at `path`.

        Raises:
            RunFolderError: no folder, or no journal in it.
        """
        folder = cls(Path(path))
        if not folder.journal.path.is_file():
            raise RunFolderError(f"{path}: no journal.jsonl there; give a folder that `rightrank select --out` made")
        return folder

    def checkpoint(self, trial_id: str) -> Path:
        return self.path / "checkpoints" / f"{self._name(trial_id)}.safetensors"

    def trial_adapter(self, trial_id: str) -> Path:
        return self.path / "trials" / self._name(trial_id)

    def adapter_of(self, trial: TrialFinished) -> Path | None:
        """As `finished_adapter`; None for the base."""
        return None if trial.rank == 0 else self.finished_adapter(trial.trial_id)

    def finished_adapter(self, trial_id: str) -> Path:
        """The folder of a trial's adapter.

        Raises:
            RunError: it is not there.
        """
        adapter = self.trial_adapter(trial_id)
        if not adapter.is_dir():
            raise RunError(
                f"{adapter}: the adapter of a trial that has finished is missing; put it back, or give another --out"
            )
        return adapter

    def _name(self, trial_id: str) -> str:
        """The trial id as a file name; an id from an untrusted journal must not lead out of the folder."""
        if not re.fullmatch(r"[\w-]{1,64}", trial_id, re.ASCII):
            raise RunFolderError(f"{self.journal.path}: trial id {trial_id!r} is not allowed: letters, digits, _ and -")
        return trial_id

    def answers(self, trial_id: str) -> Path:
        """The model's answers to the held-out examples, one JSON object per line."""
        return self.path / "answers" / f"{trial_id}.jsonl"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Create the folder, hold its lock, and remove what a killed process left half written.

        Raises:
            RunFolderError: not writable, not a run folder, links out of it, or locked by another process.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock", timeout=0)
            lock.acquire()
        except Timeout:
            raise RunFolderError(
                f"{self.path}: another process is using this folder; wait for it, or give another --out"
            ) from None
        except OSError as error:
            raise RunFolderError(
                f"{self.path}: can't write there ({error.strerror or error}); give a writable --out"
            ) from None
        try:
            known = {".lock", "base_model", PROGRESS_FILE}
            if not self.journal.path.exists() and any(entry.name not in known for entry in self.path.iterdir()):
                raise RunFolderError(
                    f"{self.path}: the folder holds files but no journal.jsonl; give an empty or a new folder"
                )
            sweep_leftovers(self.path)
            yield
        finally:
            lock.release()

    def is_locked(self) -> bool:
        if not (self.path / ".lock").exists():
            return False
        lock = FileLock(self.path / ".lock", timeout=0)
        try:
            with lock:
                return False
        except Timeout:
            return True
        except OSError:
            return False  # a read-only folder: no process uses it
