"""What an optimizer keeps for each trained parameter, and what it takes while it steps.

Sources: torch's `optim/adamw.py` (its foreach form on CUDA makes one list of square roots; its plain form on the CPU
two tensors for one parameter at a time; its fused form none), bitsandbytes' `optim/optimizer.py` (a byte and a share
of a block constant for each state of tensors of 4,096 elements and more; paged states live in host memory).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rightrank.planning.kernels import DeviceKind
from rightrank.settings import OptimizerName

SMALLEST_8BIT = 4096  # elements; smaller tensors keep 32-bit states
SMALLEST_PAGED = 100_000  # elements
BLOCK_8BIT = 256
CODE_BYTES = 2 * 256 * 4  # the two tables that 8-bit states are read with
STEP_BYTES = 4  # fused forms keep each parameter's step count on the device


@dataclass(frozen=True, slots=True)
class OptimizerMemory:
    """States that stay, and stages of work space: what a stage lists is there together."""

    states: tuple[int, ...]
    work: tuple[tuple[int, ...], ...]


def optimizer_memory(parameters: Sequence[torch.Tensor], name: OptimizerName, device: DeviceKind) -> OptimizerMemory:
    """Bytes that `name` takes for these parameters."""
    sizes = [parameter.numel() * parameter.element_size() for parameter in parameters]
    if name == "sgd":
        return OptimizerMemory((), ())
    if name == "adamw_fused":
        return OptimizerMemory(tuple(part for size in sizes for part in (STEP_BYTES, size, size)), ())
    if name == "adamw":
        states = tuple(part for size in sizes for part in (size, size))
        work = (tuple(sizes),) if device == "cuda" else tuple((size, size) for size in sizes)
        return OptimizerMemory(states, work)
    if device == "cpu":
        name = "adamw_8bit"  # bitsandbytes has no paged states there
    states = tuple(part for parameter in parameters for part in _states_8bit(parameter.numel(), name))
    return OptimizerMemory((CODE_BYTES // 2, CODE_BYTES // 2, *states), ())


def _states_8bit(elements: int, name: OptimizerName) -> tuple[int, ...]:
    if elements < SMALLEST_8BIT:
        return (elements * 4, elements * 4)
    blocks = math.ceil(elements / BLOCK_8BIT) * 4
    if name == "paged_adamw_8bit" and elements >= SMALLEST_PAGED:
        return (blocks, blocks)
    return (elements, elements, blocks, blocks)
