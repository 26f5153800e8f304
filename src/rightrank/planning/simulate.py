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
them; the third gives the result. On a CPU the allocator reserves what is allocated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rightrank.planning.allocator import CachingAllocator
from rightrank.planning.kernels import DeviceKind
from rightrank.planning.optimizer import OptimizerMemory
from rightrank.planning.trace import Origin, StepTrace
from rightrank.records.plan import Components

STEPS = 3  # the first creates the optimizer's states; after two more the reserved bytes no longer grow
PERSISTENT = ("weights", "adapter", "optimizer")  # components that a calibration does not correct: they are exact
FIRST_NAME = 2**40  # of allocations that are not in the trace


@dataclass(frozen=True, slots=True)
class Resident:
    """A tensor that exists before the step and after it."""

    size: int  # bytes
    component: str


@dataclass(frozen=True, slots=True)
class Peak:
    """The peak of a step."""

    peak_bytes: int  # allocated
    reserved_bytes: int
    components: Components  # bytes by component; they add up to peak_bytes
    activations: Components  # the component of that name by kind of module, bytes
    at: str  # where in the step


class _ExactAllocator:
    """The CPU's allocator: no rounding, no segments."""

    def __init__(self) -> None:
        self.allocated = self.peak_allocated = 0
        self._taken: dict[int, int] = {}

    def allocate(self, name: int, size: int) -> None:
        self._taken[name] = size
        self.allocated += size
        self.peak_allocated = max(self.peak_allocated, self.allocated)

    def free(self, name: int) -> None:
        self.allocated -= self._taken.pop(name, 0)

    @property
    def peak_reserved(self) -> int:
        return self.peak_allocated


def simulate_peak(
    residents: Sequence[Resident],
    trace: StepTrace,
    sizes: Sequence[int],
    optimizer: OptimizerMemory,
    device: DeviceKind,
) -> Peak:
    """Run the step `STEPS` times through the device's allocator; the peak of the last.

    Args:
        residents: weights, adapters and buffers, in the order in which they are loaded.
        trace: the step.
        sizes: bytes of each of its allocations.
        optimizer: states and workspace.
    """
    allocator = CachingAllocator() if device == "cuda" else _ExactAllocator()
    name = FIRST_NAME
    for resident in residents:
        allocator.allocate(name := name + 1, resident.size)
    living = _never_freed(trace)
    best, where = 0, 0
    for step in range(STEPS):
        best, where = 0, -1
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
        for number in living:
            allocator.free(number)
    return _described(residents, trace, sizes, optimizer, (best, allocator.peak_reserved, where))


def corrected(peak: Peak, step_factor: float) -> Peak:
    """The peak with the bytes of the step itself (without PERSISTENT components) times `step_factor`."""
    persistent = sum(peak.components.get(name, 0) for name in PERSISTENT)
    difference = round((step_factor - 1) * (peak.peak_bytes - persistent))
    components = peak.components | {"correction": difference}
    reserved = max(peak.reserved_bytes + difference, peak.peak_bytes + difference)
    return replace(peak, peak_bytes=peak.peak_bytes + difference, reserved_bytes=reserved, components=components)


def _never_freed(trace: StepTrace) -> list[int]:
    ended = {-event for event in trace.events if event < 0}
    return [event for event in trace.events if event > 0 and event not in ended]


def _described(
    residents: Sequence[Resident],
    trace: StepTrace,
    sizes: Sequence[int],
    optimizer: OptimizerMemory,
    found: tuple[int, int, int],
) -> Peak:
    best, reserved, where = found
    components: Components = {}
    activations: Components = {}
    for resident in residents:
        components[resident.component] = components.get(resident.component, 0) + resident.size
    components["optimizer"] = sum(optimizer.states)
    kept = _kept_for_backward(trace)
    for number in _alive_at(trace, where):
        origin, size = trace.origins[number - 1], sizes[number - 1]
        component = _component(origin, number - 1 in trace.gradients, number in kept)
        components[component] = components.get(component, 0) + size
        if component == "activations":
            kind = kind_of_module(origin.module)
            activations[kind] = activations.get(kind, 0) + size
    at = _place(trace, where)
    if where == len(trace.events):
        components["temporary"] = components.get("temporary", 0) + max(sum(stage) for stage in optimizer.work)
    components["rounding"] = best - sum(components.values())
    ordered = dict(sorted(activations.items(), key=lambda item: -item[1]))
    return Peak(best, reserved, components, ordered, at)


def _alive_at(trace: StepTrace, where: int) -> set[int]:
    alive: set[int] = set()
    for event in trace.events[: where + 1]:
        if event > 0:
            alive.add(event)
        else:
            alive.discard(-event)
    return alive


def _kept_for_backward(trace: StepTrace) -> set[int]:
    """Allocations of the forward pass that are alive when the backward pass begins."""
    alive: set[int] = set()
    for event in trace.events:
        if event > 0:
            if trace.origins[event - 1].phase == "backward":
                break
            alive.add(event)
        else:
            alive.discard(-event)
    return alive


def _component(origin: Origin, is_gradient: bool, kept: bool) -> str:
    if is_gradient:
        return "gradients"
    if origin.has_vocabulary:
        return "logits_and_loss"
    if kept or (
        origin.phase == "backward" and origin.module
    ):  # a module that runs in the backward pass recomputes activations
        return "activations"
    return "temporary"


def kind_of_module(name: str) -> str:
    """The same name for every block: `layers.mlp.up_proj` for `model.layers.3.mlp.up_proj`."""
    parts = [part for part in name.split(".") if not part.isdigit() and part not in ("base_model", "model", "default")]
    return ".".join(parts) or "model"


def _place(trace: StepTrace, where: int) -> str:
    if where == len(trace.events):
        return "optimizer step"
    origin = trace.origins[trace.events[where] - 1]
    module = kind_of_module(origin.module) if origin.module else ""
    within = f", {module}" if module else ", loss" if origin.has_vocabulary else ""
    return f"{origin.phase} pass{within} ({origin.op.split('.')[0]})"
