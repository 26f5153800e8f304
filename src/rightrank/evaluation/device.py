"""The device and its software, out-of-memory errors, and the peak memory that the device or the operating system reports."""

from __future__ import annotations

import gc
import platform
import resource
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from rightrank.schema.errors import get_first_line, is_out_of_memory

_STATUS_FILE = Path("/proc/self/status")
_CLEAR_REFS_FILE = Path("/proc/self/clear_refs")


@contextmanager
def catch_memory_errors() -> Iterator[list[str]]:
    """Leave the block if memory runs out; the yielded list then holds the reason.

    No traceback keeps the tensors of the failed pass alive afterwards.
    """
    reasons: list[str] = []
    try:
        yield reasons
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reasons.append(get_first_line(error))


def free_memory(device: torch.device) -> None:
    """Return unused memory to the device. Do not call it inside an `except` block, whose traceback keeps the failed pass alive."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def reset_peak_memory(device: torch.device) -> None:
    """Restart the measurement of `read_peak_bytes`.

    On a CPU only Linux supports this; on other systems the peak is that of the entire process.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR_REFS_FILE.exists():
        with suppress(PermissionError):  # a hardened container forbids it
            _CLEAR_REFS_FILE.write_text("5")  # resets the peak resident set (man 5 proc)


def read_peak_bytes(device: torch.device) -> int:
    """Return the peak since the last reset: tensor allocations on CUDA, the resident set of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS_FILE.exists():
        for line in _STATUS_FILE.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextmanager
def set_training_mode(value: bool, modules: Iterable[Any]) -> Iterator[None]:
    """Set the training mode of these modules alone within the block, and the opposite mode after it."""
    module_list = list(modules)
    for module in module_list:
        module.training = value
    try:
        yield
    finally:
        for module in module_list:
            module.training = not value


@contextmanager
def enable_gradient_checkpointing(model: Any) -> Iterator[None]:
    """Recompute the activations inside the model's blocks during the backward pass, within the context.

    transformers checkpoints only blocks in training mode. Only the blocks are put in training mode, so that the base's
    own dropout stays off.
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    enable()
    try:
        with set_training_mode(True, _find_checkpointed_modules(model)):
            yield
    finally:
        disable()


@contextmanager
def enable_kv_cache(model: Any) -> Iterator[None]:
    """Use the key-value cache for generation within the block; transformers disables it in checkpointed blocks."""
    with set_training_mode(False, [block for block in _find_checkpointed_modules(model) if block.training]):
        yield


def _find_checkpointed_modules(model: Any) -> list[Any]:
    return [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]


def describe_environment(device: str) -> dict[str, str]:
    """Return the versions and the hardware that a run's numbers depend on; no names of people, machines or paths."""
    import peft
    import transformers

    environment = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "device": device,
        "threads": str(torch.get_num_threads()),
    }
    if device.startswith("cuda"):
        environment["gpu"] = torch.cuda.get_device_name(device)
    return environment
