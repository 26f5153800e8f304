"""Compute the peak memory of a step from its allocations: the bytes by component, and the bytes that the allocator reserves.

`simulate_peak` runs the step of a trace `STEPS` times through a model of the device's allocator. Time goes to the right,
a bar is the lifetime of an allocation (+n its birth in the trace, −n its death), and the peak is the column with the most bytes:

                 |------- forward -------|------- backward -------|- optimizer -|
    weights      ################################################################  residents: before, during and
    adapter      ################################################################  after every step
    optimizer    ################################################################  states, created at the end of step 1
    activations    +n #####################################-n                      kept for the backward pass
                          ##########################
    logits                            ################
    gradients                                +n ##############################-n  freed when the step ends
    temporary      #  #  #  #  #  #  #   #  #  #  #  #  #  #         #######       workspace of one operation
                                            ^ peak

The first step runs without optimizer states. In the second, the allocator reserves the segments for all tensors. The third
gives the result; if the second step reserves nothing new, it already is the result. On a CPU, reserved and allocated bytes
are equal.

On CUDA the allocator is a model of torch's: the bytes it reserves from the device for a sequence of requests. The rules are
those of `c10/cuda/CUDACachingAllocator.cpp` at its default settings (torch 2.x):

- a request is rounded up to 512 bytes;
- a request up to 1 MiB is served from a segment of 2 MiB, one below 10 MiB from a segment of 20 MiB, and a larger one
  from its own segment, rounded up to 2 MiB;
- the smallest free block that fits is used, and split if more than 1 MiB (512 bytes in the small pool) remains;
- a freed block merges with its free neighbours in the segment; segments are never released.

Not covered: `expandable_segments`, `max_split_size_mb`, several streams, and the release of cached segments when the
device is full, which reserves less and takes more time.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from rightrank.planning.trace import DeviceKind, Origin, StepTrace
from rightrank.schema.plan_settings import OptimizerName
from rightrank.schema.results import Components

STEPS = 3  # maximum number of simulated steps; the first creates the optimizer's states
FIRST_NAME = 2**40  # name of the first allocation that is not in the trace


@dataclass(frozen=True, slots=True)
class Peak:
    """The peak memory of a step."""

    peak_bytes: int  # allocated
    reserved_bytes: int
    components: Components  # bytes by component; they add up to peak_bytes
    at: str  # where in the step


class _ExactAllocator:
    """A model of the CPU's allocator: no rounding and no segments. The largest allocated total counts as reserved."""

    def __init__(self) -> None:
        self.allocated = self.reserved = 0
        self._allocations: dict[int, int] = {}

    def allocate(self, name: int, size: int) -> None:
        self._allocations[name] = size
        self.allocated += size
        self.reserved = max(self.reserved, self.allocated)

    def free(self, name: int) -> None:
        self.allocated -= self._allocations.pop(name, 0)


def simulate_peak(
    residents: Sequence[tuple[str, int]], trace: StepTrace, optimizer: OptimizerMemory, device: DeviceKind
) -> Peak:
    """Simulate the step on the device's allocator until it repeats itself, at most `STEPS` times, and return the last peak.

    Args:
        residents: component and bytes of each tensor that exists before and after the step, in loading order.
        optimizer: the optimizer's states and workspace.
    """
    allocator = CachingAllocator() if device == "cuda" else _ExactAllocator()
    name = FIRST_NAME
    for _, size in residents:
        allocator.allocate(name := name + 1, size)
    never_freed = set(trace.events).difference(-event for event in trace.events)
    sizes, peak_bytes, peak_index = trace.sizes, 0, 0
    for step in range(STEPS):
        peak_bytes, peak_index, reserved = 0, -1, allocator.reserved
        for index, event in enumerate(trace.events):
            if event > 0:
                allocator.allocate(event, sizes[event - 1])
                if allocator.allocated > peak_bytes:
                    peak_bytes, peak_index = allocator.allocated, index
            else:
                allocator.free(-event)
        if step == 0:
            for size in optimizer.states:
                allocator.allocate(name := name + 1, size)
        for stage in optimizer.work:
            for offset, size in enumerate(stage):
                allocator.allocate(name + 1 + offset, size)
            if allocator.allocated > peak_bytes:
                peak_bytes, peak_index = allocator.allocated, len(trace.events)
            for offset in range(len(stage)):
                allocator.free(name + 1 + offset)
        for number in never_freed:
            allocator.free(number)
        if step and allocator.reserved == reserved:  # The free blocks are unchanged, so every later step is equal.
            break
    return _build_peak(residents, trace, optimizer, (peak_bytes, allocator.reserved, peak_index))


def _build_peak(
    residents: Sequence[tuple[str, int]], trace: StepTrace, optimizer: OptimizerMemory, measured: tuple[int, int, int]
) -> Peak:
    peak_bytes, reserved_bytes, peak_index = measured
    components: Components = Counter()
    for component, size in residents:
        components[component] += size
    components["optimizer"] = sum(optimizer.states)
    births = ((index, trace.origins[event - 1].phase) for index, event in enumerate(trace.events) if event > 0)
    backward = next((index for index, phase in births if phase == "backward"), len(trace.events))
    saved_activations = _find_alive_allocations(trace, backward - 1)
    for number in _find_alive_allocations(trace, peak_index):
        component = _classify_allocation(
            trace.origins[number - 1], number - 1 in trace.gradients, number in saved_activations
        )
        components[component] += trace.sizes[number - 1]
    if peak_index == len(trace.events):
        components["temporary"] += max(sum(stage) for stage in optimizer.work)
    components["rounding"] = peak_bytes - sum(components.values())
    return Peak(peak_bytes, reserved_bytes, components, _describe_location(trace, peak_index))


