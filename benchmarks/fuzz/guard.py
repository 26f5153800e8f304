"""One read under limits: what is no complaint of ours, takes over 5 seconds or over 1 GiB is a find."""

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

SECONDS = 5.0  # of CPU: a busy machine makes no find
MEMORY_BYTES = 2**30  # beyond what the process has when the read begins
LONGEST_COMPLAINT = 2000  # characters; a complaint is one line for a person
OURS = "rightrank"


class TookTooLong(BaseException):
    """Past every `except Exception` on the way up."""


@dataclass(frozen=True, slots=True)
class Find:
    """What went wrong, and the innermost line of ours that it went through."""

    kind: str  # traceback, hang, memory, complaint
    where: str
    what: str


def find_in(read: Callable[[bytes, Path], None], data: bytes, folder: Path) -> Find | None:
    """Read `data` in an empty `folder`; None where it was read, or refused in one line of ours."""
    try:
        with _limits():
            read(data, folder)
    except RightrankError as error:
        return _complaint(error)
    except TookTooLong as error:
        return _find("hang", error)
    except MemoryError as error:
        return _find("memory", error)
    except Exception as error:  # noqa: BLE001 - every other exception is what is looked for
        return _find("traceback", error)
    return None


def _complaint(error: RightrankError) -> Find | None:
    text = str(error)
    if text.strip() and len(text) <= LONGEST_COMPLAINT:
        return None
    return _find("complaint", error)


def _find(kind: str, error: BaseException) -> Find:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if f"/{OURS}/" in frame.filename]
    last = (ours or frames)[-1]
    where = f"{last.filename.rpartition(f'/{OURS}/')[2]}:{last.lineno}"
    return Find(kind, where, f"{type(error).__name__}: {str(error)[:200]}")


@contextmanager
def _limits() -> Iterator[None]:
    """CPU time by a signal, memory by the limit of the address space."""
    address_space = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGPROF, _too_long)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (_virtual_bytes() + MEMORY_BYTES, address_space[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, address_space)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _virtual_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _too_long(_signal: int, _frame: Any) -> None:
    raise TookTooLong
