"""Compute every rank from two traces: each size that PEFT builds or the step allocates is affine in the rank.

The traces at the lowest rank r₀ and the highest r₁ give every other rank, size(r) = size(r₀) + slope · (r − r₀) with
slope = (size(r₁) − size(r₀)) / (r₁ − r₀), if both traces have the same events and every slope is an integer number of
bytes. Otherwise every rank is traced.
"""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.utils import get_peft_model_state_dict

from rightrank.planning.peak import Peak, estimate_optimizer_memory, simulate_peak
from rightrank.planning.skeleton import SAFETENSORS_CODES, Skeleton, build_skeleton
from rightrank.planning.trace import StepTrace, trace_step
from rightrank.schema.errors import ModelError, MultiLoraError, SettingsError, get_first_line
from rightrank.schema.plan_settings import PlanSettings
from rightrank.schema.results import RankPlan

SAFETENSORS_ALIGNMENT = 8  # the header is padded with spaces to a multiple of this

# Errors that a model's own code raises on tensors without values, or on kernels that meta tensors do not support.
TRACING_ERRORS = (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, IndexError, KeyError)
UNTRACED_SETTINGS = {"optim", "memory_bytes"}  # settings that change no event of a trace
MODEL_SETTINGS = {"attn_implementation", "dtype", "load_in_4bit", "load_in_8bit"}  # settings that change its modules
CUBLAS_BYTES = 8_519_680  # cuBLAS workspace from torch's allocator (`:4096:2:16:8`); 32 MiB on Hopper

CUDA_CONTEXT_BYTES = 512 * 2**20  # driver, kernels and libraries: 300 to 600 MiB by card and driver
CPU_PROCESS_BYTES = 700 * 2**20  # the interpreter with torch, transformers and peft loaded
HEADROOM = 0.03  # fraction of the reserved bytes that must stay free


@dataclass(frozen=True, slots=True)
class _Inventory:
    """The tensors of a model with an adapter of one rank, without values. Trained tensors require a gradient."""

    stored: tuple[torch.Tensor, ...]  # parameters and buffers; shared ones once
    saved: Mapping[str, torch.Tensor]  # in the adapter's file as PEFT writes it

    @property
    def trainable_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.stored if tensor.requires_grad)

    @property
    def adapter_bytes(self) -> int:
        entries = [
            (name, SAFETENSORS_CODES[tensor.dtype], tensor.shape, tensor.itemsize)
            for name, tensor in self.saved.items()
        ]
        return compute_safetensors_bytes(entries, {"format": "pt"})


def estimate_context_bytes(settings: PlanSettings) -> int:
    """Estimate the bytes that the process needs in addition to its tensors."""
    return CUDA_CONTEXT_BYTES if settings.device == "cuda" else CPU_PROCESS_BYTES


class UntraceableError(ModelError):
    """The step of the model does not run on tensors without values, so its memory cannot be planned."""


class SharedPassError(SettingsError):
    """Adapters on this model cannot be trained in one pass; a selection then trains them one after the other."""


