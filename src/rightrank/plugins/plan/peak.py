"""From the allocations of a step to its peak: the bytes, what they are, and what the allocator reserves.

`simulate_peak` runs the step of a trace `STEPS` times through a model of the device's allocator. Time goes to the right,
a bar is the life of an allocation (+n its birth in the trace, −n its death), and the peak is the column with the most bytes:

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

The first step runs without optimizer states; the second leaves the segments that the allocator reserves for all of
them; the third gives the result, and a second that reserves nothing is the same. On a CPU the allocator reserves what is
allocated.

On CUDA the allocator is a model of torch's: the bytes it reserves from the device for a sequence of requests. The rules are
those of `c10/cuda/CUDACachingAllocator.cpp` at its default settings (torch 2.x):

- a request is rounded up to 512 bytes;
- a request up to 1 MiB is served from a segment of 2 MiB, one below 10 MiB from a segment of 20 MiB, and a larger one
  from its own segment, rounded up to 2 MiB;
- the smallest free block that fits is taken, and split where more than 1 MiB (512 bytes in the small pool) remains;
- a freed block merges with its free neighbours in the segment; segments are kept.

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

from rightrank.plugins.plan.trace import DeviceKind, Origin, StepTrace
from rightrank.schema.plan_settings import OptimizerName
from rightrank.schema.results import Components

STEPS = 3  # at most; the first creates the optimizer's states
FIRST_NAME = 2**40  # of allocations that are not in the trace


@dataclass(frozen=True, slots=True)
class Peak:
    """The peak of a step."""

    peak_bytes: int  # allocated
    reserved_bytes: int
    components: Components  # bytes by component; they add up to peak_bytes
    at: str  # where in the step


class _ExactAllocator:
    """The CPU's allocator: no rounding, no segments; the most that was allocated counts as reserved."""

    def __init__(self) -> None:
        self.allocated = self.reserved = 0
        self._taken: dict[int, int] = {}

    def allocate(self, name: int, size: int) -> None:
        self._taken[name] = size
        self.allocated += size
        self.reserved = max(self.reserved, self.allocated)

    def free(self, name: int) -> None:
        self.allocated -= self._taken.pop(name, 0)


def simulate_peak(
    residents: Sequence[tuple[str, int]], trace: StepTrace, optimizer: OptimizerMemory, device: DeviceKind
) -> Peak:
    """Run the step through the device's allocator until it repeats itself, at most `STEPS` times; the peak of the last.

    Args:
        residents: component and bytes of each tensor that exists before the step and after it, in the order of loading.
        optimizer: states and workspace.
    """
    allocator = CachingAllocator() if device == "cuda" else _ExactAllocator()
    name = FIRST_NAME
    for _, size in residents:
        allocator.allocate(name := name + 1, size)
    never_freed = set(trace.events).difference(-event for event in trace.events)
    sizes, best, where = trace.sizes, 0, 0
    for step in range(STEPS):
        best, where, reserved = 0, -1, allocator.reserved
        for index, event in enumerate(trace.events):
            if event > 0:
                allocator.allocate(event, sizes[event - 1])
                if allocator.allocated > best:
                    best, where = allocator.allocated, index
            else:
                allocator.free(-event)
        if step == 0:
            for size in optimizer.states:
                allocator.allocate(name := name + 1, size)
        for stage in optimizer.work:
            for offset, size in enumerate(stage):
                allocator.allocate(name + 1 + offset, size)
            if allocator.allocated > best:
                best, where = allocator.allocated, len(trace.events)
            for offset in range(len(stage)):
                allocator.free(name + 1 + offset)
        for number in never_freed:
            allocator.free(number)
        if step and allocator.reserved == reserved:  # the same blocks are free as before: further steps are this one
            break
    return _described(residents, trace, optimizer, (best, allocator.reserved, where))


def _described(
    residents: Sequence[tuple[str, int]], trace: StepTrace, optimizer: OptimizerMemory, measured: tuple[int, int, int]
) -> Peak:
    best, reserved, where = measured
    components: Components = Counter()
    for component, size in residents:
        components[component] += size
    components["optimizer"] = sum(optimizer.states)
    births = ((place, trace.origins[event - 1].phase) for place, event in enumerate(trace.events) if event > 0)
    backward = next((place for place, phase in births if phase == "backward"), len(trace.events))
    kept = _alive_at(trace, backward - 1)  # what the forward pass leaves for the backward pass
    for number in _alive_at(trace, where):
        component = _component(trace.origins[number - 1], number - 1 in trace.gradients, number in kept)
        components[component] += trace.sizes[number - 1]
    if where == len(trace.events):
        components["temporary"] += max(sum(stage) for stage in optimizer.work)
    components["rounding"] = best - sum(components.values())
    return Peak(best, reserved, components, _place(trace, where))


