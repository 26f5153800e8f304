"""Files of a run for machines that share no disk: workers leave them in a store, and the run's folder gets what it needs from there."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
