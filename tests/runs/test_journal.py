"""Test the journal with torn lines, flipped bits, full disks and network disks: damage is reported and records are kept."""

from __future__ import annotations

import errno
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from rightrank.data import files
from rightrank.runs.folder import Journal, parse_line, seal
from rightrank.schema.errors import RunFolderError
from rightrank.schema.events import DataSummary, JournalRecord, RunStarted
from rightrank.schema.trials import SCHEMA_VERSION, Arm, TrialFailed, TrialStarted

ARM = Arm(rank=4, learning_rate=1e-3, lora_alpha=32.0, seed=0, steps=10)


def make_run_start() -> RunStarted:
    data = DataSummary(form="text", splits={}, splits_given=False, duplicates_across_splits=0)
    return RunStarted(
        rightrank_version="1",
        fingerprint="f" * 64,
        settings={"model": "m", "data": 'quoted "schema_version":9 text'},
        environment={},
        data=data,
        evaluation_examples=["a", "b"],
        metric="loss",
        higher_is_better=False,
        started_at="2026-01-01T00:00:00+00:00",
    )


def make_records() -> list[JournalRecord]:
    begun = TrialStarted(trial_id="0" * 12, **ARM.model_dump())
    failed = TrialFailed(trial_id="0" * 12, **ARM.model_dump(), error="error", reason="naïve — “quoted”\n\x7f")
    return [make_run_start(), begun, failed]


def seal_record(record: JournalRecord) -> bytes:
    return seal(record.model_dump_json().encode()) + b"\n"


def write_journal(path: Path) -> Journal:
    journal = Journal(path)
    for record in make_records():
        journal.append(record)
    return journal


def test_a_journal_cut_at_any_byte_keeps_complete_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # waiting for the disk would only make the test slow
    content = b"".join(seal_record(record) for record in make_records())
    ends = [position for position, byte in enumerate(content) if byte == ord("\n")]
    for length in range(len(content) + 1):
        journal = Journal(tmp_path / f"{length}.jsonl")
        journal.path.write_bytes(content[:length])
        notices: list[str] = []
        complete = sum(end < length for end in ends)
        assert journal.read_complete_lines() == make_records()[:complete], length
        assert journal.path.read_bytes() == content[:length]
        assert journal.read(notices.append) == make_records()[:complete], length
        assert journal.path.read_bytes() == content[: ends[complete - 1] + 1 if complete else 0]
        assert ["the last line was damaged" in notice for notice in notices] == [True] * (
            length > (ends[complete - 1] + 1 if complete else 0)
        )
        journal.append(make_records()[-1])
        assert len(journal.read()) == complete + 1


def test_each_flipped_bit_of_a_line_is_detected(tmp_path: Path) -> None:
    """Flip every bit of every line, including its end, and require that no record is read from it."""
    for record in make_records():
        line = seal_record(record)
        for position in range(len(line)):
            for bit in range(8):
                flipped = bytearray(line)
                flipped[position] ^= 1 << bit
                lines = bytes(flipped).split(b"\n")
                parsed = [parse_line(chunk) for chunk in lines if chunk]
                assert any(isinstance(result, str) for result in parsed), (position, bit)
                assert not any(result == record for result in parsed), (position, bit)


@pytest.mark.parametrize("damage", [b"x\n", b"\x00" * 512, b"\x00\n", b'{"type":"tri'])
def test_a_damaged_line_is_dropped_at_the_end_and_named_elsewhere(damage: bytes, tmp_path: Path) -> None:
    lines = [seal_record(record) for record in make_records()]
    journal, notices = Journal(tmp_path / "journal.jsonl"), list[str]()
    journal.path.write_bytes(b"".join(lines) + damage)
    assert journal.read(notices.append) == make_records()
    assert notices == [f"{journal.path}: the last line was damaged ({len(damage)} bytes) and was dropped"]
    assert journal.path.read_bytes() == b"".join(lines)
    for number in range(3):
        content = b"".join([*lines[:number], damage.removesuffix(b"\n") + b"\n", *lines[number:]])
        journal.path.write_bytes(content)
        advice = "delete this line" if number else "restore the file"
        with pytest.raises(RunFolderError, match=rf"journal\.jsonl:{number + 1}: damaged: .*; {advice}"):
            journal.read()
        assert journal.path.read_bytes() == content


