"""The run folder: the paths of a selection's files, and the lock that admits one process."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from rightrank.data.files import is_leftover, sweep_leftovers
from rightrank.runs.journal import Journal
from rightrank.schema.errors import RunError, RunFolderError
from rightrank.schema.trials import TrialFinished

PROGRESS_FILE = "progress.json"  # in the run folder while a process works
WITHOUT_A_RUN = {".lock", "base_model", PROGRESS_FILE}  # what may lie in a folder in which no run has begun
EARLIER = re.compile(r"earlier-\d+")  # runs that were moved aside
# Everything that a run and its views write into the folder, and exports of it; the journal is moved last.
WRITTEN = (
    "config.yaml", "decision.json", "report.html", "figures", "adapter", "cache", "trials", "checkpoints", "answers", "exports",
    "workers", "tensorboard", "tracked.json", "journal.jsonl.torn-*", "journal.jsonl",
)  # fmt: skip


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

    def require_usable(self) -> None:
        """Require that a run can begin or continue here; nothing is written.

        Raises:
            RunFolderError: a file, or a folder that holds files but no run.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunFolderError(f"{self.path}: a file and not a folder; give an empty or a new folder")
        if not self.path.is_dir() or self.journal.path.exists():
            return
        own = (entry for entry in self.path.iterdir() if entry.name not in WITHOUT_A_RUN and not is_leftover(entry))
        if any(EARLIER.fullmatch(entry.name) is None for entry in own):
            raise RunFolderError(
                f"{self.path}: the folder holds files but no journal.jsonl; give an empty or a new folder"
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Create the folder, hold its lock, and remove what a killed process left half written.

        Where the block raises before a run has begun, a folder that was created here is removed again.

        Raises:
            RunFolderError: not writable, not a run folder, or locked by another process.
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
            self.require_usable()  # again: another process may have had the lock
            sweep_leftovers(self.path)
            yield
        finally:
            if not self.journal.path.exists():
                self._remove_unbegun(is_new)
            lock.release()

    def _remove_unbegun(self, is_new: bool) -> None:
        """Remove what a process wrote that did not come to begin a run: the cache, and the folder if it is new."""
        shutil.rmtree(self.cache, ignore_errors=True)  # a folder without a run had none before
        if is_new:
            with suppress(OSError):  # another program may have written here meanwhile
                (self.path / ".lock").unlink()
                self.path.rmdir()

    def set_aside(self, patterns: Sequence[str] = WRITTEN) -> Path | None:
        """Move the files of a run into `earlier-N` in this folder, and leave those that no run writes where they are.

        The caller must hold the lock. A symbolic link is moved as a link to the same place.

        Returns:
            The new folder, which is a run folder itself where all files are moved; None where there is nothing to move.
        """
        entries = [entry for pattern in patterns for entry in sorted(self.path.glob(pattern))]
        if not entries:
            return None
        number = 1
        while (aside := self.path / f"earlier-{number}").exists() or aside.is_symlink():
            number += 1
        aside.mkdir()
        for entry in entries:
            if entry.is_symlink():
                (aside / entry.name).symlink_to(entry.parent.resolve() / entry.readlink())
                entry.unlink()
            else:
                entry.rename(aside / entry.name)
        return aside

    def adopt(self, begun: RunFolder) -> None:
        """Move the files of a run that has begun in another folder of this disk here, the journal last."""
        for entry in [*(path for path in begun.path.iterdir() if path != begun.journal.path), begun.journal.path]:
            entry.rename(self.path / entry.name)

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
