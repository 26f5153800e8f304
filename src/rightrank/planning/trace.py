"""The allocations of a training step, in order: the real step on meta tensors, each storage from birth to death.

A meta tensor has a shape, a type and a storage without memory. The model's own code, autograd and PEFT run on meta
tensors unchanged; a dispatch mode records each new storage, and a finalizer records its end. The kernels are those of
the device that is planned for (see `kernels`), which also gives the workspace that a kernel allocates inside itself.

torch's own tracker (`torch.distributed._tools.mem_tracker` under `FakeTensorMode`) is less exact here and cannot plan
for CUDA on a machine without it; `docs/explanation/dependencies.md` gives the figures.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from rightrank.planning.kernels import DeviceKind, scratch_bytes

Phase: TypeAlias = Literal["forward", "backward"]

# torch's table of operation counts lists these under the variants that do not write in place.
_IN_PLACE: dict[Any, Any] = {
    torch.ops.aten.baddbmm_: torch.ops.aten.baddbmm,
    torch.ops.aten.addmm_: torch.ops.aten.addmm,
}


@dataclass(frozen=True, slots=True)
class Origin:
    """The place in the step where a storage is allocated."""

    op: str
    module: str  # name of the module that ran; empty outside every module
    phase: Phase
    has_vocabulary: bool  # one of its dimensions is the vocabulary size


@dataclass(slots=True)
class StepTrace:
    """Births (+n) and deaths (−n) of allocation n−1, in order; an allocation without a death lives until the step ends."""

    sizes: list[int] = field(default_factory=list)  # bytes, not rounded
    origins: list[Origin] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)  # of each event
    flops: dict[int, int] = field(default_factory=dict)  # by segment; a multiply and an add count as two
    gradients: frozenset[int] = frozenset()  # allocations that hold gradients of trained parameters at the end

    def add(self, size: int, origin: Origin, segment: int) -> int:
        """Record a birth, and return its number."""
        self.sizes.append(size)
        self.origins.append(origin)
        self.events.append(len(self.sizes))
        self.segments.append(segment)
        return len(self.sizes)

    def end(self, number: int, segment: int) -> None:
        self.events.append(-number)
        self.segments.append(segment)


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's __init_subclass__
    """Fills a `StepTrace` while it is active; storages of `known` tensors existed before."""

    def __init__(self, known: Iterable[torch.Tensor], vocabulary: int, device: DeviceKind) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = StepTrace()
        self.phase: Phase = "forward"
        self.segment = 0
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
        scratch = [
            self.trace.add(size, self._origin(func, False), self.segment)
            for size in scratch_bytes(func, args, self._device)
        ]
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor, func)
        for number in reversed(scratch):
            self.trace.end(number, self.segment)
        packet = _IN_PLACE.get(func._overloadpacket, func._overloadpacket)
        formula = flop_registry.get(packet)
        if formula is not None:
            self._count_flops(int(formula(*args, **keywords, out_val=out)))
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
        self._alive[key] = self.trace.add(storage.nbytes(), origin, self.segment)
        self._deaths.append(weakref.ref(storage, lambda _: self.trace.end(self._alive.pop(key), self.segment)))

    def _origin(self, func: Any, has_vocabulary: bool) -> Origin:
        module = self._modules[-1] if self._modules else ""
        return Origin(func.__name__, module, self.phase, has_vocabulary)

    def _count_flops(self, count: int) -> None:
        self.trace.flops[self.segment] = self.trace.flops.get(self.segment, 0) + count
