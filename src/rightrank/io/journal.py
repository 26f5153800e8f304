"""The journal: one JSON object a line, appended and flushed to the disk by one writer.

It is the single source of truth of a run. Each line ends in `,"len":N,"crc":"xxxxxxxx"}`: the bytes of the record
before it, and their CRC-32 (see `io.journal_lines`). A last line that was cut off (the process was killed while it
wrote) is set aside in a file of its own and said; damage anywhere else is refused, and told with what can be saved.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rightrank.errors import RunFolderError
from rightrank.io.files import flush_to_disk, replacing
from rightrank.io.journal_lines import Damage, read_line, sealed, split_torn
from rightrank.records import JournalRecord, RunStarted

Notice = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Repaired:
    """What a repair kept and what it set aside."""

    kept: int
    set_aside: int
    aside: Path | None  # None: nothing was damaged


class Journal:
    """Append-only records in `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: JournalRecord) -> None:
        """Write one record and wait until the disk has it; a record that can't be written whole leaves nothing."""
        new = not self.path.exists()
        with self.path.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                _write_all(file.fileno(), sealed(record))
                os.fsync(file.fileno())
            except OSError:
                with suppress(OSError):  # a disk that is gone; what is half written is found when it is read
                    file.truncate(end)
                raise
        if new:
            flush_to_disk(self.path.parent)

    def read(self, notice: Notice = lambda _: None) -> list[JournalRecord]:
        """All records; a torn last line is set aside first and told to `notice`.

        A last record that is whole but for its line end is kept.

        Raises:
            RunFolderError: damaged lines, or records of a later schema.
        """
        if not self.path.exists():
            return []
        whole = self.path.read_bytes()
        body, torn = split_torn(whole)
        if torn and not isinstance(read_line(torn), Damage):
            body, torn = body + torn + b"\n", b""
            self._replace(body)
        elif torn:
            aside = self._set_aside(torn)
            with self.path.open("r+b") as file:
                file.truncate(len(body))
                os.fsync(file.fileno())
            notice(f"{self.path}: the last line was cut off ({len(torn)} bytes) and was set aside in {aside.name}")
        return self._records(body)

    def read_settled(self) -> list[JournalRecord]:
        """All whole records, touching nothing: for who looks on while another process writes.

        Raises:
            RunFolderError: damaged lines, or records of a later schema.
        """
        body, _ = split_torn(self.path.read_bytes())
        return self._records(body)

    def repair(self) -> Repaired:
        """Keep the whole records, set damaged lines aside in a file of their own.

        Raises:
            RunFolderError: the run's start is among the damaged, so that nothing can be resumed.
        """
        body, torn = split_torn(self.path.read_bytes())
        lines = body.split(b"\n")[:-1] + ([torn] if torn else [])
        read = [read_line(line) for line in lines]
        kept = [line for line, found in zip(lines, read, strict=True) if not isinstance(found, Damage)]
        damaged = [line for line, found in zip(lines, read, strict=True) if isinstance(found, Damage)]
        if not damaged:
            return Repaired(len(kept), 0, None)
        if not isinstance(read[0], RunStarted):
            raise RunFolderError(
                f"{self.path}: the first line, the run's start, is damaged, and no run goes on without it; "
                f"restore the file, or start again in another folder (the other {len(kept)} records are whole and stay)"
            )
        aside = self._set_aside(b"\n".join(damaged) + b"\n")
        self._replace(b"".join(line + b"\n" for line in kept))
        return Repaired(len(kept), len(damaged), aside)

    def _records(self, body: bytes) -> list[JournalRecord]:
        records: list[JournalRecord] = []
        damaged: list[str] = []
        lines = body.split(b"\n")[:-1]
        for number, line in enumerate(lines, start=1):
            found = read_line(line)
            if isinstance(found, Damage):
                damaged.append(f"{number}: {found.reason}")
            else:
                records.append(found)
        if damaged:
            more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
            raise RunFolderError(
                f"{self.path}:{damaged[0]}{more}; {len(records)} of {len(lines)} records are whole: "
                f"`rightrank repair {self.path.parent}` keeps those and sets the damaged aside"
            )
        return records

    def _set_aside(self, part: bytes) -> Path:
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.torn-{number}")).exists():
            number += 1
        with replacing(aside) as temporary:
            temporary.write_bytes(part)
        return aside

    def _replace(self, body: bytes) -> None:
        with replacing(self.path) as temporary:
            temporary.write_bytes(body)


def _write_all(descriptor: int, line: bytes) -> None:
    """One write where the system takes it whole; a disk that fills up takes a part first and then says so."""
    view = memoryview(line)
    while view:
        view = view[os.write(descriptor, view) :]
