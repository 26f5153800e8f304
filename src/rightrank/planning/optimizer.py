"""Optimizer memory: the states of each trained parameter, and the workspace of a step.

For n elements of e bytes: AdamW keeps 2·n·e; its fused form also 4 bytes for the step count; the 8-bit forms keep n
bytes and ⌈n/256⌉ float32 constants for each of two states, where n ≥ 4,096, and 8·n bytes below that.

Sources: torch's `optim/adamw.py` (the foreach form on CUDA allocates square roots of all parameters at once, the plain
form on the CPU two tensors for one parameter at a time, the fused form none) and bitsandbytes' `optim/optimizer.py`
(paged states of 100,000 elements and more are in host memory).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rightrank.planning.kernels import DeviceKind
from rightrank.settings import OptimizerName

MIN_8BIT_ELEMENTS = 4096  # smaller tensors keep 32-bit states
MIN_PAGED_ELEMENTS = 100_000
BLOCK_8BIT = 256
CODE_BYTES = 2 * 256 * 4  # two tables that decode 8-bit states
STEP_BYTES = 4  # of each parameter's step count, which the fused form keeps on the device


@dataclass(frozen=True, slots=True)
class OptimizerMemory:
    """Bytes of persistent states, and of workspace by stage; the entries of one stage exist at the same time."""

    states: tuple[int, ...]
    work: tuple[tuple[int, ...], ...]


def optimizer_memory(parameters: Sequence[torch.Tensor], name: OptimizerName, device: DeviceKind) -> OptimizerMemory:
    """The memory of optimizer `name` for these parameters, bytes."""
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
    if elements < MIN_8BIT_ELEMENTS:
        return (elements * 4, elements * 4)
    blocks = math.ceil(elements / BLOCK_8BIT) * 4
    if name == "paged_adamw_8bit" and elements >= MIN_PAGED_ELEMENTS:
        return (blocks, blocks)
    return (elements, elements, blocks, blocks)