def _alive_at(trace: StepTrace, where: int) -> set[int]:
    alive: set[int] = set()
    for event in trace.events[: where + 1]:
        if event > 0:
            alive.add(event)
        else:
            alive.discard(-event)
    return alive


def _component(origin: Origin, is_gradient: bool, kept: bool) -> str:
    if is_gradient:
        return "gradients"
    if origin.has_vocabulary:
        return "logits_and_loss"
    # A module that runs in the backward pass recomputes activations.
    if kept or (origin.phase == "backward" and origin.module):
        return "activations"
    return "temporary"


def _place(trace: StepTrace, where: int) -> str:
    if where == len(trace.events):
        return "optimizer step"
    origin = trace.origins[trace.events[where] - 1]
    # The same name for every block: `layers.mlp.up_proj` for `model.layers.3.mlp.up_proj`.
    parts = [part for part in origin.module.split(".") if not part.isdigit()]
    module = ".".join(part for part in parts if part not in ("base_model", "model", "default")) or "model"
    module = module if origin.module else ""
    within = f", {module}" if module else ", loss" if origin.has_vocabulary else ""
    return f"{origin.phase} pass{within} ({origin.op.split('.')[0]})"


MIN_8BIT_ELEMENTS = 4096  # smaller tensors keep 32-bit states
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
    if name == "adamw_fused":
        return OptimizerMemory(tuple(part for size in sizes for part in (STEP_BYTES, size, size)), ())
    if name == "adamw":
        states = tuple(part for size in sizes for part in (size, size))
        work = (tuple(sizes),) if device == "cuda" else tuple((size, size) for size in sizes)
        return OptimizerMemory(states, work)
    parts = [CODE_BYTES // 2, CODE_BYTES // 2]
    for elements in (parameter.numel() for parameter in parameters):
        blocks = math.ceil(elements / BLOCK_8BIT) * 4
        parts += [elements * 4] * 2 if elements < MIN_8BIT_ELEMENTS else [elements, elements, blocks, blocks]
    return OptimizerMemory(tuple(parts), ())


ROUNDING = 512
SMALL_REQUEST = 2**20
SMALL_SEGMENT = 2 * 2**20
LARGE_REQUEST = 10 * 2**20
LARGE_SEGMENT = 20 * 2**20
SEGMENT_ROUNDING = 2 * 2**20

_Pool: TypeAlias = list[tuple[int, int]]  # free blocks, by size and then by address


class CachingAllocator:
    """Serves requests by name, and counts allocated and reserved bytes."""

    def __init__(self) -> None:
        self.allocated = 0  # bytes of taken blocks, rounded as torch counts them
        self.reserved = 0  # bytes of all segments, which are kept
        self._pools: tuple[_Pool, _Pool] = ([], [])
        # Free blocks, which never touch: from the address of each to its end, and back.
        self._ends: dict[int, int] = {}
        self._starts: dict[int, int] = {}
        self._taken: dict[int, tuple[int, int, _Pool]] = {}  # address, size and pool, by name
        self._next_address = 0

    def allocate(self, name: int, size: int) -> None:
        """Serve a request of `size` bytes; an empty tensor takes nothing."""
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
            if rounded >= LARGE_REQUEST:  # a segment of its own
                size = -(-rounded // SEGMENT_ROUNDING) * SEGMENT_ROUNDING
            self._next_address += size + ROUNDING  # a gap: segments never join
            self.reserved += size
        if size - rounded > (0 if is_small else SMALL_REQUEST):
            self._add(pool, address + rounded, address + size)
            size = rounded
        self._taken[name] = address, size, pool
        self.allocated += size

    def free(self, name: int) -> None:
        """Free what `name` takes, and merge it with its free neighbours."""
        if name not in self._taken:
            return
        start, size, pool = self._taken.pop(name)
        self.allocated -= size
        end = start + size
        if (before := self._starts.pop(start, None)) is not None:
            del self._ends[before], pool[bisect_left(pool, (start - before, before))]
            start = before
        if (after := self._ends.pop(end, None)) is not None:
            del self._starts[after], pool[bisect_left(pool, (after - end, end))]
            end = after
        self._add(pool, start, end)

    def _add(self, pool: _Pool, start: int, end: int) -> None:
        self._ends[start], self._starts[end] = end, start
        insort(pool, (end - start, start))
