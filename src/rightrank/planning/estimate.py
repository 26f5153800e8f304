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
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from peft.utils import get_peft_model_state_dict

from rightrank.planning.trace import (
    SAFETENSORS_CODES,
    DeviceKind,
    Skeleton,
    StepTrace,
    build_skeleton,
    trace_step,
)
from rightrank.schema.errors import ModelError, MultiLoraError, SettingsError, get_first_line
from rightrank.schema.results import RankPlan
from rightrank.schema.settings import OptimizerName, PlanSettings

SAFETENSORS_ALIGNMENT = 8  # the header is padded with spaces to a multiple of this

# Errors that a model's own code raises on tensors without values, or on kernels that meta tensors do not support.
TRACING_ERRORS = (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, IndexError, KeyError)
CUBLAS_BYTES = 8_519_680  # cuBLAS workspace from torch's allocator (`:4096:2:16:8`); 32 MiB on Hopper

CUDA_CONTEXT_BYTES = 512 * 2**20  # driver, kernels and libraries: 300 to 600 MiB by card and driver
CPU_PROCESS_BYTES = 700 * 2**20  # the interpreter with torch, transformers and peft loaded
HEADROOM = 0.03  # fraction of the reserved bytes that must stay free
# Bytes that torch's allocator reserves on CUDA for each allocated one: PEFT's three published peaks are 3.4% to 5.9% above the allocated bytes.
RESERVED_SHARE = 1.05


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

    def __init__(self, config: Any, settings: PlanSettings) -> None:
        self._config = config
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

    def share_pass(self, adapters: int) -> Estimator:
        """Return an estimator of a pass with so many adapters, on the same model."""
        variant = copy.copy(self)
        variant.settings = self.settings.model_copy(update={"adapters_per_pass": adapters})
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
        components = max((self._find_peak(inventory, step) for step in steps), key=Counter.total)
        reserved = round((RESERVED_SHARE if settings.device == "cuda" else 1) * components.total())
        needed = reserved + estimate_context_bytes(settings) + round(HEADROOM * reserved)
        return RankPlan(
            rank=rank,
            trainable_parameters=inventory.trainable_parameters,
            adapter_bytes=inventory.adapter_bytes,
            peak_bytes=components.total(),
            peak_reserved_bytes=reserved,
            needed_bytes=needed,
            components=components,
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

    def _find_peak(self, inventory: _Inventory, step: StepTrace) -> Counter[str]:
        settings = self.settings
        trained = [tensor for tensor in inventory.stored if tensor.requires_grad] * settings.adapters_per_pass
        residents = [("weights", tensor.nbytes) for tensor in inventory.stored if not tensor.requires_grad]
        residents += [("adapter", tensor.nbytes) for tensor in trained]
        residents += [("means", tensor.nbytes) for tensor in trained for _ in range(self.num_means)]
        # A product with a quantised matrix decompresses it, in both passes.
        workspace = max((weight.nbytes for weight in self.skeleton.quantised_bytes), default=0)
        residents.append(("workspace", workspace + CUBLAS_BYTES * (settings.device == "cuda")))
        states, work = estimate_optimizer_bytes(trained, settings.optim, settings.device)
        return find_peak([*residents, ("optimizer", states)], step, work)

    def get_step_trace(self, rank: int, training: bool = True) -> StepTrace:
        """Return the trace of a training step at `rank`, or of an evaluation batch if `training` is false."""
        if rank not in self._traced_ranks:
            low, high = (self._trace(end, training) for end in self._traced_ranks)
            if low.events == high.events and low.have_vocabulary == high.have_vocabulary:
                pairs = zip([*low.sizes, low.flops], [*high.sizes, high.flops], strict=True)
                values = [value for pair in pairs if (value := self._interpolate_size(*pair, rank)) is not None]
                if len(values) == len(low.sizes) + 1:
                    return replace(low, sizes=values[:-1], flops=values[-1])
        return self._trace(rank, training)

    def _trace(self, rank: int, training: bool) -> StepTrace:
        if (rank, training) not in self._traces:
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
        if (rank, arms) not in self._skeletons:
            skeleton = self._skeletons[rank, arms] = build_skeleton(self._config, self.settings, rank, arms)
            if arms == 1:  # Take the inventory now, because a trace may change the order of the parameters.
                self._inventories[rank] = _build_inventory(skeleton)
        return self._skeletons[rank, arms]


def _build_inventory(skeleton: Skeleton) -> _Inventory:
    with warnings.catch_warnings(action="ignore"):  # PEFT warns that it saves an embedding with the adapter.
        saved: dict[str, torch.Tensor] = get_peft_model_state_dict(skeleton.model)
    quantised = skeleton.quantised_bytes
    stored = (
        torch.empty(quantised[tensor], dtype=torch.uint8, device="meta") if tensor in quantised else tensor
        for tensor in (*skeleton.model.parameters(), *skeleton.model.buffers())
    )
    return _Inventory(tuple(stored), saved)


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


def find_peak(residents: Sequence[tuple[str, int]], trace: StepTrace, optimizer_work: int) -> Counter[str]:
    """Find the bytes by component at the peak of a step after the first, which creates the optimizer's states.

    Time goes to the right, a bar is the lifetime of an allocation (+n its birth in the trace, −n its death), and the peak is the column with
    the most bytes::

                     |------- forward -------|------- backward -------|- optimizer -|
        weights      ################################################################  residents: before, during and
        adapter      ################################################################  after every step
        optimizer    ################################################################  states
        activations    +n #####################################-n                      kept for the backward pass
                              ##########################
        logits                            ################
        gradients                                +n ##############################-n  freed when the step ends
        temporary      #  #  #  #  #  #  #   #  #  #  #  #  #  #         #######       workspace of one operation
                                                ^ peak

    Args:
        residents: component and bytes of each tensor that exists before and after the step.
        optimizer_work: bytes that the optimizer's step allocates and frees.
    """
    components = Counter[str]()
    for component, size in residents:
        components[component] += size
    totals = list(
        accumulate(trace.sizes[event - 1] if event > 0 else -trace.sizes[-event - 1] for event in trace.events)
    )
    peak_index = max(range(len(totals)), key=totals.__getitem__)
    if totals[-1] + optimizer_work > totals[peak_index]:
        peak_index = len(totals)
        components["temporary"] += optimizer_work
    saved_activations = _find_alive_allocations(trace.events[: trace.forward_events])
    for number in _find_alive_allocations(trace.events[: peak_index + 1]):
        if number - 1 in trace.gradients:
            component = "gradients"
        elif trace.have_vocabulary[number - 1]:
            component = "logits_and_loss"
        else:
            component = "activations" if number in saved_activations else "temporary"
        components[component] += trace.sizes[number - 1]
    return components


def _find_alive_allocations(events: Sequence[int]) -> set[int]:
    alive: set[int] = set()
    for event in events:
        if event > 0:
            alive.add(event)
        else:
            alive.discard(-event)
    return alive


MIN_8BIT_ELEMENTS = 4096  # smaller tensors keep 32-bit states
BLOCK_8BIT = 256
CODE_BYTES = 2 * 256 * 4  # two tables that decode 8-bit states
STEP_BYTES = 4  # of each parameter's step count, which the fused form keeps on the device


def estimate_optimizer_bytes(
    parameters: Sequence[torch.Tensor], name: OptimizerName, device: DeviceKind
) -> tuple[int, int]:
    """Estimate the bytes of an optimizer's states, and those that its step allocates and frees."""
    sizes = [parameter.nbytes for parameter in parameters]
    if name == "adamw_fused":
        return sum(STEP_BYTES + 2 * size for size in sizes), 0
    if name == "adamw":
        return 2 * sum(sizes), sum(sizes) if device == "cuda" else 2 * max(sizes)
    states = CODE_BYTES
    for elements in (parameter.numel() for parameter in parameters):
        blocks = math.ceil(elements / BLOCK_8BIT)
        states += 8 * elements if elements < MIN_8BIT_ELEMENTS else 2 * elements + 8 * blocks
    return states, 0
