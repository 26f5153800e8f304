"""A store at an fsspec address (`s3://bucket/runs`, `file:///mnt/share`), for machines that share no disk.

Files have the same paths as in the run folder, below the run's fingerprint. The package behind the address finds the
credentials (environment, configuration files, machine role). Addresses with credentials are rejected, so that none
reach a journal, a report or a log.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rightrank.errors import MissingExtraError, RunError
from rightrank.io.files import replacing


def run_store(address: str, fingerprint: str) -> Store:
    """The store of one run; several runs may use one address."""
    return Store(f"{address.rstrip('/')}/{fingerprint}")


class Store:
    """Files and folders below the address. Names are relative, with slashes.

    Raises:
        MissingExtraError: the package for this kind of address is not installed.
        RunError: from every method, if the store fails.
    """

    def __init__(self, address: str) -> None:
        from fsspec.core import url_to_fs

        self.address = address
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
        with self._reporting_errors(f"write {name} to"):
            for file, its_name in files:
                self._files.makedirs(self._at(its_name).rpartition("/")[0], exist_ok=True)
                self._files.put_file(str(file), self._at(its_name))

    def get(self, name: str, path: Path) -> bool:
        """Download a file, or the files of a folder, to `path`; False if there is none."""
        with self._reporting_errors(f"read {name} from"):
            if self._files.isfile(self._at(name)):
                found = {self._at(name): path}
            else:
                found = {file: path / Path(file).name for file in self._files.find(self._at(name))}
            for file, target in found.items():
                with replacing(target) as temporary:
                    self._files.get_file(file, str(temporary))
            return bool(found)

    def remove(self, name: str) -> None:
        """Remove a file or a folder if it exists."""
        with self._reporting_errors(f"remove {name} from"):
            if self._files.exists(self._at(name)):
                self._files.rm(self._at(name), recursive=True)

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