def test_a_file_of_another_program_is_refused_and_not_touched(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    for content in (b"nothing of ours\n", b'{"a": 1}', b"\n"):
        journal.path.write_bytes(content)
        with pytest.raises(RunFolderError, match=r"journal\.jsonl:1: damaged: .*give another --out"):
            journal.read()
        assert journal.path.read_bytes() == content


@pytest.mark.parametrize("schema", [SCHEMA_VERSION - 1, SCHEMA_VERSION + 1])
def test_another_schema_is_refused_with_both_numbers(schema: int, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append(make_records()[1].model_copy(update={"schema_version": schema}))
    with pytest.raises(RunFolderError, match=f"1: schema {schema}, but this version reads {SCHEMA_VERSION}"):
        journal.read()


def test_a_field_that_no_longer_exists_is_ignored() -> None:
    record = make_records()[0]
    body = record.model_dump_json().replace('"data":{', '"data":{"renamed":{},').encode()
    assert parse_line(seal(body)) == record


BODY = make_records()[1].model_dump_json().encode()[:-1]
WHOLE = seal(BODY + b"}")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (WHOLE[:5] + WHOLE[6:], f"damaged: it has {len(BODY) - 1} bytes, but {len(BODY)} were written"),
        (b" " + WHOLE, f"damaged: it has {len(BODY) + 1} bytes, but {len(BODY)} were written"),
        (WHOLE.replace(b"0000", b"0010", 1), "damaged: its checksum does not match"),
        (WHOLE + b" ", "damaged: the length and the checksum at its end are missing"),
        (WHOLE.replace(b',"len":', b',"len":0'), "damaged: the length and the checksum at its end are missing"),
        (b"", "damaged: the length and the checksum at its end are missing"),
        (b'{"schema_version":1}', "damaged: the length and the checksum at its end are missing"),
        (seal(b'{"schema_version":1}'), f"not a record of schema {SCHEMA_VERSION} (Unable to extract tag"),
        (seal(b'{"type":"nonsense"}'), f"not a record of schema {SCHEMA_VERSION} (Input tag 'nonsense' found"),
        (seal(b'{"type":"trial_started"}'), f"not a record of schema {SCHEMA_VERSION} (Field required)"),
        (
            seal(BODY.replace(b'sion":%d' % SCHEMA_VERSION, b'sion":12') + b"}"),
            f"schema 12, but this version reads {SCHEMA_VERSION}: use the version",
        ),
    ],
)
def test_an_invalid_line_gives_a_reason(line: bytes, reason: str) -> None:
    parsed = parse_line(line)
    assert isinstance(parsed, str)
    assert parsed.startswith(reason)


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("call", ["write", "fsync"])
def test_an_append_that_fails_leaves_the_journal_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, fault: int
) -> None:
    journal = write_journal(tmp_path / "journal.jsonl")
    content, real = journal.path.read_bytes(), os.write
    calls: list[int] = []

    def fail_to_write(descriptor: int, chunk: bytes | memoryview = b"") -> int:
        calls.append(descriptor)
        if call == "write" and len(calls) == 1:
            return real(descriptor, chunk[:7])  # the last free bytes of the disk
        raise OSError(fault, os.strerror(fault))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, fail_to_write)
        with pytest.raises(OSError, match=re.escape(os.strerror(fault))):
            journal.append(make_records()[2])
    assert journal.path.read_bytes() == content
    journal.append(make_records()[2])
    assert journal.read() == [*make_records(), make_records()[2]]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of one page, if the system allows it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("no small disk can be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fill_disk(journal: Journal) -> None:
    for _ in range(100):
        journal.append(make_records()[2])


def test_a_full_disk_leaves_complete_lines(small_disk: Path) -> None:
    journal = Journal(small_disk / "journal.jsonl")
    with pytest.raises(OSError, match="No space left"):
        fill_disk(journal)
    kept_records = len(journal.read())
    assert kept_records > 3
    assert journal.path.read_bytes().endswith(b"\n")
    subprocess.run(["mount", "-o", "remount,size=64k", str(small_disk)], check=True)
    journal.append(make_records()[2])
    assert len(journal.read()) == kept_records + 1
    assert sorted(path.name for path in small_disk.iterdir()) == ["journal.jsonl"]


def test_an_append_waits_for_the_disk_and_for_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bool] = []
    real = os.fsync

    def record_sync(descriptor: int) -> None:
        synced.append(os.path.isdir(f"/proc/self/fd/{descriptor}"))  # noqa: PTH112
        real(descriptor)

    monkeypatch.setattr(os, "fsync", record_sync)
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append(make_records()[0])
    assert synced == [False, True]  # the file, then the folder that names it
    journal.append(make_records()[1])
    assert synced == [False, True, False]
    assert files.os.fsync is record_sync
