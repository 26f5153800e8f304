"""What the driver and a worker send each other, as lines of JSON."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, JsonValue, TypeAdapter

from rightrank.schema.events import Notice, Preparing, StepDone
from rightrank.schema.trials import (
    Record,
    Trial,
    TrialCollapsed,
    TrialDiverged,
    TrialFailed,
    TrialFinished,
    TrialStarted,
)


class Setup(Record):
    """The selection. A worker prepares the same request as the driver and must compute the same fingerprint."""

    type: Literal["setup"] = "setup"
    model: str
    data: str
    settings: dict[str, JsonValue]  # with the ranks that the driver settled
    begun: dict[str, JsonValue] | None = None  # see `Request`
    fingerprint: str
    folder: Path  # the run folder, shared by driver and workers
    working_folder: Path  # relative paths start here
    share: str  # the run folder or the store's address
    probe: str  # name of a file that the driver wrote there


class Task(Record):
    """Trials for one worker, which trains several of them in one pass where that is faster."""

    type: Literal["task"] = "task"
    number: int
    trials: list[Trial]
    base_loss: float | None


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
    """The worker can't run the selection, and no other worker could; `reason` is for the user."""

    type: Literal["refused"] = "refused"
    reason: str
    exit_status: int


class Step(Record):
    """Progress, and the sign that the worker is alive."""

    type: Literal["step"] = "step"
    event: StepDone | Preparing


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker ended without being asked to. The driver's own record: no worker sends it."""

    reason: str
    killed: bool = False  # by SIGKILL, as the system does when memory is short


Outcome: TypeAlias = TrialFinished | TrialCollapsed | TrialDiverged | TrialFailed
Command: TypeAlias = Annotated[Setup | Task | Stop, Field(discriminator="type")]
WorkerMessage: TypeAlias = Annotated[
    Ready | TaskEnded | Refused | Notice | Step | TrialStarted | Outcome, Field(discriminator="type")
]
COMMAND: TypeAdapter[Command] = TypeAdapter(Command)
WORKER_MESSAGE: TypeAdapter[WorkerMessage] = TypeAdapter(WorkerMessage)
