"""One line of a journal: a record as a JSON object that ends in its own length and checksum.

    {"type":"trial_started", … ,"trial_id":"0a1b…","len":231,"crc":"5d41402a"}

`len` counts the bytes before `,"len":`, and `crc` is their CRC-32 (as in zlib) in hex. Any single flipped bit in the
line is detected.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass

from pydantic import ValidationError

from rightrank.records import JOURNAL_RECORD, SCHEMA_VERSION, JournalRecord

_SEAL = re.compile(rb',"len":(0|[1-9][0-9]*),"crc":"([0-9a-f]{8})"\}\Z')


@dataclass(frozen=True, slots=True)
class Damage:
    """Why a line is not a record; `reason` is printed after `journal.jsonl:5: `."""

    reason: str


def sealed(record: JournalRecord) -> bytes:
    """The record's line, with its line end."""
    return seal(record.model_dump_json().encode()) + b"\n"


def seal(line: bytes) -> bytes:
    """Append length and checksum to a JSON object."""
    body = line[:-1]
    return body + b',"len":%d,"crc":"%08x"}' % (len(body), zlib.crc32(body))


def read_line(line: bytes) -> JournalRecord | Damage:
    """Parse a line without its line end: the record, or what is wrong with the line."""
    found = _SEAL.search(line)
    if found is None:
        return Damage("damaged: it has no length and checksum at its end")
    body, length, checksum = line[: found.start()], int(found[1]), int(found[2], 16)
    if len(body) != length:
        return Damage(f"damaged: {len(body)} bytes where {length} were written")
    if zlib.crc32(body) != checksum:
        return Damage("damaged: its checksum does not match")
    return _parsed(body + b"}")


def split_torn(whole: bytes) -> tuple[bytes, bytes]:
    """Split into `(complete lines, what follows the last line end)`."""
    end = whole.rfind(b"\n") + 1
    return whole[:end], whole[end:]


def _parsed(text: bytes) -> JournalRecord | Damage:
    try:
        record = JOURNAL_RECORD.validate_json(text)
    except ValidationError as error:
        return Damage(f"not a record of schema {SCHEMA_VERSION} ({error.errors()[0]['msg']})")
    if record.schema_version != SCHEMA_VERSION:
        return Damage(
            f"schema {record.schema_version}, and this version reads {SCHEMA_VERSION}: use the version that wrote it"
        )
    return record
