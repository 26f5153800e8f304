"""The protocol between the driver and its workers: each message is one JSON object on one line.

    driver                worker
    WorkerSetup    ->
                   <-     Ready                               or Refused
    Task           ->
                   <-     TrialStarted, Step, ..., an outcome   for each trial, in any order
                   <-     TaskEnded
    Stop           ->                                         at any time
                   <-     TaskEnded                           trials without an outcome have checkpoints

A worker must keep these rules:

- It answers `WorkerSetup` with `Ready`, which states its package versions and the content of the probe file as it
  reads it, and receives no task before that.
- It prepares each `Job` itself. If its fingerprint differs from the driver's, it sends `Refused` and trains nothing.
- An outcome is sent after the trial's adapter and answers are in the run folder or the store, and once only.
- During a task it sends a `Step` at least as often as `hang_seconds` allows; otherwise the driver replaces it.
- Every task ends with exactly one `TaskEnded`, also after `Stop` and after `Refused`.
- When the stream of commands ends, the driver is gone: the worker saves checkpoints and exits.
- Whatever else it prints must not reach this stream.

Messages are JSON and never pickled, so that a worker of another version gets a clear error and no code is loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, JsonValue, TypeAdapter

from rightrank.records import (
    Preparing,
    Record,
    StepDone,
    Trial,
    TrialCollapsed,
    TrialDiverged,
    TrialFailed,
    TrialFinished,
    TrialStarted,
)


class Job(Record):
    """One selection. Workers prepare the same request as the driver and must compute the same fingerprint."""

    name: str
    model: str
    data: str
    settings: dict[str, JsonValue]  # with the ranks that the driver settled
    folder: Path  # the run folder, shared by driver and workers
    fingerprint: str
    begun: dict[str, JsonValue] | None = None  # see `Request`


class Task(Record):
    """Trials of one job for one worker, which trains several of them in one pass where that is faster."""

    type: Literal["task"] = "task"
    number: int
    job: str
    trials: list[Trial]
    base_loss: float | None


class Group(Record):
    """The place of a process in a worker that consists of several processes."""

    name: str  # of the worker
    number: int  # of the process; only process 0 sends messages
    size: int
    host: str  # of the rendezvous store
    port: int
    backend: str  # of torch.distributed


class WorkerSetup(Record):
    type: Literal["orders"] = "orders"
    jobs: list[Job]
    working_folder: Path  # relative paths start here
    share: str  # the run folder or the store's address
    probe: str  # name of a file that the driver wrote there
    group: Group | None = None  # None: the worker is one process


class Stop(Record):
    """Stop the current task at the next step and save checkpoints."""

    type: Literal["stop"] = "stop"


class Ready(Record):
    type: Literal["ready"] = "ready"
    versions: dict[str, str]
    token: str | None  # content of the probe file; None: the worker does not see the file


class TaskEnded(Record):
    """The worker is idle: every trial of the task has an outcome, or the worker was stopped."""

    type: Literal["task_ended"] = "task_ended"
    number: int


class Refused(Record):
    """The worker can't run the job, and no other worker could; `reason` is for the user."""

    type: Literal["refused"] = "refused"
    reason: str
    exit_status: int


class Notice(Record):
    """A line for the user."""

    type: Literal["notice"] = "notice"
    text: str


class Step(Record):
    """Progress, and the sign that the worker is alive."""

    type: Literal["step"] = "step"
    event: StepDone | Preparing


Command: TypeAlias = Annotated[WorkerSetup | Task | Stop, Field(discriminator="type")]
WorkerMessage: TypeAlias = Annotated[
    Ready
    | TaskEnded
    | Refused
    | Notice
    | Step
    | TrialStarted
    | TrialFinished
    | TrialCollapsed
    | TrialDiverged
    | TrialFailed,
    Field(discriminator="type"),
]
COMMAND: TypeAdapter[Command] = TypeAdapter(Command)
WORKER_MESSAGE: TypeAdapter[WorkerMessage] = TypeAdapter(WorkerMessage)
