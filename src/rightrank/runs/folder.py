"""The run folder: the paths of a selection's files, and the lock that admits one process."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from rightrank.data.files import is_leftover, sweep_leftovers
from rightrank.runs.journal import Journal
from rightrank.schema.errors import RunError, RunFolderError
from rightrank.schema.trials import TrialFinished

PROGRESS_FILE = "progress.json"  # exists while a process works in the run folder
ALLOWED_ENTRIES = {".lock", "base_model", PROGRESS_FILE}  # allowed in a folder in which no run has begun


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
    def open_existing(cls, path: str | Path) -> RunFolder:
        """Return the run folder at `path`.

        Raises:
            RunFolderError: there is no folder, or it holds no journal.
        """
        folder = cls(Path(path))
        if not folder.journal.path.is_file():
            raise RunFolderError(
                f"{path}: no journal.jsonl there; give the run folder of `rightrank select`, such as data-model"
            )
        return folder

    def get_checkpoint_path(self, trial_id: str) -> Path:
        return self.path / "checkpoints" / f"{self._validate_trial_id(trial_id)}.safetensors"

    def get_trial_folder(self, trial_id: str) -> Path:
        return self.path / "trials" / self._validate_trial_id(trial_id)

    def find_trial_adapter(self, trial: TrialFinished) -> Path | None:
        """Return the folder of the trial's adapter; None for the base.

        Raises:
            RunError: the folder is missing.
        """
        return None if trial.rank == 0 else self.require_trial_adapter(trial.trial_id)

    def require_trial_adapter(self, trial_id: str) -> Path:
        """Return the folder of a trial's adapter.

        Raises:
            RunError: the folder is missing.
        """
        adapter = self.get_trial_folder(trial_id)
        if not adapter.is_dir():
            raise RunError(f"{adapter}: the adapter of a finished trial is missing; restore it, or give another --out")
        return adapter

    def _validate_trial_id(self, trial_id: str) -> str:
        """Return the trial id if it is safe as a file name; an id from an untrusted journal must not lead out of the folder."""
        if not re.fullmatch(r"[\w-]{1,64}", trial_id, re.ASCII):
            raise RunFolderError(f"{self.journal.path}: trial id {trial_id!r} is not allowed: letters, digits, _ and -")
        return trial_id

    def get_answers_path(self, trial_id: str) -> Path:
        """Return the file of the model's answers to the held-out examples, one JSON object per line."""
        return self.path / "answers" / f"{trial_id}.jsonl"

    def require_usable(self) -> None:
        """Require that a run can begin or continue here. Write nothing.

        Raises:
            RunFolderError: the path is a file, or a folder that holds files but no run.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunFolderError(f"{self.path}: this is a file, not a folder; give an empty or a new folder")
        if not self.path.is_dir() or self.journal.path.exists():
            return
        if any(entry.name not in ALLOWED_ENTRIES and not is_leftover(entry) for entry in self.path.iterdir()):
            raise RunFolderError(
                f"{self.path}: the folder holds files but no journal.jsonl; give an empty or a new folder"
            )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Create the folder, hold its lock, and remove unfinished files of a killed process.

        If the block raises before a run has begun, a folder that was created here is removed again.

        Raises:
            RunFolderError: the folder is not writable, not a run folder, or locked by another process.
        """
        self.require_usable()
        is_new = not self.path.exists()
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
            self.require_usable()  # checked again, since another process may have held the lock
            sweep_leftovers(self.path)
            yield
        finally:
            if not self.journal.path.exists():
                self._clean_up(is_new)
            lock.release()

    def _clean_up(self, is_new: bool) -> None:
        """Remove the files of a process that did not begin a run: the cache, and the folder if it is new."""
        shutil.rmtree(self.cache, ignore_errors=True)  # a folder without a run had no cache
        if is_new:
            with suppress(OSError):  # another program may have written here in the meantime
                (self.path / ".lock").unlink()
                self.path.rmdir()

    def move_aside(self, name: str) -> Path | None:
        """Move a file or a folder of the run into a new folder `earlier-N`, and return that; None if there is nothing to move.

        The caller must hold the lock.
        """
        if not (self.path / name).exists():
            return None
        number = 1
        while (target := self.path / f"earlier-{number}").exists():
            number += 1
        target.mkdir()
        (self.path / name).rename(target / Path(name).name)
        return target

    def is_in_use(self) -> bool:
        """Check whether another process holds the lock."""
        if not (self.path / ".lock").exists():
            return False
        lock = FileLock(self.path / ".lock", timeout=0)
        try:
            with lock:
                return False
        except Timeout:
            return True
        except OSError:
            return False  # no process uses a read-only folder
