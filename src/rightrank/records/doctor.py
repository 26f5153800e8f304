"""What `doctor` finds on this machine."""

from __future__ import annotations

from rightrank.records.base import Record, Whole


class DoctorExtra(Record):
    """An optional dependency."""

    extra: str
    needs: list[str]  # distributions
    installed: bool


class DoctorPlace(Record):
    """A folder that a selection writes to or reads models from."""

    purpose: str
    path: str
    writable: bool
    free_bytes: Whole | None  # None: the folder can't be reached


class Doctor(Record):
    """Versions, device, memory, disk, extras and writable places."""

    versions: dict[str, str | None]  # None: not installed
    system: str
    cores: Whole  # that this process may use
    device: str
    device_memory_bytes: Whole | None  # of the accelerator; None without one
    memory_bytes: Whole | None  # of the machine, or of the container's limit
    available_bytes: Whole | None
    extras: list[DoctorExtra]
    places: list[DoctorPlace]
    problems: list[str]  # each with what to do; empty: a selection can run here
