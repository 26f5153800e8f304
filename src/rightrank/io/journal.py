"""The journal: one JSON object a line, appended and flushed to the disk by one writer.

It is the single source of truth of a run. A last line that was cut off (the process was killed while it wrote) is
set aside in a file of its own and said; damage anywhere else is refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from rightrank.errors import RunFolderError
from rightrank.io.files import flush_to_disk
from rightrank.records import JOURNAL_RECORD, SCHEMA_VERSION, JournalRecord

Notice = Callable[[str], None]


class Journal:
    """Append-only records in `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: JournalRecord) -> None:
        """Write one record and wait until the disk has it."""
        line = record.model_dump_json() + "\n"
        new = not self.path.exists()
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        if new:
            flush_to_disk(self.path.parent)

    def read(self, notice: Notice = lambda _: None) -> list[JournalRecord]:
        """All records; a torn last line is set aside first and told to `notice`.

        Raises:
            RunFolderError: a damaged line before the last, or records of a later schema.
        """
        if not self.path.exists():
            return []
        whole = self.path.read_bytes()
        body, torn = _split_torn(whole)
        if torn:
            self._set_aside(body, torn, notice)
        return [self._parse(line, number) for number, line in enumerate(body.splitlines(), start=1)]

    def read_settled(self) -> list[JournalRecord]:
        """All whole records, touching nothing: for who looks on while another process writes.

        Raises:
            RunFolderError: a damaged line, or records of a later schema.
        """
        body, _ = _split_torn(self.path.read_bytes())
        return [self._parse(line, number) for number, line in enumerate(body.splitlines(), start=1)]

    def _parse(self, line: bytes, number: int) -> JournalRecord:
        try:
            return JOURNAL_RECORD.validate_json(line)
        except ValidationError as error:
            problem = error.errors()[0]["msg"]
            raise RunFolderError(
                f"{self.path}:{number}: not a record of schema {SCHEMA_VERSION} ({problem}); "
                "restore the file, or start again in another folder"
            ) from None

    def _set_aside(self, body: bytes, torn: bytes, notice: Notice) -> None:
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.torn-{number}")).exists():
            number += 1
        aside.write_bytes(torn)
        with self.path.open("r+b") as file:
            file.truncate(len(body))
            os.fsync(file.fileno())
        notice(f"{self.path}: the last line was cut off ({len(torn)} bytes) and was set aside in {aside.name}")


def _split_torn(whole: bytes) -> tuple[bytes, bytes]:
    """`(complete lines, what follows the last line end)`."""
    end = whole.rfind(b"\n") + 1
    return whole[:end], whole[end:]
