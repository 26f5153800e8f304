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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from peft.utils import get_peft_model_state_dict

from rightrank.planning.trace import (
    SAFETENSORS_CODES,
    DeviceKind,
    Origin,
    Skeleton,
    StepTrace,
    build_skeleton,
    trace_step,
)
from rightrank.schema.errors import ModelError, MultiLoraError, SettingsError, get_first_line
from rightrank.schema.results import Components, RankPlan
from rightrank.schema.settings import OptimizerName, PlanSettings

SAFETENSORS_ALIGNMENT = 8  # the header is padded with spaces to a multiple of this

# Errors that a model's own code raises on tensors without values, or on kernels that meta tensors do not support.
TRACING_ERRORS = (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, IndexError, KeyError)
UNTRACED_SETTINGS = {"optim", "memory_bytes"}  # settings that change no event of a trace
MODEL_SETTINGS = {"attn_implementation", "dtype", "load_in_4bit", "load_in_8bit"}  # settings that change its modules
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
        peak = max((self._find_peak(inventory, step) for step in reversed(steps)), key=lambda peak: peak.peak_bytes)
        reserved = round(RESERVED_SHARE * peak.peak_bytes) if settings.device == "cuda" else peak.peak_bytes
        needed = reserved + estimate_context_bytes(settings) + round(HEADROOM * reserved)
        return RankPlan(
            rank=rank,
            trainable_parameters=inventory.trainable_parameters,
            adapter_bytes=inventory.adapter_bytes,
            peak_bytes=peak.peak_bytes,
            peak_reserved_bytes=reserved,
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

    def _find_peak(self, inventory: _Inventory, step: StepTrace) -> Peak:
        settings = self.settings
        trained = [tensor for tensor in inventory.stored if tensor.requires_grad] * settings.adapters_per_pass
        residents = [("weights", tensor.nbytes) for tensor in inventory.stored if not tensor.requires_grad]
        residents += [("adapter", tensor.nbytes) for tensor in trained]
        residents += [("means", tensor.nbytes) for tensor in trained for _ in range(self.num_means)]
        # A product with a quantised matrix decompresses it, in both passes.
        workspace = max((weight.nbytes for weight in self.skeleton.quantised_bytes), default=0)
        residents.append(("workspace", workspace + CUBLAS_BYTES * (settings.device == "cuda")))
        return find_peak(residents, step, estimate_optimizer_memory(trained, settings.optim, settings.device))

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


@dataclass(frozen=True, slots=True)
class Peak:
    """The peak memory of a step."""

    peak_bytes: int
    components: Components  # bytes by component; they add up to peak_bytes
    at: str  # where in the step


def find_peak(residents: Sequence[tuple[str, int]], trace: StepTrace, optimizer: OptimizerMemory) -> Peak:
    """Find the largest total of a step after the first, which creates the optimizer's states.

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
    """
    components: Components = Counter()
    for component, size in [*residents, ("optimizer", sum(optimizer.states))]:
        components[component] += size
    totals = list(
        accumulate(trace.sizes[event - 1] if event > 0 else -trace.sizes[-event - 1] for event in trace.events)
    )
    peak_index = max(range(len(totals)), key=totals.__getitem__)
    work = max(map(sum, optimizer.work), default=0)
    if totals[-1] + work > totals[peak_index]:
        peak_index = len(totals)
        components["temporary"] += work
    births = ((index, trace.origins[event - 1].phase) for index, event in enumerate(trace.events) if event > 0)
    backward = next((index for index, phase in births if phase == "backward"), len(trace.events))
    saved_activations = _find_alive_allocations(trace, backward - 1)
    for number in _find_alive_allocations(trace, peak_index):
        component = _classify_allocation(
            trace.origins[number - 1], number - 1 in trace.gradients, number in saved_activations
        )
        components[component] += trace.sizes[number - 1]
    return Peak(sum(components.values()), components, _describe_location(trace, peak_index))


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
