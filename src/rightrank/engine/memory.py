"""The peak memory of a stretch of work, as the device or the system counts it."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from types import TracebackType

import torch

from rightrank.engine.distributed import world_size
from rightrank.errors import is_out_of_memory

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # Linux: forget the peak resident set (man 5 proc)


def is_recoverable_oom(error: BaseException) -> bool:
    """Whether memory ran out and this process can go on with less at a time.

    Of several that share an arm none can: the others are in the middle of the same pass and wait for it.
    """
    return world_size() == 1 and is_out_of_memory(error)


class PeakMemory:
    """On CUDA the peak allocated by tensors; on the CPU the process's peak resident set since the block began.

    Where the system can't forget an earlier peak (outside Linux), the process's whole-life peak is given.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __enter__(self) -> PeakMemory:
        self.restart()
        return self

    def restart(self) -> None:
        """Forget the peak so far."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif _CLEAR.exists():
            try:
                _CLEAR.write_text(_RESET_PEAK)
            except PermissionError:
                return  # a hardened container: the whole-life peak is all there is

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def peak_bytes(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if _STATUS.exists():
            for line in _STATUS.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
