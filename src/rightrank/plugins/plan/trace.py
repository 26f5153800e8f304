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

import math
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from rightrank.plugins.plan.allocator import CachingAllocator
from rightrank.plugins.plan.device import DeviceKind, scratch_bytes
from rightrank.schema.plan_settings import OptimizerName
from rightrank.schema.results import Components

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
    states = tuple(part for parameter in parameters for part in _states_8bit(parameter.numel()))
    return OptimizerMemory((CODE_BYTES // 2, CODE_BYTES // 2, *states), ())


def _states_8bit(elements: int) -> tuple[int, ...]:
    if elements < MIN_8BIT_ELEMENTS:
        return (elements * 4, elements * 4)
    blocks = math.ceil(elements / BLOCK_8BIT) * 4
    return (elements, elements, blocks, blocks)


Phase: TypeAlias = Literal["forward", "backward"]

# torch's table of operation counts lists these under the variants that do not write in place.
_IN_PLACE: dict[Any, Any] = {
    torch.ops.aten.baddbmm_: torch.ops.aten.baddbmm,
    torch.ops.aten.addmm_: torch.ops.aten.addmm,
}


@dataclass(frozen=True, slots=True)
class _Origin:
    """The place in the step where a storage is allocated."""

    op: str
    module: str  # name of the module that ran; empty outside every module
    phase: Phase
    has_vocabulary: bool  # one of its dimensions is the vocabulary size


@dataclass(slots=True)
class StepTrace:
    """Births (+n) and deaths (−n) of allocation n−1, in order; an allocation without a death lives until the step ends."""

    sizes: list[int] = field(default_factory=list)  # bytes, not rounded
    origins: list[_Origin] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    flops: dict[str, int] = field(
        default_factory=dict
    )  # by module of the forward pass, "" after it; a multiply and an add are two
    gradients: frozenset[int] = frozenset()  # allocations that hold gradients of trained parameters at the end

    def add(self, size: int, origin: _Origin) -> int:
        """Record a birth, and return its number."""
        self.sizes.append(size)
        self.origins.append(origin)
        self.events.append(len(self.sizes))
        return len(self.sizes)

    def end(self, number: int) -> None:
        self.events.append(-number)


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's __init_subclass__
    """Fills a `StepTrace` while it is active; storages of `known` tensors existed before."""

    def __init__(self, known: Iterable[torch.Tensor], vocabulary: int, device: DeviceKind) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = StepTrace()
        self.phase: Phase = "forward"
        self._vocabulary = vocabulary
        self._device: DeviceKind = device
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._alive: dict[int, int] = {}
        self._modules: list[str] = []
        self._deaths: list[weakref.ref[Any]] = []  # a weak reference that is dropped calls nothing

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0  # no value is known; `kernels` answers branches on values
        keywords = kwargs or {}
        out = func(*args, **keywords)
        scratch = [self.trace.add(size, self._origin(func, False)) for size in scratch_bytes(func, args, self._device)]
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor, func)
        for number in reversed(scratch):
            self.trace.end(number)
        packet = _IN_PLACE.get(func._overloadpacket, func._overloadpacket)
        formula = flop_registry.get(packet)
        if formula is not None:
            count = int(formula(*args, **keywords, out_val=out))
            module = self._origin(func, False).module if self.phase == "forward" else ""
            self.trace.flops[module] = self.trace.flops.get(module, 0) + count
        return out

    def gradient_storages(self, parameters: Iterable[torch.Tensor]) -> frozenset[int]:
        """The allocations that hold the parameters' gradients now."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        return frozenset(self._alive[gradient.untyped_storage()._cdata] - 1 for gradient in gradients)

    def stop(self) -> None:
        """Record no more deaths: what is alive now lives until the step ends."""
        self._deaths.clear()

    @contextmanager
    def named_modules(self, model: torch.nn.Module) -> Iterator[None]:
        """Within the block, each storage records the module that runs."""
        names = {id(module): name for name, module in model.named_modules()}

        def enter(module: torch.nn.Module, _inputs: Any) -> None:
            self._modules.append(names.get(id(module), ""))

        def leave(_module: torch.nn.Module, _inputs: Any, _output: Any) -> None:
            self._modules.pop()

        hooks = (
            torch.nn.modules.module.register_module_forward_pre_hook(enter),
            torch.nn.modules.module.register_module_forward_hook(leave, always_call=True),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _see(self, tensor: torch.Tensor, func: Any) -> None:
        if tensor.device.type != "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or key in self._alive:
            return
        origin = self._origin(func, self._vocabulary in tensor.shape)
        self._alive[key] = self.trace.add(storage.nbytes(), origin)
        self._deaths.append(weakref.ref(storage, lambda _: self.trace.end(self._alive.pop(key))))

    def _origin(self, func: Any, has_vocabulary: bool) -> _Origin:
        module = self._modules[-1] if self._modules else ""
        return _Origin(func.__name__, module, self.phase, has_vocabulary)


STEPS = 3  # the first creates the optimizer's states; after two more the reserved bytes no longer grow
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
    ended = {-event for event in trace.events if event < 0}
    never_freed = [event for event in trace.events if event > 0 and event not in ended]
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
        for number in never_freed:
            allocator.free(number)
    return _described(residents, trace, sizes, optimizer, (best, allocator.peak_reserved, where))


def _described(
    residents: Sequence[Resident],
    trace: StepTrace,
    sizes: Sequence[int],
    optimizer: OptimizerMemory,
    found: tuple[int, int, int],
) -> Peak:
    best, reserved, where = found
    components: Components = {}
    for resident in residents:
        components[resident.component] = components.get(resident.component, 0) + resident.size
    components["optimizer"] = sum(optimizer.states)
    kept = _kept_for_backward(trace)
    for number in _alive_at(trace, where):
        origin, size = trace.origins[number - 1], sizes[number - 1]
        component = _component(origin, number - 1 in trace.gradients, number in kept)
        components[component] = components.get(component, 0) + size
    at = _place(trace, where)
    if where == len(trace.events):
        components["temporary"] = components.get("temporary", 0) + max(sum(stage) for stage in optimizer.work)
    components["rounding"] = best - sum(components.values())
    return Peak(best, reserved, components, at)


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


def _component(origin: _Origin, is_gradient: bool, kept: bool) -> str:
    if is_gradient:
        return "gradients"
    if origin.has_vocabulary:
        return "logits_and_loss"
    if kept or (
        origin.phase == "backward" and origin.module
    ):  # a module that runs in the backward pass recomputes activations
        return "activations"
    return "temporary"


def _kind_of_module(name: str) -> str:
    """The same name for every block: `layers.mlp.up_proj` for `model.layers.3.mlp.up_proj`."""
    parts = [part for part in name.split(".") if not part.isdigit() and part not in ("base_model", "model", "default")]
    return ".".join(parts) or "model"


def _place(trace: StepTrace, where: int) -> str:
    if where == len(trace.events):
        return "optimizer step"
    origin = trace.origins[trace.events[where] - 1]
    module = _kind_of_module(origin.module) if origin.module else ""
    within = f", {module}" if module else ", loss" if origin.has_vocabulary else ""
    return f"{origin.phase} pass{within} ({origin.op.split('.')[0]})"
