"""The run folder: the paths of a selection's files, and the lock that admits one process."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import yaml
from filelock import FileLock, Timeout

from rightrank.data.files import replacing, sweep_leftovers, write_text
from rightrank.runs.journal import Journal
from rightrank.schema.errors import MissingExtraError, RunError, RunFolderError

PROGRESS_FILE = "progress.json"  # in the run folder while a process works
STORE_SECONDS = 180.0  # for which a run waits for a store that fails
LASTING = (PermissionError, FileNotFoundError, ValueError)  # errors of a store that do not pass
Result = TypeVar("Result")


class RunFolder:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.journal = Journal(path / "journal.jsonl")
        self.config = path / "config.yaml"
        self.decision = path / "decision.json"
        self.report = path / "report.html"
        self.figures = path / "figures"
        self.adapter = path / "adapter"
        self.cache = path / "cache"
        self.store: Store | None = None  # for workers that do not see this folder

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

    def moments(self, trial_id: str) -> Path:
        """Where the moments of a trial's adapter are while it is truncated (`engine.covariances`)."""
        return self.path / "checkpoints" / f"{self._name(trial_id)}.moments.safetensors"

    def other_checkpoint(self, trial_id: str) -> Path:
        """Where the adapter of the checkpoint that is not kept is during the run: the best, or the last."""
        return self.path / "checkpoints" / f"{self._name(trial_id)}.other"

    def trial_adapter(self, trial_id: str) -> Path:
        return self.path / "trials" / self._name(trial_id)

    def finished_adapter(self, trial_id: str) -> Path:
        """The folder of a trial's adapter, downloaded from the store if it is not here.

        Raises:
            RunError: the store does not answer, or the adapter is in neither place.
        """
        adapter = self.trial_adapter(trial_id)
        if adapter.is_dir() or (
            self.store is not None and self.store.get(adapter.relative_to(self.path).as_posix(), adapter)
        ):
            return adapter
        where = f"nor in the store {self.store.address}" if self.store is not None else "and no store was given"
        raise RunError(f"{adapter}: the trial's adapter is missing, {where}; give the store that the run started with")

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
            known = {".lock", "base_model", "progress.json"}
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

    def write_config(self, values: dict[str, Any]) -> None:
        write_text(self.config, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))

    def write_decision(self, document: Mapping[str, Any]) -> None:
        write_text(self.decision, json.dumps(document, indent=2, allow_nan=False) + "\n")

    def drop_working_files(self) -> None:
        """Remove the files that only a running selection needs."""
        shutil.rmtree(self.cache, ignore_errors=True)
        shutil.rmtree(self.path / "checkpoints", ignore_errors=True)
        if self.store is not None:
            self.store.remove("checkpoints")


def run_store(address: str, fingerprint: str) -> Store:
    """The store of one run; several runs may use one address. It is waited for when it fails for a while."""
    return Store(f"{address.rstrip('/')}/{fingerprint}", STORE_SECONDS)


class Store:
    """Files and folders below the address. Names are relative, with slashes.

    Raises:
        MissingExtraError: the package for this kind of address is not installed.
        RunError: from every method, if the store fails, and has done so for `patience` seconds.
    """

    def __init__(self, address: str, patience: float = 0.0) -> None:
        from fsspec.core import url_to_fs

        self.address = address
        self._patience = patience
        try:
            with self._reporting_errors("open"):
                self._files, self._root = url_to_fs(address, use_listings_cache=False)  # other machines write to it
        except ImportError as error:
            raise MissingExtraError(
                f"store {address}: {error} (for s3: pip install 'rightrank[store]'), on every machine"
            ) from None

    def put(self, path: Path, name: str) -> None:
        """Upload a file, or the files of a folder."""
        files = [(path, name)] if path.is_file() else [(file, f"{name}/{file.name}") for file in path.iterdir()]
        for file, its_name in files:
            self._patiently(f"write {name} to", partial(self._put_file, file, its_name))

    def _put_file(self, file: Path, name: str) -> None:
        self._files.makedirs(self._at(name).rpartition("/")[0], exist_ok=True)
        self._files.put_file(str(file), self._at(name))

    def get(self, name: str, path: Path) -> bool:
        """Download a file, or the files of a folder, to `path`; False if there is none, or another run removes it meanwhile."""
        return self._patiently(f"read {name} from", partial(self._get, name, path))

    def _get(self, name: str, path: Path) -> bool:
        if self._files.isfile(self._at(name)):
            found = {self._at(name): path}
        else:
            found = {file: path / Path(file).name for file in self._files.find(self._at(name))}
        try:
            for file, target in found.items():
                with replacing(target) as temporary:
                    self._files.get_file(file, str(temporary))
        except FileNotFoundError:
            return False
        return bool(found)

    def remove(self, name: str) -> None:
        """Remove a file or a folder if it exists."""
        self._patiently(f"remove {name} from", partial(self._remove, name))

    def _remove(self, name: str) -> None:
        with suppress(FileNotFoundError):  # another run with this store was faster
            if self._files.exists(self._at(name)):
                self._files.rm(self._at(name), recursive=True)

    def _patiently(self, what: str, action: Callable[[], Result]) -> Result:
        """Do it, and again while the store fails in a way that may pass."""
        until, wait = time.monotonic() + self._patience, 0.5
        while True:
            with self._reporting_errors(what):
                try:
                    return action()
                except _store_errors() as error:
                    if isinstance(error, LASTING) or time.monotonic() + wait > until:
                        raise
            time.sleep(wait)
            wait = min(2 * wait, 10.0)

    def _at(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    @contextmanager
    def _reporting_errors(self, what: str) -> Iterator[None]:
        """Report an error of the file system as a `RunError` of one line."""
        try:
            yield
        except _store_errors() as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise RunError(f"can't {what} the store {self.address}: {reason}") from error


def _store_errors() -> tuple[type[Exception], ...]:
    """What stores raise: OSError as fsspec requires, ValueError for addresses, and the errors of the S3 client if loaded."""
    client = sys.modules.get("botocore.exceptions")
    of_client = () if client is None else (client.BotoCoreError, client.ClientError)
    return OSError, ValueError, RuntimeError, *of_client
