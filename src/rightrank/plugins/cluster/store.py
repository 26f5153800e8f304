"""Files of a run for machines that share no disk: workers leave them in a store, and the run's folder gets what it needs from there."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

from rightrank.data.files import replacing
from rightrank.schema.errors import MissingExtraError, RunError

STORE_SECONDS = 180.0  # for which a run waits for a store that fails
LASTING = (PermissionError, FileNotFoundError, ValueError)  # errors of a store that do not pass
Result = TypeVar("Result")


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

        self.address, self._patience = address, 0.0
        try:  # other machines write to it
            self._files, self._root = self._done("open", lambda: url_to_fs(address, use_listings_cache=False))
        except ImportError as error:
            raise MissingExtraError(
                f"store {address}: {error} (for s3: pip install 'rightrank[store]'), on every machine"
            ) from None
        self._patience = patience

    def put(self, path: Path, name: str) -> None:
        """Upload a file, or the files of a folder."""
        files = {name: path} if path.is_file() else {f"{name}/{file.name}": file for file in path.iterdir()}
        for its_name, file in files.items():
            self._done(f"write {its_name} to", partial(self._put_file, file, self._at(its_name)))

    def _put_file(self, file: Path, place: str) -> None:
        self._files.makedirs(place.rpartition("/")[0], exist_ok=True)
        self._files.put_file(str(file), place)

    def get(self, name: str, path: Path) -> bool:
        """Download a file, or the files of a folder, to `path`; False if there is none, or another run removes it meanwhile."""
        return self._done(f"read {name} from", partial(self._get, self._at(name), path))

    def _get(self, place: str, path: Path) -> bool:
        if self._files.isfile(place):
            targets = {place: path}
        else:
            targets = {file: path / Path(file).name for file in self._files.find(place)}
        try:
            for file, target in targets.items():
                with replacing(target) as temporary:
                    self._files.get_file(file, str(temporary))
        except FileNotFoundError:
            return False
        return bool(targets)

    def remove(self, name: str) -> None:
        """Remove a file or a folder if it exists."""
        self._done(f"remove {name} from", partial(self._remove, self._at(name)))

    def _remove(self, place: str) -> None:
        with suppress(FileNotFoundError):  # another run with this store was faster
            if self._files.exists(place):
                self._files.rm(place, recursive=True)

    def _done(self, what: str, action: Callable[[], Result]) -> Result:
        """Do it, and again while the store fails in a way that may pass; an error of the file system is a `RunError` of one line."""
        until, wait = time.monotonic() + self._patience, 0.5
        while True:
            try:
                return action()
            except _store_errors() as error:
                if isinstance(error, LASTING) or time.monotonic() + wait > until:
                    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                    raise RunError(f"can't {what} the store {self.address}: {reason}") from error
            time.sleep(wait)
            wait = min(2 * wait, 10.0)

    def _at(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"


def _store_errors() -> tuple[type[Exception], ...]:
    """What stores raise: OSError as fsspec requires, ValueError for addresses, and the errors of the S3 client if loaded."""
    client = sys.modules.get("botocore.exceptions")
    of_client = () if client is None else (client.BotoCoreError, client.ClientError)
    return OSError, ValueError, RuntimeError, *of_client
