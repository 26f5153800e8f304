"""Test the journal with torn lines, flipped bits, full disks and network disks: damage is reported and records are kept."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from rightrank.data import files
from rightrank.runs.journal import Journal, RepairResult, parse_line, seal
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


def test_each_line_is_plain_json(tmp_path: Path) -> None:
    lines = write_journal(tmp_path / "journal.jsonl").path.read_text(encoding="utf-8").splitlines()
    read = [json.loads(line) for line in lines]
    assert [line["type"] for line in read] == ["run_started", "trial_started", "trial_failed"]
    assert {line["schema_version"] for line in read} == {SCHEMA_VERSION}
    for line, text in zip(read, lines, strict=True):
        assert text[: line["len"]].endswith(f'"trial_id":"{"0" * 12}"') or line["type"] != "trial_started"
        assert len(line["crc"]) == 8
    assert Journal(tmp_path / "journal.jsonl").read() == make_records()


def test_a_journal_cut_at_any_byte_keeps_complete_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # waiting for the disk would only make the test slow
    content = b"".join(seal_record(record) for record in make_records())
    ends = [position for position, byte in enumerate(content) if byte == ord("\n")]
    for length in range(len(content) + 1):
        journal = Journal(tmp_path / f"{length}.jsonl")
        journal.path.write_bytes(content[:length])
        notices: list[str] = []
        kept_records = journal.read(notices.append)
        complete = sum(end <= length for end in ends)  # a record without its line end is complete
        assert kept_records == make_records()[:complete], length
        aside = journal.path.with_name(f"{length}.jsonl.torn-1")
        remaining = journal.path.read_bytes()
        if aside.exists():
            assert remaining + aside.read_bytes() == content[:length]
            assert len(notices) == 1
            assert "the last line was incomplete" in notices[0]
        else:
            assert remaining == content[: ends[complete - 1] + 1 if complete else 0]
            assert notices == []
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


def test_a_damaged_start_is_refused_and_nothing_is_touched(tmp_path: Path) -> None:
    journal = write_journal(tmp_path / "journal.jsonl")
    damaged = bytearray(journal.path.read_bytes())
    damaged[10] ^= 1
    journal.path.write_bytes(bytes(damaged))
    with pytest.raises(RunFolderError, match=r"the first line, the run's start, is damaged.*the other 2 records"):
        journal.repair()
    assert journal.path.read_bytes() == bytes(damaged)


@pytest.mark.parametrize("schema", [SCHEMA_VERSION - 1, SCHEMA_VERSION + 1])
def test_another_schema_is_refused_with_both_numbers(schema: int, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append(make_records()[1].model_copy(update={"schema_version": schema}))
    with pytest.raises(RunFolderError, match=f"1: schema {schema}, but this version reads {SCHEMA_VERSION}"):
        journal.read()


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


def test_a_line_ends_with_its_length_and_checksum() -> None:
    assert seal(b'{"a":1}') == b'{"a":1,"len":6,"crc":"a702fc6e"}'  # crc32 of {"a":1
    assert seal_record(make_records()[1]) == WHOLE + b"\n"
    assert parse_line(WHOLE) == make_records()[1]


def test_a_missing_journal_is_empty(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    assert journal.read() == []
    assert not journal.path.exists()


def test_each_torn_end_is_saved_to_its_own_file(tmp_path: Path) -> None:
    journal = write_journal(tmp_path / "journal.jsonl")
    notices: list[str] = []
    for half in (b'{"type":"tri', b'{"t', b"\x00\x00"):
        with journal.path.open("ab") as file:
            file.write(half)
        assert journal.read(notices.append) == make_records()
    asides = [tmp_path / f"journal.jsonl.torn-{number}" for number in (1, 2, 3)]
    assert [aside.read_bytes() for aside in asides] == [b'{"type":"tri', b'{"t', b"\x00\x00"]
    assert notices[1] == f"{journal.path}: the last line was incomplete (3 bytes) and was moved to {asides[1].name}"
    assert journal.path.read_bytes() == b"".join(seal_record(record) for record in make_records())


def test_a_reader_gets_complete_records_and_changes_nothing(tmp_path: Path) -> None:
    journal = write_journal(tmp_path / "journal.jsonl")
    for unfinished_line in (b'{"type":"tri', WHOLE):  # a writer has not finished a line
        content = journal.path.read_bytes() + unfinished_line
        journal.path.write_bytes(content)
        assert journal.read_complete_lines() == make_records()
        assert journal.path.read_bytes() == content
        assert [path.name for path in tmp_path.iterdir()] == ["journal.jsonl"]
        journal.path.write_bytes(content[: -len(unfinished_line)])
    journal.path.write_bytes(b"nothing of ours\n" + journal.path.read_bytes())
    with pytest.raises(
        RunFolderError,
        match=r"journal\.jsonl:1: damaged: the length and the checksum at its end are missing; 3 of 4 records are undamaged",
    ):
        journal.read_complete_lines()


def test_the_first_of_several_damaged_lines_is_reported_and_all_are_moved(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    lines = [seal_record(record) for record in make_records()]
    damaged = [lines[1].replace(b"0000", b"0100", 1), b"x\n", lines[2][:-9]]
    journal.path.write_bytes(lines[0] + damaged[0] + lines[1] + damaged[1] + lines[2] + damaged[2])
    with pytest.raises(RunFolderError, match=r":2: damaged: its checksum does not match and 1 more; 3 of 5 records"):
        journal.read_complete_lines()
    aside = tmp_path / "journal.jsonl.torn-1"
    assert journal.repair() == RepairResult(num_intact=3, num_damaged=3, damaged_file=aside)
    assert aside.read_bytes() == b"".join(damaged) + b"\n"
    assert journal.path.read_bytes() == b"".join(lines)
    assert journal.repair() == RepairResult(num_intact=3, num_damaged=0, damaged_file=None)


def test_a_last_record_that_lacks_its_line_end_is_kept_by_a_repair_too(tmp_path: Path) -> None:
    journal = write_journal(tmp_path / "journal.jsonl")
    content = journal.path.read_bytes()
    first, later_lines = content.split(b"\n", 1)
    journal.path.write_bytes(first + b"\nx\n" + later_lines[:-1])
    repaired = journal.repair()
    assert (repaired.num_intact, repaired.num_damaged) == (3, 1)
    assert journal.path.read_bytes() == content


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


def test_partial_writes_give_a_complete_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, chunk: real(descriptor, chunk[:5]))
    assert write_journal(tmp_path / "journal.jsonl").read() == make_records()


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
