"""The run folder: its paths, the lock that admits one process, the journal, and the trials of the journal as a pandas DataFrame.

The journal has one JSON object per line, appended by one writer. It is the single source of truth of a run: everything else in the run
folder can be made from it again, except adapters and checkpoints. Its guarantees:

- One process writes, under the lock of the run folder. Others may read at any time (`read_complete_lines`).
- `append` returns when the record is on the disk. A record that can't be written completely leaves no trace.
- A record is never changed. A later record about the same trial overrides an earlier one.
- Each line ends in its length and CRC-32, so that damage is detected.
- A damaged last line, left by a killed process or a power failure, is dropped with a notice. Any other damage is an
  error that names the line.

Only journals of the current `SCHEMA_VERSION` are read: a change of a record's fields increments it.
"""

from __future__ import annotations

import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from pydantic import ValidationError

from rightrank.data.files import flush_to_disk, is_leftover, sweep_leftovers
from rightrank.schema.errors import RunError, RunFolderError
from rightrank.schema.events import JOURNAL_RECORD_ADAPTER, JournalRecord, Records
from rightrank.schema.trials import SCHEMA_VERSION, TrialFinished, TrialOutcome, exclude_longer_trainings

if TYPE_CHECKING:
    from pandas import DataFrame


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
        record = JOURNAL_RECORD_ADAPTER.validate_json(body + b"}", extra="ignore")  # fields of earlier versions
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
        if end < len(content):
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
            record = parse_line(line[:-1]) if line.endswith(b"\n") else f"{DAMAGED}the end of the line is missing"
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


PROGRESS_FILE = "progress.json"  # exists while a process works in the run folder
ALLOWED_ENTRIES = {".lock", "base_model", PROGRESS_FILE}  # allowed in a folder in which no run has begun


class RunFolder:
    """The paths of a run's files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.journal = Journal(path / "journal.jsonl")
        self.config = path / "config.yaml"
        self.decision = path / "decision.json"
        self.report = path / "report.html"
        self.figures = path / "figures"
        self.adapter = path / "adapter"
        self.cache = path / "cache"

    @classmethod
    def open_existing(cls, path: str | Path) -> RunFolder:
        """Return the run folder at `path`.

        Raises:
            RunFolderError: there is no folder, or it holds no journal.
        """
        folder = cls(Path(path))
        if not folder.journal.path.is_file():
            raise RunFolderError(
                f"{path}: no journal.jsonl there; give the run folder of `rightrank select`, such as data-model"
            )
        return folder

    def get_checkpoint_path(self, trial_id: str) -> Path:
        return self.path / "checkpoints" / f"{self._validate_trial_id(trial_id)}.safetensors"

    def get_trial_folder(self, trial_id: str) -> Path:
        return self.path / "trials" / self._validate_trial_id(trial_id)

    def require_trial_adapter(self, trial_id: str) -> Path:
        """Return the folder of a trial's adapter.

        Raises:
            RunError: the folder is missing.
        """
        adapter = self.get_trial_folder(trial_id)
        if not adapter.is_dir():
            raise RunError(f"{adapter}: the adapter of a finished trial is missing; restore it, or give another --out")
        return adapter

    def _validate_trial_id(self, trial_id: str) -> str:
        """Return the trial id if it is safe as a file name; an id from an untrusted journal must not lead out of the folder."""
        if not re.fullmatch(r"[\w-]{1,64}", trial_id, re.ASCII):
            raise RunFolderError(f"{self.journal.path}: trial id {trial_id!r} is not allowed: letters, digits, _ and -")
        return trial_id

    def get_answers_path(self, trial_id: str) -> Path:
        """Return the file of the model's answers to the held-out examples, one JSON object per line."""
        return self.path / "answers" / f"{trial_id}.jsonl"

    def require_usable(self) -> None:
        """Require that a run can begin or continue here. Write nothing.

        Raises:
            RunFolderError: the path is a file, or a folder that holds files but no run.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunFolderError(f"{self.path}: this is a file, not a folder; give an empty or a new folder")
        if not self.path.is_dir() or self.journal.path.exists():
            return
        if any(entry.name not in ALLOWED_ENTRIES and not is_leftover(entry) for entry in self.path.iterdir()):
            raise RunFolderError(
                f"{self.path}: the folder holds files but no journal.jsonl; give an empty or a new folder"
            )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Create the folder, hold its lock, and remove unfinished files of a killed process.

        If the block raises before a run has begun, a folder that was created here is removed again.

        Raises:
            RunFolderError: the folder is not writable, not a run folder, or locked by another process.
        """
        self.require_usable()
        is_new = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock", timeout=0)
            lock.acquire()
        except Timeout:
            raise RunFolderError(
                f"{self.path}: another process is using this folder; wait for it, or give another --out"
            ) from None
        except OSError as error:
            raise RunFolderError(
                f"{self.path}: can't write there ({error.strerror or error}); give a writable --out"
            ) from None
        try:
            self.require_usable()  # checked again, since another process may have held the lock
            sweep_leftovers(self.path)
            (self.path / PROGRESS_FILE).unlink(missing_ok=True)  # of a killed process
            yield
        finally:
            if not self.journal.path.exists():
                shutil.rmtree(self.cache, ignore_errors=True)  # a folder without a run had no cache
                if is_new:
                    with suppress(OSError):  # another program may have written here in the meantime
                        (self.path / ".lock").unlink()
                        self.path.rmdir()
            lock.release()

    def is_in_use(self) -> bool:
        """Check whether another process holds the lock."""
        if not (self.path / ".lock").exists():
            return False
        try:
            with FileLock(self.path / ".lock", timeout=0):
                return False
        except Timeout:
            return True
        except OSError:
            return False  # no process uses a read-only folder


