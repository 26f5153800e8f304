"""Out-of-memory errors, and the peak memory that the device or the system counts."""

from __future__ import annotations

import gc
import resource
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rightrank.schema.errors import is_out_of_memory
from rightrank.train.distributed import world_size

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
        return peak_bytes(self._device)


def peak_bytes(device: torch.device) -> int:
    """The peak since it was last reset: tensor allocations on CUDA, the process's resident set on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextmanager
def gradient_checkpointing_on(model: Any) -> Iterator[None]:
    """Within the block, the backward pass recomputes the activations inside the model's blocks.

    transformers checkpoints only blocks in training mode. Only the blocks are put in training mode, so that the base's
    own dropout stays off.
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    enable()
    try:
        with training_is(True, _checkpointed(model)):
            yield
    finally:
        disable()


@contextmanager
def kv_cache(model: Any) -> Iterator[None]:
    """Within the block, generation uses the key-value cache, which transformers turns off in checkpointed blocks."""
    with training_is(False, [block for block in _checkpointed(model) if block.training]):
        yield


def _checkpointed(model: Any) -> list[Any]:
    return [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]


@contextmanager
def training_is(value: bool, modules: Iterable[Any]) -> Iterator[None]:
    """Within the block, these modules alone are in training mode, or in evaluation mode; after it, in the other."""
    found = list(modules)
    for module in found:
        module.training = value
    try:
        yield
    finally:
        for module in found:
            module.training = not value
