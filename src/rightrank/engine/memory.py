"""Out-of-memory errors, and the peak memory that the device or the system counts."""

from __future__ import annotations

import gc
import resource
import sys
from pathlib import Path

import torch

from rightrank.engine.distributed import world_size
from rightrank.errors import is_out_of_memory

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # Linux: reset the peak resident set (man 5 proc)


def is_recoverable_oom(error: BaseException) -> bool:
    """Whether memory ran out and this process can continue with smaller batches.

    Processes that share an arm can't: the others are in the middle of the same pass and wait for this one.
    """
    return world_size() == 1 and is_out_of_memory(error)


def free_memory(device: torch.device) -> None:
    """Return unused memory to the device. Call it outside the `except` block, whose traceback keeps the failed pass."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class PeakMemory:
    """Peak memory since the object was made or restarted: tensor allocations on CUDA, the process's resident set on the CPU.

    Only Linux can reset the peak of the resident set. Elsewhere the peak is that of the process's whole life.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.restart()

    def restart(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif _CLEAR.exists():
            try:
                _CLEAR.write_text(_RESET_PEAK)
            except PermissionError:
                return  # a hardened container: only the peak of the whole life is available

    def peak_bytes(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if _STATUS.exists():
            for line in _STATUS.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
