"""Coordinate the processes that train one model: common errors, gathered values, and sharded parameters."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from typing import Any

import torch.distributed as dist
from torch.distributed.tensor import DTensor

from rightrank.schema.errors import RunError, get_first_line, log_traceback

log = logging.getLogger("rightrank")
SHARED_ERROR_FLAG = "is_known_to_all"  # an attribute of an error that every process has raised


@contextmanager
def sync_errors() -> Iterator[None]:
    """Raise in all processes if one of them fails within the block, so that none waits for the others.

    Raises:
        RunError: Another process failed.
    """
    try:
        yield
    except Exception as error:
        if not hasattr(error, SHARED_ERROR_FLAG):  # else raised in a block within this one
            gather_objects(True)
            setattr(error, SHARED_ERROR_FLAG, True)
        raise
    if any(gather_objects(False)):
        failure = RunError("another process of the training failed")
        setattr(failure, SHARED_ERROR_FLAG, True)
        raise failure


@contextmanager
def log_failure(description: str, advise: Callable[[], str] = str) -> Iterator[None]:
    """Log an error of the block in one line, with its traceback at debug level. The training around it has ended well and continues.

    Args:
        advise: returns the end of the line.
    """
    try:
        yield
    except Exception as error:  # noqa: BLE001 - the program must be able to save its model
        log.warning("rightrank: %s: %s%s", description, get_first_line(error), advise())
        log_traceback(error)


def gather_objects(value: Any) -> list[Any]:
    """Return the values of all processes, in the order of their numbers."""
    values = [value] * get_world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def get_world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def get_process_index() -> int:
    """Return the number of this process. Process 0 writes files."""
    return dist.get_rank() if get_world_size() > 1 else 0


def is_sharded(model: Any) -> bool:
    """Return whether a process holds shards of the parameters: FSDP2's `DTensor`s, or DeepSpeed's empty parameters."""
    return is_partitioned(model) or any(isinstance(parameter, DTensor) for parameter in model.parameters())


def is_partitioned(model: Any) -> bool:
    """Return whether DeepSpeed's ZeRO-3 holds the parameters, which are then empty outside a pass."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


@contextmanager
def gather_parameters(model: Any) -> Iterator[None]:
    """Gather the trainable parameters of ZeRO-3 within the block; do nothing for other models."""
    parameters = [
        parameter
        for name, parameter in model.named_parameters()
        if hasattr(parameter, "ds_id") and ("lora_" in name or parameter.requires_grad)
    ]
    with import_module("deepspeed").zero.GatheredParameters(parameters) if parameters else nullcontext():
        yield