class Estimator:
    """Estimates for one model and one way to train it. Each model is built once, and each trace is made once."""

    def __init__(
        self, config: Any, settings: PlanSettings, on_progress: Callable[[str], None] = lambda _: None
    ) -> None:
        self._config, self._on_progress = config, on_progress
        self.settings = settings
        self.num_means = 0  # sums over steps that the training keeps of each trained tensor
        lowest, highest = min(settings.ranks), max(settings.ranks)
        self._traced_ranks = (lowest, highest if highest > lowest else 2 * lowest)
        self._skeletons: dict[tuple[int, int], Skeleton] = {}  # by rank and number of arms
        self._inventories: dict[int, _Inventory] = {}
        self.skeleton = self._get_skeleton(lowest)
        self._traces: dict[tuple[int, bool], StepTrace] = {}

    @property
    def rank_limit(self) -> int:
        """Return the largest rank that every adapted matrix allows."""
        return min(target.max_rank for target in self.skeleton.targets)

    def build_variant(self, **changes: Any) -> Estimator:
        """Return an estimator with changed settings. It shares the model unless a change is in `MODEL_SETTINGS`."""
        if "batch_size" in changes and self.settings.eval_batch_size is not None:
            changes["eval_batch_size"] = 2 * changes["batch_size"]  # as in a selection
        settings = self.settings.model_copy(update=changes)
        if not MODEL_SETTINGS.isdisjoint(changes):
            rebuilt = Estimator(self._config, settings, self._on_progress)
            rebuilt.num_means = self.num_means
            return rebuilt
        variant = copy.copy(self)
        variant.settings = settings
        if not UNTRACED_SETTINGS.issuperset(changes):
            variant._traces = {}
        return variant

    def estimate(self, rank: int) -> RankPlan:
        """Estimate any rank, by interpolation between the lowest and the highest rank of the settings.

        Raises:
            SharedPassError: several adapters cannot be trained in one pass on this model.
            UntraceableError: the step does not run on tensors without values.
        """
        settings, inventory = self.settings, self.get_inventory(rank)
        steps = [self.get_step_trace(rank, False)] if settings.eval_batch_size is not None else []
        steps.append(self.get_step_trace(rank))
        peaks = [self._simulate_peak(inventory, step) for step in reversed(steps)]
        peak = max(peaks, key=lambda peak: peak.peak_bytes)
        needed = peak.reserved_bytes + estimate_context_bytes(settings) + round(HEADROOM * peak.reserved_bytes)
        return RankPlan(
            rank=rank,
            trainable_parameters=inventory.trainable_parameters,
            adapter_bytes=inventory.adapter_bytes,
            peak_bytes=peak.peak_bytes,
            peak_reserved_bytes=peak.reserved_bytes,
            needed_bytes=needed,
            components=peak.components,
            peak_at=peak.at,
            fits=None if settings.memory_bytes is None else needed <= settings.memory_bytes,
            flops_per_step=steps[-1].flops,
        )

    def get_inventory(self, rank: int) -> _Inventory:
        """Return the tensors of the adapted model at a rank, interpolated between those that PEFT builds at the two traced ranks."""
        for end in self._traced_ranks if rank not in self._inventories else ():
            self._get_skeleton(end)
        if rank not in self._inventories:
            first, last = (self._inventories[end] for end in self._traced_ranks)
            stored = tuple(self._interpolate_tensor(rank, a, b) for a, b in zip(first.stored, last.stored, strict=True))
            saved = {
                name: self._interpolate_tensor(rank, tensor, last.saved[name]) for name, tensor in first.saved.items()
            }
            self._inventories[rank] = _Inventory(stored, saved)
        return self._inventories[rank]

    def _interpolate_tensor(self, rank: int, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        """Return the tensor at `rank` from those at the traced ranks. PEFT multiplies the rank only by integers."""
        if low.shape == high.shape:
            return low
        shape = [self._interpolate_size(a, b, rank) or 0 for a, b in zip(low.shape, high.shape, strict=True)]
        return torch.empty(shape, dtype=low.dtype, device="meta", requires_grad=low.requires_grad)

    def _interpolate_size(self, low: int, high: int, rank: int) -> int | None:
        """Return the affine value at `rank`; None if the slope is not an integer."""
        slope, remainder = divmod(high - low, self._traced_ranks[1] - self._traced_ranks[0])
        return None if remainder else low + slope * (rank - self._traced_ranks[0])

    def _simulate_peak(self, inventory: _Inventory, step: StepTrace) -> Peak:
        settings = self.settings
        trained = [tensor for tensor in inventory.stored if tensor.requires_grad] * settings.adapters_per_pass
        residents = [
            ("adapter" if tensor.requires_grad else "weights", tensor.nbytes)
            for tensor in inventory.stored
            for _ in range(settings.adapters_per_pass if tensor.requires_grad else 1)
        ]
        residents += [("means", tensor.nbytes) for tensor in trained for _ in range(self.num_means)]
        if settings.device == "cuda":
            residents.append(("workspace", CUBLAS_BYTES))
        optimizer = estimate_optimizer_memory(trained, settings.optim, settings.device)
        return simulate_peak(residents, step, optimizer, settings.device)

    def get_step_trace(self, rank: int, training: bool = True) -> StepTrace:
        """Return the trace of a training step at `rank`, or of an evaluation batch if `training` is false."""
        if rank not in self._traced_ranks:
            low, high = (self._trace(end, training) for end in self._traced_ranks)
            if low.events == high.events and low.origins == high.origins:
                pairs = zip([*low.sizes, low.flops], [*high.sizes, high.flops], strict=True)
                values = [value for pair in pairs if (value := self._interpolate_size(*pair, rank)) is not None]
                if len(values) == len(low.sizes) + 1:
                    return replace(low, sizes=values[:-1], flops=values[-1])
        return self._trace(rank, training)

    def _trace(self, rank: int, training: bool) -> StepTrace:
        if (rank, training) not in self._traces:
            step = "a step" if training else "an evaluation"
            self._on_progress(f"tracing {step} of rank {rank}")
            skeleton = self._get_skeleton(rank, self.settings.adapters_per_pass)
            try:
                self._traces[rank, training] = trace_step(skeleton, self.settings, training)
            except MultiLoraError as error:
                raise SharedPassError(
                    f"adapters_per_pass: this model cannot train several adapters in one pass ({error}); leave it out, or give 1"
                ) from None
            except TRACING_ERRORS as error:
                raise UntraceableError(
                    f"the memory of {self._config.model_type} cannot be planned, because its training step cannot be traced "
                    f"({type(error).__name__}: {get_first_line(error)})"
                ) from None
        return self._traces[rank, training]

    def _get_skeleton(self, rank: int, arms: int = 1) -> Skeleton:
        """Return the model with adapters of this rank."""
        if (rank, arms) not in self._skeletons:
            skeleton = self._skeletons[rank, arms] = build_skeleton(self._config, self.settings, rank, arms)
            if arms == 1:  # Take the inventory now, because a trace may change the order of the parameters.
                self._inventories[rank] = _build_inventory(skeleton)
        return self._skeletons[rank, arms]


def _build_inventory(skeleton: Skeleton) -> _Inventory:
    with warnings.catch_warnings(action="ignore"):  # PEFT warns that it saves an embedding with the adapter.
        saved: dict[str, torch.Tensor] = get_peft_model_state_dict(skeleton.model)
    return _Inventory((*skeleton.model.parameters(), *skeleton.model.buffers()), saved)


def compute_safetensors_bytes(
    tensors: Sequence[tuple[str, str, Sequence[int], int]], metadata: Mapping[str, str] | None = None
) -> int:
    """Compute the size of a safetensors file with these tensors, each `(name, dtype code, shape, bytes per element)`.

    The file has 8 bytes for the header's length, the header (JSON without spaces, sorted by descending element size and then
    by name, padded) and the data without gaps. https://github.com/huggingface/safetensors#format
    """
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for name, code, shape, element in sorted(tensors, key=lambda tensor: (-tensor[3], tensor[0])):
        size = math.prod(shape) * element
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // SAFETENSORS_ALIGNMENT) * SAFETENSORS_ALIGNMENT + position
