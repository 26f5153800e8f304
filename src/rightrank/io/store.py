"""A folder at an fsspec address (`s3://bucket/runs`, `file:///mnt/share`), for machines that mount no common disk.

Files have the paths there that they have in a run folder, below the run's fingerprint. Credentials are found as the
address's own package finds them (environment, configuration files, the machine's role): none are taken in an address,
so none reach a journal, a report or a log.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rightrank.errors import MissingExtraError, RunError
from rightrank.io.files import replacing


def run_store(address: str, fingerprint: str) -> Store:
    """Where the files of one run are; runs share an address."""
    return Store(f"{address.rstrip('/')}/{fingerprint}")


class Store:
    """Files and folders by their name below the address; a name is relative, with slashes.

    Raises:
        MissingExtraError: the package for this kind of address is not installed.
        RunError: from every call, where the store does not answer as it should.
    """

    def __init__(self, address: str) -> None:
        from fsspec.core import url_to_fs

        self.address = address
        try:
            with self._told("open"):
                self._files, self._root = url_to_fs(address, use_listings_cache=False)  # other machines write here too
        except ImportError as error:
            raise MissingExtraError(
                f"store {address}: {error} (for s3: pip install 'rightrank[store]'), on every machine"
            ) from None

    def put(self, path: Path, name: str) -> None:
        """Copy a file there, or the files of a folder."""
        files = [(path, name)] if path.is_file() else [(file, f"{name}/{file.name}") for file in path.iterdir()]
        with self._told(f"write {name} to"):
            for file, its_name in files:
                self._files.makedirs(self._at(its_name).rpartition("/")[0], exist_ok=True)
                self._files.put_file(str(file), self._at(its_name))

    def get(self, name: str, path: Path) -> bool:
        """Copy a file, or the files of a folder, to `path`, each replaced whole; False where there is none."""
        with self._told(f"read {name} from"):
            if self._files.isfile(self._at(name)):
                found = {self._at(name): path}
            else:
                found = {file: path / Path(file).name for file in self._files.find(self._at(name))}
            for file, target in found.items():
                with replacing(target) as temporary:
                    self._files.get_file(file, str(temporary))
            return bool(found)

    def remove(self, name: str) -> None:
        """Remove a file or a folder, if it is there."""
        with self._told(f"remove {name} from"):
            if self._files.exists(self._at(name)):
                self._files.rm(self._at(name), recursive=True)

    def _at(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """What a file system of somebody else's raises, in one line."""
        try:
            yield
        except _faults() as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise RunError(f"can't {what} the store {self.address}: {reason}") from error


def _faults() -> tuple[type[Exception], ...]:
    """What stores raise: OSError by fsspec's own rule, ValueError for addresses, and the errors of the S3 client, which
    says so where it has no credentials or gets no answer; found only where it has been loaded.
    """
    client = sys.modules.get("botocore.exceptions")
    of_client = () if client is None else (client.BotoCoreError, client.ClientError)
    return OSError, ValueError, RuntimeError, *of_client
