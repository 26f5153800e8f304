"""A device that is not the CPU, for machines without a GPU: tensors on `pretend` hold values and cannot be mixed with CPU tensors.

torch without CUDA cannot move a fake tensor to CUDA, nor run its backward pass ("PyTorch is not linked with support for cuda devices"). This
is therefore a separate device, built with torch's interface for Python back ends. Each tensor wraps a CPU tensor, on which its operations run,
forward and backward. It refuses what CUDA refuses: operands on two devices (except CPU scalars and copies), a CPU generator for values
on the device, and `numpy()`. It also refuses a CPU index, which would make CUDA synchronize.

`install()` applies to the rest of the process: torch supports one such device, and it cannot be removed.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default, torch.ops.aten._copy_from.default)
CREATED = (  # created from numbers only
    torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default, torch.ops.aten.arange.default, torch.ops.aten.arange.start,
    torch.ops.aten.arange.start_step, torch.ops.aten.linspace.default, torch.ops.aten.eye.default, torch.ops.aten.randperm.default,
)  # fmt: skip
_libraries: list[torch.library.Library] = []  # registrations last as long as their library


class MixedDevicesError(RuntimeError):
    pass


class _Module:
    """The interface that torch needs of a device module such as `torch.cuda`: one device that uses the CPU's random generator."""

    def is_initialized(self) -> bool:
        return True

    is_available = is_initialized

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_rng_state(self, _: object = 0) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, _: object = 0) -> None:
        torch.set_rng_state(state)


class PretendTensor(torch.Tensor):
    """A tensor on the device; `inner` is the CPU tensor that holds its values."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> PretendTensor:
        make: Any = torch.Tensor._make_wrapper_subclass  # type: ignore[attr-defined]  # untyped in torch
        tensor: PretendTensor = make(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype, device=_get_device()
        )  # fmt: skip
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run_operation(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.cpu().tolist()  # torch returns none for subclasses

    def storage(self) -> Any:
        return self.inner.storage()  # shows which tensors share memory when they are saved

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def __repr__(self, **_: Any) -> str:
        return f"PretendTensor({self.inner})"


def install() -> torch.device:
    """Register the device with torch, once."""
    if not _libraries:
        setup: Any = _setup_privateuseone_for_python_backend
        setup(NAME, backend_module=_Module())
        library = torch.library.Library("aten", "IMPL")
        for operation in CREATED:  # No argument is a tensor with its class.
            library.impl(operation, _create_on_device(operation), "PrivateUse1")
        library.impl(torch.ops.aten._copy_from.default, _copy, "PrivateUse1")
        _libraries.append(library)
    return _get_device()


def _get_device() -> torch.device:
    return torch.device(NAME, 0)


def _create_on_device(operation: Any) -> Any:
    return lambda *args, **kwargs: _run_operation(operation, args, kwargs | {"device": _get_device()})


def _copy(source: torch.Tensor, target: torch.Tensor, _non_blocking: bool = False) -> torch.Tensor:
    _unwrap(target).copy_(_unwrap(source))
    return target


def _unwrap(value: Any) -> Any:
    return value.inner if isinstance(value, PretendTensor) else value


def _map_tree(convert: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to tuples, lists and dicts, like torch's `tree_map`, which is three times slower for arguments of operations."""
    kind = type(value)
    if kind is tuple or kind is list:
        return kind([_map_tree(convert, item_value) for item_value in value])
    return (
        {name: _map_tree(convert, item_value) for name, item_value in value.items()} if kind is dict else convert(value)
    )


def _run_operation(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run the operation on the CPU tensors. Results are on the device of the operands, or on the one that it names."""
    if (
        sys.gettrace() != threading.gettrace()
    ):  # The backward pass runs in a thread that Python does not trace by default.
        sys.settrace(threading.gettrace())
    tensors: list[torch.Tensor] = []
    _map_tree(lambda value: tensors.append(value) if isinstance(value, torch.Tensor) else None, (args, kwargs))
    is_here = any(isinstance(value, PretendTensor) for value in tensors)
    if (
        is_here
        and func not in COPIES
        and any(not isinstance(value, PretendTensor) and value.dim() for value in tensors)
    ):
        raise MixedDevicesError(f"{func}: tensors on {NAME} and on the CPU")
    named = kwargs.get("device")
    if named is not None:
        is_here = torch.device(named).type == NAME
        kwargs = kwargs | {"device": torch.device("cpu")}
    generator = kwargs.get("generator")
    if is_here and generator is not None and generator.device.type == "cpu":
        raise MixedDevicesError(f"{func}: a CPU generator for values on {NAME}")
    if func is torch.ops.aten.histc.default and not args[0].is_floating_point():
        args = (args[0].float(), *args[1:])  # CUDA supports it for integers, the CPU does not.
    result = func(*_map_tree(_unwrap, args), **_map_tree(_unwrap, kwargs))
    assert all(value.shape == _unwrap(value).shape for value in tensors), f"{func} resizes a tensor"
    written = {id(_unwrap(value)): value for value in tensors}  # An in-place operation returns the same tensor.

    def wrapped(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return written.get(id(value)) if id(value) in written else PretendTensor(value) if is_here else value

    return _map_tree(wrapped, result)