def _find_alive_allocations(trace: StepTrace, event_index: int) -> set[int]:
    alive: set[int] = set()
    for event in trace.events[: event_index + 1]:
        if event > 0:
            alive.add(event)
        else:
            alive.discard(-event)
    return alive


def _classify_allocation(origin: Origin, is_gradient: bool, is_saved: bool) -> str:
    if is_gradient:
        return "gradients"
    if origin.has_vocabulary:
        return "logits_and_loss"
    # A module that runs in the backward pass recomputes activations.
    if is_saved or (origin.phase == "backward" and origin.module):
        return "activations"
    return "temporary"


def _describe_location(trace: StepTrace, event_index: int) -> str:
    if event_index == len(trace.events):
        return "optimizer step"
    origin = trace.origins[trace.events[event_index] - 1]
    # The same name for every block: `layers.mlp.up_proj` for `model.layers.3.mlp.up_proj`.
    names = [name for name in origin.module.split(".") if not name.isdigit()]
    module = ".".join(name for name in names if name not in ("base_model", "model", "default")) or "model"
    module = module if origin.module else ""
    module_text = f", {module}" if module else ", loss" if origin.has_vocabulary else ""
    return f"{origin.phase} pass{module_text} ({origin.op.split('.')[0]})"


MIN_8BIT_ELEMENTS = 4096  # smaller tensors keep 32-bit states
BLOCK_8BIT = 256
CODE_BYTES = 2 * 256 * 4  # two tables that decode 8-bit states
STEP_BYTES = 4  # of each parameter's step count, which the fused form keeps on the device


@dataclass(frozen=True, slots=True)
class OptimizerMemory:
    """Bytes of an optimizer's persistent states, and of its workspace by stage. The entries of one stage exist at the same time."""

    states: tuple[int, ...]
    work: tuple[tuple[int, ...], ...]


def estimate_optimizer_memory(
    parameters: Sequence[torch.Tensor], name: OptimizerName, device: DeviceKind
) -> OptimizerMemory:
    """Estimate the memory of optimizer `name` for these parameters, in bytes."""
    sizes = [parameter.numel() * parameter.element_size() for parameter in parameters]
    if name == "adamw_fused":
        return OptimizerMemory(tuple(state_size for size in sizes for state_size in (STEP_BYTES, size, size)), ())
    if name == "adamw":
        states = tuple(state_size for size in sizes for state_size in (size, size))
        work = (tuple(sizes),) if device == "cuda" else tuple((size, size) for size in sizes)
        return OptimizerMemory(states, work)
    entries = [CODE_BYTES // 2, CODE_BYTES // 2]
    for elements in (parameter.numel() for parameter in parameters):
        blocks = math.ceil(elements / BLOCK_8BIT) * 4
        entries += [elements * 4] * 2 if elements < MIN_8BIT_ELEMENTS else [elements, elements, blocks, blocks]
    return OptimizerMemory(tuple(entries), ())


ROUNDING = 512
SMALL_REQUEST = 2**20
SMALL_SEGMENT = 2 * 2**20
LARGE_REQUEST = 10 * 2**20
LARGE_SEGMENT = 20 * 2**20
SEGMENT_ROUNDING = 2 * 2**20

_Pool: TypeAlias = list[tuple[int, int]]  # free blocks, by size and then by address


class CachingAllocator:
    """A model of torch's CUDA caching allocator that counts allocated and reserved bytes of named requests."""

    def __init__(self) -> None:
        self.allocated = 0  # bytes of used blocks, rounded as torch counts them
        self.reserved = 0  # bytes of all segments
        self._pools: tuple[_Pool, _Pool] = ([], [])
        # Free blocks are never adjacent. These map the address of each to its end, and its end to its address.
        self._ends: dict[int, int] = {}
        self._starts: dict[int, int] = {}
        self._allocations: dict[int, tuple[int, int, _Pool]] = {}  # address, size and pool, by name
        self._next_address = 0

    def allocate(self, name: int, size: int) -> None:
        """Serve a request of `size` bytes. An empty tensor needs no memory."""
        if size <= 0:
            return
        rounded = -(-size // ROUNDING) * ROUNDING
        is_small = rounded <= SMALL_REQUEST
        pool = self._pools[is_small]
        position = bisect_left(pool, (rounded, -1))
        if position < len(pool):
            size, address = pool.pop(position)
            del self._starts[self._ends.pop(address)]
        else:
            size, address = SMALL_SEGMENT if is_small else LARGE_SEGMENT, self._next_address
            if rounded >= LARGE_REQUEST:  # gets a separate segment
                size = -(-rounded // SEGMENT_ROUNDING) * SEGMENT_ROUNDING
            self._next_address += size + ROUNDING  # a gap: segments never join
            self.reserved += size
        if size - rounded > (0 if is_small else SMALL_REQUEST):
            self._add(pool, address + rounded, address + size)
            size = rounded
        self._allocations[name] = address, size, pool
        self.allocated += size

    def free(self, name: int) -> None:
        """Free the block of `name`, and merge it with its free neighbours."""
        if name not in self._allocations:
            return
        start, size, pool = self._allocations.pop(name)
        self.allocated -= size
        end = start + size
        if (previous_start := self._starts.pop(start, None)) is not None:
            del self._ends[previous_start], pool[bisect_left(pool, (start - previous_start, previous_start))]
            start = previous_start
        if (next_end := self._ends.pop(end, None)) is not None:
            del self._starts[next_end], pool[bisect_left(pool, (next_end - end, end))]
            end = next_end
        self._add(pool, start, end)

    def _add(self, pool: _Pool, start: int, end: int) -> None:
        self._ends[start], self._starts[end] = end, start
        insort(pool, (end - start, start))