_TRIAL_FIELDS = (
    "train_value", "trainable_parameters", "train_seconds", "train_tokens", "eval_seconds", "peak_bytes", "reason",
)  # fmt: skip


def build_trials_frame(records: Records, examples: bool) -> DataFrame:
    """Return a table with a row for each trial and its metrics, or with a row for each held-out example of each finished trial.

    The column `stage` tells complete trainings and the base model (`whole`) from longer, stopped and truncated trainings, which are
    not compared with them.
    """
    from pandas import DataFrame, concat

    usual_ids = {outcome.trial_id for outcome in exclude_longer_trainings(records.outcomes)}
    stages = {
        outcome.trial_id: outcome.arm.format_stage() or ("whole" if outcome.trial_id in usual_ids else "longer")
        for outcome in records.outcomes
    }
    if not examples:
        return DataFrame([_build_trial_row(outcome, stages[outcome.trial_id]) for outcome in records.outcomes])
    started = records.started  # The example scores of a custom trainer belong to the deciding metric.
    columns = [
        _build_example_columns(
            trial, stages[trial.trial_id], (started.metric,) if started.is_custom_trainer else trial.metrics
        )
        for trial in records.list_finished()
    ]
    frames = [DataFrame(trial_columns) for trial_columns in columns if trial_columns]
    return concat(frames, ignore_index=True) if frames else DataFrame()


def _get_identity(trial: TrialOutcome, stage: str) -> dict[str, Any]:
    arm = {name: getattr(trial, name) for name in ("rank", "learning_rate", "lora_alpha", "seed", "steps")}
    return {"trial_id": trial.trial_id, "stage": stage, **arm}


def _build_trial_row(trial: TrialOutcome, stage: str) -> dict[str, Any]:
    metrics = dict(trial.metrics) if isinstance(trial, TrialFinished) else {}
    recorded_fields = {name: getattr(trial, name) for name in _TRIAL_FIELDS if hasattr(trial, name)}
    return {**_get_identity(trial, stage), "status": trial.type.removeprefix("trial_"), **metrics, **recorded_fields}


def _build_example_columns(trial: TrialFinished, stage: str, metrics: Iterable[str]) -> dict[str, Any]:
    """Return columns with each example's score by each metric, and its weight; empty without example scores."""
    scores = {metric: items for metric in metrics if (items := trial.get_weighted_scores(metric)) is not None}
    if not scores:
        return {}
    columns: dict[str, Any] = {"item": range(len(next(iter(scores.values()))[0]))}
    for metric, (sums, weights) in scores.items():
        columns[metric] = [total / weight if weight else None for total, weight in zip(sums, weights, strict=True)]
    if trial.example_groups is not None:
        columns["group"] = trial.example_groups
    return {**_get_identity(trial, stage), **columns, "tokens": next(iter(scores.values()))[1]}
