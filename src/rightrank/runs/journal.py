"""The journal of a run: one JSON object per line, appended by one writer.

The journal is the single source of truth of a run: everything else in the run folder can be made from it again, except
adapters and checkpoints. Its guarantees:

- One process writes, under the lock of the run folder. Others may read at any time (`read_complete_lines`).
- `append` returns when the record is on the disk. A record that can't be written completely leaves no trace.
- A record is never changed. A later record about the same trial overrides an earlier one.
- Each line ends in its length and CRC-32, so that damage is detected.
- An incomplete last line, left by a killed process, is moved to `journal.jsonl.torn-N` with a notice. Any other damage
  is an error; `repair` keeps the undamaged records.

Only journals of the current `SCHEMA_VERSION` are read: a change of a record's fields increments it.

    journal = Journal(folder / "journal.jsonl")
    journal.append(started)
    records = journal.read(notice=print)
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from pydantic import ValidationError

from rightrank.data.files import flush_to_disk, replace_file
from rightrank.schema.errors import RunFolderError
from rightrank.schema.events import JOURNAL_RECORD_ADAPTER, JournalRecord, RunStarted
from rightrank.schema.trials import SCHEMA_VERSION

_SEAL = re.compile(rb',"len":(0|[1-9][0-9]*),"crc":"([0-9a-f]{8})"\}\Z')


def seal(line: bytes) -> bytes:
    """Append length and checksum to a JSON object."""
    body = line[:-1]
    return body + b',"len":%d,"crc":"%08x"}' % (len(body), zlib.crc32(body))


def parse_line(line: bytes) -> JournalRecord | str:
    """Parse a line without its line end. Return the record, or a description of the damage, printed after `journal.jsonl:5: `."""
    sealed = _SEAL.search(line)
    if sealed is None:
        return "damaged: the length and the checksum at its end are missing"
    body, length, checksum = line[: sealed.start()], int(sealed[1]), int(sealed[2], 16)
    if len(body) != length:
        return f"damaged: it has {len(body)} bytes, but {length} were written"
    if zlib.crc32(body) != checksum:
        return "damaged: its checksum does not match"
    try:
        record = JOURNAL_RECORD_ADAPTER.validate_json(body + b"}")
    except ValidationError as error:
        return f"not a record of schema {SCHEMA_VERSION} ({error.errors()[0]['msg']})"
    if record.schema_version != SCHEMA_VERSION:
        return f"schema {record.schema_version}, but this version reads {SCHEMA_VERSION}: use the version that wrote it"
    return record


def _split_incomplete(content: bytes) -> tuple[bytes, bytes]:
    """Split into the complete lines and the content after the last line end."""
    end = content.rfind(b"\n") + 1
    return content[:end], content[end:]


Notice = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class RepairResult:
    """The result of a repair."""

    num_intact: int  # intact records
    num_damaged: int  # damaged lines
    damaged_file: Path | None  # the file with the damaged lines; None: nothing was damaged


class Journal:
    """An append-only file of records."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: JournalRecord) -> None:
        """Write one record and wait until it is on the disk.

        Raises:
            OSError: the record can't be written; the file is unchanged.
        """
        is_new = not self.path.exists()
        with self.path.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                remaining = memoryview(seal(record.model_dump_json().encode()) + b"\n")
                while remaining:  # a disk that is almost full accepts some bytes and then raises an error
                    remaining = remaining[os.write(file.fileno(), remaining) :]
                os.fsync(file.fileno())
            except OSError:
                with suppress(OSError):  # the disk has failed; `read` will find the incomplete line
                    file.truncate(end)
                raise
        if is_new:
            flush_to_disk(self.path.parent)

    def read(self, notice: Notice = lambda _: None) -> list[JournalRecord]:
        """Return all records, after moving an incomplete last line to another file with a notice.

        A complete last record without its line end is kept.

        Raises:
            RunFolderError: damaged lines, or records of another schema.
        """
        if not self.path.exists():
            return []
        content = self.path.read_bytes()
        body, incomplete = _split_incomplete(content)
        if incomplete and not isinstance(parse_line(incomplete), str):
            body, incomplete = body + incomplete + b"\n", b""
            self._replace(body)
        elif incomplete:
            target = self._move_aside(incomplete)
            with self.path.open("r+b") as file:
                file.truncate(len(body))
                os.fsync(file.fileno())
            notice(
                f"{self.path}: the last line was incomplete ({len(incomplete)} bytes) and was moved to {target.name}"
            )
        return self._parse_records(body)

    def read_complete_lines(self) -> list[JournalRecord]:
        """Return all complete records without changing the file, for readers while another process writes.

        Raises:
            RunFolderError: damaged lines, or records of another schema.
        """
        body, _ = _split_incomplete(self.path.read_bytes())
        return self._parse_records(body)

    def repair(self) -> RepairResult:
        """Keep the undamaged records and move damaged lines to another file.

        Raises:
            RunFolderError: the first record, the run's start, is damaged, so that nothing can be resumed.
        """
        body, incomplete = _split_incomplete(self.path.read_bytes())
        lines = body.split(b"\n")[:-1] + ([incomplete] if incomplete else [])
        parsed = [(line, parse_line(line)) for line in lines]
        intact = [line for line, record in parsed if not isinstance(record, str)]
        damaged = [line for line, record in parsed if isinstance(record, str)]
        if not damaged:
            return RepairResult(len(intact), 0, None)
        if not isinstance(parsed[0][1], RunStarted):
            raise RunFolderError(
                f"{self.path}: the first line, the run's start, is damaged, and a run can't be resumed without it; "
                f"restore the file, or start again in another folder (the other {len(intact)} records are undamaged and stay)"
            )
        damaged_file = self._move_aside(b"\n".join(damaged) + b"\n")
        self._replace(b"".join(line + b"\n" for line in intact))
        return RepairResult(len(intact), len(damaged), damaged_file)

    def _parse_records(self, body: bytes) -> list[JournalRecord]:
        records: list[JournalRecord] = []
        damaged: list[str] = []
        for number, line in enumerate(
            BytesIO(body), start=1
        ):  # line by line, since a list of all lines would double the memory
            record = parse_line(line[:-1])
            if isinstance(record, str):
                damaged.append(f"{number}: {record}")
            else:
                records.append(record)
        if damaged:
            more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
            raise RunFolderError(
                f"{self.path}:{damaged[0]}{more}; {len(records)} of {number} records are undamaged: "
                f"`rightrank repair {self.path.parent}` keeps those and moves the damaged lines to another file"
            )
        return records

    def _move_aside(self, content: bytes) -> Path:
        number = 1
        while (target := self.path.with_name(f"{self.path.name}.torn-{number}")).exists():
            number += 1
        with replace_file(target) as temporary:
            temporary.write_bytes(content)
        return target

    def _replace(self, body: bytes) -> None:
        with replace_file(self.path) as temporary:
            temporary.write_bytes(body)
