"""The journal of a run: one JSON object per line, appended by one writer.

The journal is the single source of truth of a run: everything else in the run folder can be made from it again, except
adapters and checkpoints. Its guarantees:

- One process writes, under the lock of the run folder. Others may read at any time (`read_complete_lines`).
- `append` returns when the record is on the disk. A record that can't be written completely leaves no trace.
- A record is never changed. A later record about the same trial overrides an earlier one.
- Each line ends in its length and CRC-32, so that damage is detected.
- A damaged last line, left by a killed process or a power failure, is dropped with a notice. Any other damage is an
  error that names the line.

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
from io import BytesIO
from pathlib import Path

from pydantic import ValidationError

from rightrank.data.files import flush_to_disk
from rightrank.schema.errors import RunFolderError
from rightrank.schema.events import JOURNAL_RECORD_ADAPTER, JournalRecord
from rightrank.schema.trials import SCHEMA_VERSION

START = b'{"type":"run_started"'
DAMAGED = "damaged: "
_SEAL = re.compile(rb',"len":(0|[1-9][0-9]*),"crc":"([0-9a-f]{8})"\}\Z')


def seal(line: bytes) -> bytes:
    """Append length and checksum to a JSON object."""
    body = line[:-1]
    return body + b',"len":%d,"crc":"%08x"}' % (len(body), zlib.crc32(body))


def parse_line(line: bytes) -> JournalRecord | str:
    """Parse a line without its line end. Return the record, or a description of the damage, printed after `journal.jsonl:5: `."""
    sealed = _SEAL.search(line)
    if sealed is None:
        return f"{DAMAGED}the length and the checksum at its end are missing"
    body, length, checksum = line[: sealed.start()], int(sealed[1]), int(sealed[2], 16)
    if len(body) != length:
        return f"{DAMAGED}it has {len(body)} bytes, but {length} were written"
    if zlib.crc32(body) != checksum:
        return f"{DAMAGED}its checksum does not match"
    try:
        record = JOURNAL_RECORD_ADAPTER.validate_json(body + b"}")
    except ValidationError as error:
        return f"not a record of schema {SCHEMA_VERSION} ({error.errors()[0]['msg']})"
    if record.schema_version != SCHEMA_VERSION:
        return f"schema {record.schema_version}, but this version reads {SCHEMA_VERSION}: use the version that wrote it"
    return record


Notice = Callable[[str], None]


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
        """Return all records, after dropping a damaged last line with a notice. Only the process with the lock may call this.

        Raises:
            RunFolderError: another line is damaged, or a record has another schema.
        """
        if not self.path.exists():
            return []
        content = self.path.read_bytes()
        records, end = self._parse_records(content)
        if not content[:end].endswith(b"\n") and end:
            with self.path.open("ab") as file:  # the last record is complete and lacks its line end
                file.write(b"\n")
        elif end < len(content):
            with self.path.open("r+b") as file:
                file.truncate(end)
                os.fsync(file.fileno())
            notice(f"{self.path}: the last line was damaged ({len(content) - end} bytes) and was dropped")
        return records

    def read_complete_lines(self) -> list[JournalRecord]:
        """Return all complete records without changing the file, for readers while another process writes.

        Raises:
            RunFolderError: a line other than the last is damaged, or a record has another schema.
        """
        return self._parse_records(self.path.read_bytes())[0]

    def _parse_records(self, content: bytes) -> tuple[list[JournalRecord], int]:
        """Return the records, and the number of bytes before a damaged last line."""
        records: list[JournalRecord] = []
        end = 0
        # Line by line, since a list of all lines would double the memory.
        for number, line in enumerate(BytesIO(content), start=1):
            record = parse_line(line.removesuffix(b"\n"))
            if isinstance(record, str):
                is_last = end + len(line) == len(content)
                if is_last and record.startswith(DAMAGED) and (records or _begins_run(line)):
                    break
                advice = "restore the file, or give another --out"
                if records and record.startswith(DAMAGED):
                    advice = "delete this line, and the same command repeats what it recorded"
                raise RunFolderError(f"{self.path}:{number}: {record}; {advice}")
            records.append(record)
            end += len(line)
        return records, end


def _begins_run(line: bytes) -> bool:
    """Return whether the line may be the first one of a process that was killed, rather than another program's."""
    return line.startswith(START[: len(line)])
