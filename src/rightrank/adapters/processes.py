"""The processes that train one model: errors that all of them raise, values of all of them, and sharded parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from typing import Any

import torch.distributed as dist
from torch.distributed.tensor import DTensor

from rightrank.schema.errors import LIBRARY_ERRORS, RightrankError, RunError

# What a measurement in someone else's process can end in; all else ends the process anyway.
FAILURES = (RightrankError, MemoryError, *LIBRARY_ERRORS)
AGREED = "is_known_to_all"  # of an error: every process has raised


@contextmanager
def together() -> Iterator[None]:
    """Where one of several processes fails in the block all of them raise: none may wait for the others.

    Raises:
        RunError: another process failed.
    """
    failure: Exception | None = None
    try:
        yield
    except FAILURES as error:
        if hasattr(error, AGREED):
            raise  # in a block within this one
        failure = error
    failed = any(gather_objects(failure is not None))
    if failed:
        failure = failure or RunError("another process of the training failed")
        setattr(failure, AGREED, True)
        raise failure


def gather_objects(mine: Any) -> list[Any]:
    """Return the values of all processes, in the order of their numbers."""
    every = [mine] * world_size()
    if len(every) > 1:
        dist.all_gather_object(every, mine)
    return every


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """The number of this process; process 0 writes files."""
    return dist.get_rank() if world_size() > 1 else 0


def is_sharded(model: Any) -> bool:
    """Whether a process holds parts of the parameters: FSDP2's `DTensor`s, or DeepSpeed's empty parameters."""
    return is_partitioned(model) or any(isinstance(parameter, DTensor) for parameter in model.parameters())


def is_partitioned(model: Any) -> bool:
    """Whether DeepSpeed's ZeRO-3 holds the parameters, which are then empty outside a pass."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


@contextmanager
def gathered(model: Any) -> Iterator[None]:
    """In the block the trained parameters of ZeRO-3 are whole; nothing happens for other models."""
    parts = [
        parameter
        for name, parameter in model.named_parameters()
        if hasattr(parameter, "ds_id") and ("lora_" in name or parameter.requires_grad)
    ]
    with import_module("deepspeed").zero.GatheredParameters(parts) if parts else nullcontext():
        yield
