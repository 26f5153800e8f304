"""What a driver and its workers say to each other: records as lines of JSON, whatever carries them.

No pickle: a worker of another version is told apart by its first words instead of failing on what it reads.
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
    TrialDiverged,
    TrialFailed,
    TrialFinished,
    TrialStarted,
)


class Job(Record):
    """A selection as its workers know it: they prepare the same request and must come to the same identity."""

    name: str
    model: str
    data: str
    settings: dict[str, JsonValue]  # with the ranks that were settled
    folder: Path  # the run folder, which driver and workers share
    fingerprint: str
    known_settings: tuple[str, ...] | None = None  # see `Request`


class Task(Record):
    """Trials for one worker, of one job; as many of them train together as pay."""

    type: Literal["task"] = "task"
    number: int
    job: str
    trials: list[Trial]
    base_loss: float | None


class Group(Record):
    """Where a process belongs that is one of several which are one worker."""

    name: str  # the worker's
    number: int  # of the process; 0 is listened to
    size: int
    host: str  # where they meet
    port: int
    backend: str  # torch.distributed's


class WorkerSetup(Record):
    """The first thing that a worker is told."""

    type: Literal["setup"] = "setup"
    jobs: list[Job]
    working_folder: Path  # what relative paths start from
    share: str  # what all see: the run folder, or a store's address
    probe: str  # a file that the driver has written there
    group: Group | None = None  # None: the process is a worker of its own


class Stop(Record):
    """Leave the task under way at its next step, with checkpoints."""

    type: Literal["stop"] = "stop"


class Ready(Record):
    """The first thing that a worker says."""

    type: Literal["ready"] = "ready"
    versions: dict[str, str]
    token: str | None  # what it read in the probe; None: no such file where it is


class TaskEnded(Record):
    """The worker is free again: every trial of the task has been told of, or it was asked to stop."""

    type: Literal["task_ended"] = "task_ended"
    number: int


class Refused(Record):
    """The worker can't do the job, and no other could: what the user should know."""

    type: Literal["refused"] = "refused"
    reason: str
    exit_status: int


class Notice(Record):
    """Something worth telling a person."""

    type: Literal["notice"] = "notice"
    text: str


class Step(Record):
    """Progress; also the sign that the worker is alive."""

    type: Literal["step"] = "step"
    event: StepDone | Preparing


Command: TypeAlias = Annotated[WorkerSetup | Task | Stop, Field(discriminator="type")]
WorkerMessage: TypeAlias = Annotated[
    Ready | TaskEnded | Refused | Notice | Step | TrialStarted | TrialFinished | TrialDiverged | TrialFailed,
    Field(discriminator="type"),
]
COMMAND: TypeAdapter[Command] = TypeAdapter(Command)
WORKER_MESSAGE: TypeAdapter[WorkerMessage] = TypeAdapter(WorkerMessage)
