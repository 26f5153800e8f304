"""Read a file under limits: an error that is not ours, more than 5 seconds or more than 1 GiB is a finding."""

from __future__ import annotations

import resource
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rightrank.schema.errors import RightrankError

SECONDS = 5.0  # of CPU time, so that a busy machine causes no findings
MEMORY_BYTES = 2**30  # in addition to the memory of the process when the read begins
LONGEST_COMPLAINT = 2000  # characters of a message, which must be one readable line
OURS = "rightrank"


class TimeLimitExceeded(BaseException):
    """The read exceeded its CPU time. It is no subclass of `Exception`, so that no handler on the way catches it."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What went wrong, and the innermost line of our code in the traceback."""

    kind: str  # traceback, hang, memory, complaint
    location: str
    message: str


def check_read(read: Callable[[bytes, Path], None], data: bytes, folder: Path) -> Finding | None:
    """Read `data` in an empty `folder`; return None if it is read, or refused with a one-line message of ours."""
    try:
        with _limit_resources():
            read(data, folder)
    except RightrankError as error:
        return _check_message(error)
    except TimeLimitExceeded as error:
        return _build_finding("hang", error)
    except MemoryError as error:
        return _build_finding("memory", error)
    except Exception as error:  # noqa: BLE001 - every other exception is what is looked for
        return _build_finding("traceback", error)
    return None


def _check_message(error: RightrankError) -> Finding | None:
    text = str(error)
    if text.strip() and len(text) <= LONGEST_COMPLAINT:
        return None
    return _build_finding("complaint", error)


def _build_finding(kind: str, error: BaseException) -> Finding:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if f"/{OURS}/" in frame.filename]
    last = (ours or frames)[-1]
    location = f"{last.filename.rpartition(f'/{OURS}/')[2]}:{last.lineno}"
    return Finding(kind, location, f"{type(error).__name__}: {str(error)[:200]}")


@contextmanager
def _limit_resources() -> Iterator[None]:
    """Limit the CPU time with a signal, and the memory with the size of the address space."""
    address_space = resource.getrlimit(resource.RLIMIT_AS)
    previous_handler = signal.signal(signal.SIGPROF, _raise_time_limit)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (_read_virtual_bytes() + MEMORY_BYTES, address_space[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, address_space)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous_handler)


def _read_virtual_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _raise_time_limit(_signal: int, _frame: Any) -> None:
    raise TimeLimitExceeded
