"""Multi-LoRA: several adapters on one base, each a PEFT adapter with its own name, trained in one pass.

PEFT matches the target modules, creates the adapters and saves them. Arms can be added and removed at any time.

Each arm owns a contiguous span of a batch's rows (`Routing`). In a linear layer, y = x·W₀ᵀ + s·(x·Aᵀ)·Bᵀ with the A and B of each row's arm:
the product with the base weight runs once over all rows, and the products with the adapters run in groups. Neighbouring arms of equal rank
and equally many rows form one batched product. Ranks are never padded, so an arm multiplies the same shapes as it does alone, and no row is
multiplied by another arm's tensors, so a NaN stays in its arm.

Example. Arm `a` has rank 2 and 5 tokens, arm `b` has rank 4 and 3 tokens. They share a layer of 16 inputs and 8 outputs;
their examples are packed into one row::

    x                    [1, 8, 16]     rows 0…4 are a's, rows 5…7 are b's
    x·W₀ᵀ                [8, 8]         one product for both arms
    group a: x[0:5]      [1, 5, 16]     A [1, 2, 16] → middle [1, 5, 2]     B [1, 8, 2] → added to y[0:5]
    group b: x[5:8]      [1, 3, 16]     A [1, 4, 16] → middle [1, 3, 4]     B [1, 8, 4] → added to y[5:8]

With rank 2 and 5 tokens for both arms, x has 10 rows and there is one group: x [2, 5, 16], A [2, 2, 16], B [2, 8, 2].

Adapter tensors are float32 and are cast to the dtype of the activations for the products. Punica's SGMV kernel (Chen et
al. 2023) groups rows by adapter in the same way, for inference.

A layer's `AdapterKind` says how PEFT adapts it; the first entry of `KINDS` that claims a layer describes it, and `adapters.adapter_files` describes
the saved tensors. A kind keeps two promises. `initialize` leaves the function of the base model unchanged, and an adapter of rank r starts
with the first r rows of the draw of a larger one, so arms of one seed differ only in their additional rows. The distributions are PEFT's: A is
uniform in ±1/√in_features (`default`) or normal with standard deviation 1/r (`gaussian`), and B is zero. `forward` computes for the rows of an
adapter what PEFT's forward pass computes for them.

DoRA (Liu et al. 2024): W = m · (W₀ + s·B·A) / ‖W₀ + s·B·A‖, with a trained magnitude m for each row of W. PEFT initializes the
magnitudes to ‖W₀‖, so that an untrained adapter changes nothing. The norm of a row depends on the adapter, and the backward pass treats
it as a constant, as PEFT does.

The adapter of fused experts is added to their parameter before the layer runs, so one pass holds one adapter.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper

from rightrank.adapters.adapter_folders import name_experts
from rightrank.data.token_store import IGNORED
from rightrank.evaluation.batches import Batch
from rightrank.evaluation.device import set_training_mode
from rightrank.evaluation.peft_models import ADAPTER, find_lora_modules, suppress_peft_warnings, unwrap_base
from rightrank.schema.errors import MultiLoraError
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import Arm


@dataclass(frozen=True, slots=True)
class RowSpan:
    """The rows of one arm in a layer's flattened input."""

    adapter: str
    rows: int
    dropout_seed: int | None  # None: no dropout
    solo_rows: int  # number of rows if the arm trains alone, for which the dropout mask is drawn
    solo_index: torch.Tensor | None  # [rows], the index of each row among them; None: the same rows


@dataclass(slots=True)
class Routing:
    """The rows of each adapter in the current batch, for every number of rows that a layer may see."""

    adapters: tuple[str, ...]
    dropout_seeds: tuple[int | None, ...]
    layouts: dict[int, list[RowSpan]] = field(default_factory=dict)  # by the number of rows of the flattened input

    @classmethod
    def from_padded(
        cls, adapters: Sequence[str], seeds: Sequence[int | None], rows: Sequence[int], lengths: Sequence[int]
    ) -> Routing:
        """Create the routing of arms of `rows[i]` examples of length `lengths[i]`, all padded to the longest length."""
        longest = max(lengths)
        by_example = [
            RowSpan(name, count, seed, count, None) for name, seed, count in zip(adapters, seeds, rows, strict=True)
        ]
        by_token: list[RowSpan] = []
        for name, seed, count, length in zip(adapters, seeds, rows, lengths, strict=True):
            index = None
            if length < longest:  # the row of each position in the unpadded layout; padding may take any row
                columns = torch.arange(longest).clamp(max=length - 1)
                index = (torch.arange(count)[:, None] * length + columns).reshape(-1)
            by_token.append(RowSpan(name, count * longest, seed, count * length, index))
        return cls(tuple(adapters), tuple(seeds), {sum(rows): by_example, sum(rows) * longest: by_token})

    def find_spans(self, rows: int) -> list[RowSpan]:
        """Return the span of each arm in a flattened input of `rows` rows.

        Raises:
            MultiLoraError: There is more than one arm, and `rows` is the number neither of the batch's examples nor of its tokens.
        """
        spans = self.layouts.get(rows)
        if spans is not None:
            return spans
        if len(self.adapters) == 1:
            return [RowSpan(self.adapters[0], rows, self.dropout_seeds[0], rows, None)]
        raise MultiLoraError(f"a layer sees {rows} rows that can't be assigned to arms")

    @contextmanager
    def restrict_rows(self, mask: torch.Tensor) -> Iterator[None]:
        """Let layers within the block also see only the rows of the flattened batch that `mask` [b·n] selects."""
        by_token = self.layouts[mask.numel()]
        spans: list[RowSpan] = []
        begin = 0
        for span in by_token:
            chosen = mask[begin : begin + span.rows].nonzero()[:, 0]
            begin += span.rows
            index = chosen if span.solo_index is None else span.solo_index.to(chosen.device)[chosen]
            spans.append(RowSpan(span.adapter, len(chosen), span.dropout_seed, span.solo_rows, index))
        total = sum(span.rows for span in spans)
        previous_layouts = self.layouts
        self.layouts = previous_layouts | {total: spans}
        try:
            yield
        finally:
            self.layouts = previous_layouts


def run_linear_layer(module: Any, routing: Routing, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Run PEFT's linear layer `module` with the adapter of each row."""
    base = module.base_layer
    groups = _group_spans(module, routing, x.shape[:-1].numel())
    adapters = [span.adapter for group in groups for span in group.spans]
    tensors = [factors[adapter].weight for factors in (module.lora_A, module.lora_B) for adapter in adapters]
    apply: Any = _LoraLinear.apply  # untyped in torch
    # A plain frozen linear layer runs in one operation with its adapters; any other keeps its own forward pass.
    frozen = type(base) is torch.nn.Linear and not any(p.requires_grad for p in base.parameters())
    if frozen and base.weight.dtype == x.dtype:
        y: torch.Tensor = apply(x, base.weight, base.bias, module.out_features, groups, *tensors)
        return y
    result: torch.Tensor = base(x, *args, **kwargs)
    update: torch.Tensor = apply(x, None, None, module.out_features, groups, *tensors)
    return result + update.to(result.dtype)


@dataclass(frozen=True, slots=True)
class _RowGroup:
    """Neighbouring spans of equal rank and equally many rows: g arms in one batched product."""

    begin: int
    end: int
    spans: tuple[RowSpan, ...]
    scales: tuple[float, ...]
    dropout: float
    salt: int  # differs between layers, so that each of them draws another dropout mask

    def make_dropout_mask(self, width: int, like: torch.Tensor) -> torch.Tensor | None:
        """Return the dropout mask [g, rows, width] with values 0 and 1/(1-p), or None without dropout.

        The mask is a function of the arm's seed and the layer, so gradient checkpointing draws the same one again.
        """
        if self.dropout == 0 or self.spans[0].dropout_seed is None:
            return None
        masks: list[torch.Tensor] = []
        for span in self.spans:
            assert span.dropout_seed is not None
            generator = torch.Generator().manual_seed((span.dropout_seed * 0x9E3779B1 + self.salt) % 2**63)
            is_kept = torch.rand((span.solo_rows, width), generator=generator) >= self.dropout
            mask = is_kept if span.solo_index is None else is_kept[span.solo_index.cpu()]
            masks.append(mask / (1 - self.dropout))
        return torch.stack(masks).to(like)


def _group_spans(module: Any, routing: Routing, rows: int) -> list[_RowGroup]:
    """Group neighbouring arms of equal rank and equally many rows, in order."""
    groups: list[_RowGroup] = []
    begin = 0
    spans = routing.find_spans(rows)
    for (_, num_rows), neighbours in groupby(spans, key=lambda span: (module.r[span.adapter], span.rows)):
        group = tuple(neighbours)
        end = begin + num_rows * len(group)
        dropout = module.lora_dropout[group[0].adapter]
        rate = float(dropout.p) if isinstance(dropout, torch.nn.Dropout) else 0.0
        scales = tuple(float(module.scaling[span.adapter]) for span in group)
        groups.append(_RowGroup(begin, end, group, scales, rate, module.rightrank_salt))
        begin = end
    return groups


class _LoraLinear(torch.autograd.Function):
    """`x·Wᵀ + bias` (zero if W is None) plus the output of every group's adapters, added in place."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        out_features: int,
        groups: list[_RowGroup],
        *adapters: torch.Tensor,  # the A of every arm in the order of the groups, then the B
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = rows.new_zeros(rows.shape[0], out_features) if weight is None else F.linear(rows, weight, bias)
        middles: list[torch.Tensor] = []
        for group, (a, b) in zip(groups, _stack_factors(groups, adapters, x.dtype), strict=True):
            inputs = _view_rows(rows, group)
            mask = group.make_dropout_mask(x.shape[-1], x)
            middle = torch.bmm(inputs if mask is None else inputs * mask, a.mT) * _get_scale(group, x)
            _view_rows(y, group).baddbmm_(middle, b.mT)
            middles.append(middle)
        ctx.groups, ctx.shape, ctx.count = groups, x.shape, len(adapters)
        ctx.save_for_backward(x, weight, *middles, *adapters)
        # A model may write into the output, as OLMo's clamp_ does, and torch forbids this for a view that a Function returns.
        output: torch.Tensor = torch.ops.aten._unsafe_view(y, [*x.shape[:-1], out_features])
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        x, weight, *saved_tensors = ctx.saved_tensors
        groups: list[_RowGroup] = ctx.groups
        middles, adapters = saved_tensors[: len(groups)], saved_tensors[len(groups) :]
        rows = x.reshape(-1, x.shape[-1])
        dy = gradients[0].reshape(-1, gradients[0].shape[-1])
        dx: torch.Tensor | None = None
        if ctx.needs_input_grad[0]:
            dx = torch.zeros_like(rows) if weight is None else dy @ weight
        das: list[torch.Tensor] = []
        dbs: list[torch.Tensor] = []
        for group, middle, (a, b) in zip(groups, middles, _stack_factors(groups, adapters, x.dtype), strict=True):
            mask = group.make_dropout_mask(x.shape[-1], x)
            inputs = _view_rows(rows, group)
            outputs = _view_rows(dy, group)
            dmiddle = torch.bmm(outputs, b) * _get_scale(group, x)
            dbs.extend(torch.bmm(outputs.mT, middle).float())
            das.extend(torch.bmm(dmiddle.mT, inputs if mask is None else inputs * mask).float())
            if dx is not None and mask is None:
                _view_rows(dx, group).baddbmm_(dmiddle, a)
            elif dx is not None and mask is not None:
                _view_rows(dx, group).add_(torch.bmm(dmiddle, a) * mask)
        return (None if dx is None else dx.view(ctx.shape), None, None, None, None, *das, *dbs)


def _stack_factors(
    groups: Sequence[_RowGroup], adapters: Sequence[torch.Tensor], dtype: torch.dtype
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield `(A [g, r, in], B [g, out, r])` of each group, in `dtype`."""
    count = len(adapters) // 2
    begin = 0
    for group in groups:
        end = begin + len(group.spans)
        yield (
            _stack_tensors(adapters[begin:end]).to(dtype),
            _stack_tensors(adapters[count + begin : count + end]).to(dtype),
        )
        begin = end


def _stack_tensors(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([tensor.detach() for tensor in tensors])


def _view_rows(rows: torch.Tensor, group: _RowGroup) -> torch.Tensor:
    """Return a view [g, rows per arm, features] of the group's rows."""
    return rows[group.begin : group.end].view(len(group.spans), -1, rows.shape[-1])


def _get_scale(group: _RowGroup, like: torch.Tensor) -> torch.Tensor | float:
    if len(set(group.scales)) == 1:
        return group.scales[0]
    return torch.tensor(group.scales, dtype=like.dtype, device=like.device)[:, None, None]


@dataclass(frozen=True, slots=True)
class InitialDraw:
    """The random numbers that an adapter starts from, a function of the arm's seed and the module's name."""

    seed: int
    module: str
    init: str  # the value of `init_lora_weights`

    def draw_rows(self, rank: int, width: int, *index: int) -> torch.Tensor:
        """Draw [rank, width] in float32, uniform in ±1/√width or normal with standard deviation 1/rank.

        Rows are drawn one after the other, so a lower rank gets the first rows. `index` numbers the matrices of a module.
        """
        generator = self._make_generator(*index)
        if self.init == "gaussian":
            return torch.from_numpy(generator.standard_normal((rank, width)) / rank).float()
        bound = 1 / math.sqrt(width)
        return torch.from_numpy(generator.uniform(-bound, bound, (rank, width))).float()

    def draw_normal(self, rank: int, width: int) -> torch.Tensor:
        """Draw [rank, width] in float64 from a standard normal; a lower rank gets the first rows."""
        return torch.from_numpy(self._make_generator().standard_normal((rank, width)))

    def _make_generator(self, *index: int) -> np.random.Generator:
        digest = hashlib.sha256(self.module.encode()).digest()
        return np.random.default_rng([self.seed, int.from_bytes(digest[:8], "big"), *index])


class AdapterKind(ABC):
    """One way in which PEFT adapts a layer. The defaults describe s·B·A with matrices A and B."""

    label: ClassVar[str]  # in messages, with its article: "an embedding"
    can_share_pass: ClassVar[bool] = (
        False  # whether several adapters run in one pass; if not, PEFT's own forward pass runs one
    )
    can_truncate: ClassVar[bool] = True

    @abstractmethod
    def can_adapt(self, module: Any) -> bool:
        """Return whether PEFT's layer `module` (a `LoraLayer`) carries adapters of this kind."""

    def get_shapes(self, module: Any) -> list[tuple[str, int, int]]:
        """Return `(suffix of the module's name, rows, columns)` of each matrix ΔW; the suffix is empty for a single one."""
        return [("", int(module.out_features), int(module.in_features))]

    def initialize(self, module: Any, adapter: str, draw: InitialDraw) -> None:
        """Set the adapter's tensors to their initial values. PEFT gives the factors of an embedding the opposite roles."""
        if adapter in module.lora_embedding_A:
            b = module.lora_embedding_B[adapter]
            module.lora_embedding_A[adapter].zero_()
            b.copy_(draw.draw_normal(b.shape[1], b.shape[0]).T.to(b))
            return
        a = module.lora_A[adapter].weight
        a.copy_(draw.draw_rows(a.shape[0], a[0].numel()).view_as(a).to(a))
        module.lora_B[adapter].weight.zero_()

    def forward(self, module: Any, routing: Routing, *args: Any, **kwargs: Any) -> Any:
        """Run the forward pass in place of the module's own: each row with the tensors of its adapter.

        The default runs PEFT's own pass with the only adapter of the batch.
        """
        if len(routing.adapters) > 1:
            raise MultiLoraError(f"{self.label} trains alone, through PEFT's own forward pass")
        with _enable_dropout(module, routing.adapters[0], routing.dropout_seeds[0]):
            return type(module).forward(module, *args, **kwargs)


@contextmanager
def _enable_dropout(module: Any, adapter: str, seed: int | None) -> Iterator[None]:
    """Put PEFT's layer in training mode within the block, with dropout drawn from the seed and the layer; do nothing if the seed is None.

    The layers inside keep their mode. Gradient checkpointing computes a layer again and draws the same mask.
    """
    if seed is None:
        yield
        return
    dropout = module.lora_dropout[adapter]
    draws = isinstance(dropout, torch.nn.Dropout)
    with torch.random.fork_rng(enabled=draws):
        if draws:
            torch.manual_seed((seed * 0x9E3779B1 + module.rightrank_salt) % 2**63)
        with set_training_mode(True, [layer for layer in (module, dropout) if not layer.training]):
            yield


class Linear(AdapterKind):
    """A `torch.nn.Linear`, transformers' `Conv1D`, or a quantised linear layer."""

    label = "a linear layer"
    can_share_pass = True

    def can_adapt(self, module: Any) -> bool:
        has_other_wrapper = type(module).__name__ in ("ParamWrapper", "MultiheadAttention")
        if module.lora_variant or any(module.lora_bias.values()) or has_other_wrapper:
            return False
        # A maps the layer's inputs and B its outputs, as PEFT has it for every linear layer and no other.
        return bool(module.lora_A) and all(
            isinstance(a, torch.nn.Linear)
            and (a.in_features, b.out_features) == (module.in_features, module.out_features)
            for a, b in zip(module.lora_A.values(), module.lora_B.values(), strict=True)
        )

    def forward(self, module: Any, routing: Routing, *args: Any, **kwargs: Any) -> Any:
        return run_linear_layer(module, routing, *args, **kwargs)


class _Embedding(AdapterKind):
    label = "an embedding"

    def can_adapt(self, module: Any) -> bool:
        return isinstance(module.base_layer, torch.nn.Embedding) and not module.lora_variant


class _Dora(AdapterKind):
    label = "DoRA"

    def can_adapt(self, module: Any) -> bool:
        variants = [type(variant).__name__ for variant in module.lora_variant.values()]
        return bool(variants) and all(name.startswith("Dora") for name in variants)


class _UnknownKind(AdapterKind):
    label = "an adapter of an unknown kind"
    can_truncate = False  # the meaning of its tensors is unknown

    def can_adapt(self, module: Any) -> bool:
        return True

    def initialize(self, module: Any, adapter: str, draw: InitialDraw) -> None:
        """Keep PEFT's own initialization, which uses the arm's seed.

        A plain layer whose only difference is a bias of B (`lora_bias`) is initialized as a linear layer.
        """
        if any(module.lora_bias.values()) and not module.lora_variant and adapter in module.lora_A:
            super().initialize(module, adapter, draw)


class FusedExperts(AdapterKind):
    label = "adapters on fused experts (target_parameters)"

    def can_adapt(self, module: Any) -> bool:
        return type(module).__name__ == "ParamWrapper" and not module.lora_variant

    def get_shapes(self, module: Any) -> list[tuple[str, int, int]]:
        rows, columns = int(module.out_features), int(module.in_features)
        return [(name, rows, columns) for name in name_experts(module.parameter_name, int(module.num_experts))]

    def initialize(self, module: Any, adapter: str, draw: InitialDraw) -> None:
        a, experts = module.lora_A[adapter].weight, int(module.num_experts)
        rank = a.shape[0] // experts
        drawn = [draw.draw_rows(rank, a.shape[1], expert) for expert in range(experts)]
        a.copy_(torch.cat(drawn).to(a))
        module.lora_B[adapter].weight.zero_()


# The first kind that claims a module describes it; the last one claims any module.
KINDS: tuple[AdapterKind, ...] = (FusedExperts(), _Dora(), _Embedding(), Linear(), _UnknownKind())


def find_kind(module: Any) -> AdapterKind:
    return next(kind for kind in KINDS if kind.can_adapt(module))


def install_forward(name: str, module: Any, current_routing: Callable[[], Routing | None]) -> None:
    """Replace the forward pass of an adapted module (PEFT's LoraLayer or ModulesToSaveWrapper) with one that routes rows to adapters.

    Without a routing, the pass is that of the base.
    """
    is_saved = isinstance(module, ModulesToSaveWrapper)
    route_rows = partial(_forward_saved_module if is_saved else find_kind(module).forward, module)
    # The number differs between layers, so that each layer draws its own dropout.
    vars(module)["rightrank_salt"] = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")

    def forward(*args: Any, **kwargs: Any) -> Any:
        routing = current_routing()
        if routing is not None:
            return route_rows(routing, *args, **kwargs)
        return (module.original_module if is_saved else module.base_layer)(*args, **kwargs)

    vars(module)["forward"] = forward


def _forward_saved_module(module: Any, routing: Routing, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Run a module of `modules_to_save`: each arm trains its own copy, and each arm's rows go through that copy."""
    if len(routing.adapters) == 1:
        return module.modules_to_save[routing.adapters[0]](x, *args, **kwargs)
    dim = 1 if x.shape[0] == 1 else 0  # packed: one row of tokens; padded: one row per example
    segments = routing.find_spans(x.shape[dim])
    inputs = torch.split(x, [segment.rows for segment in segments], dim=dim)
    outputs = [
        module.modules_to_save[segment.adapter](segment_input, *args, **kwargs)
        for segment, segment_input in zip(segments, inputs, strict=True)
    ]
    return torch.cat(outputs, dim=dim)


@dataclass(frozen=True, slots=True)
class ArmBatch:
    adapter: str
    batch: Batch
    scale: float  # factor of every label loss
    dropout_seed: int | None  # None: no dropout


class MultiLora:
    """The adapters on a base. Use it as a context manager: leaving the block removes every adapter and restores the base."""

    def __init__(self, model: Any, settings: SelectSettings) -> None:
        self._model = model
        self._settings = settings
        self.peft_model: Any = None  # None without an adapter
        self._names: list[str] = []
        self.routing: Routing | None = None

    def __enter__(self) -> MultiLora:
        return self

    def __exit__(self, *_: object) -> None:
        for adapter in list(self._names):
            self.remove(adapter)

    def add(self, adapter: str, arm: Arm, config: LoraConfig) -> dict[str, torch.nn.Parameter]:
        """Add an adapter with initial values; return its trainable tensors under the names that they have with a single PEFT adapter."""
        with torch.random.fork_rng(), suppress_peft_warnings():
            torch.manual_seed(arm.seed)  # for modules that only PEFT initialises
            if self.peft_model is None:
                self.peft_model = self._wrap_model(config, adapter)
            else:
                self.peft_model.add_adapter(adapter, config)
        self._names.append(adapter)
        with torch.no_grad():
            for name, module in find_lora_modules(self.peft_model).items():
                if adapter in module.lora_A or adapter in module.lora_embedding_A:
                    draw = InitialDraw(arm.seed, name, self._settings.init_lora_weights)
                    find_kind(module).initialize(module, adapter, draw)
        self._activate_adapters()
        parameters: dict[str, torch.nn.Parameter] = {}
        for name, parameter in self.peft_model.named_parameters():
            components = name.split(".")
            if adapter in components:
                parameters[".".join(ADAPTER if component == adapter else component for component in components)] = (
                    parameter
                )
        return parameters

    def _wrap_model(self, config: LoraConfig, adapter: str) -> Any:
        """Wrap the base with PEFT's model. New modules are in evaluation mode; the base's modules keep their mode."""
        training_modules = [module for module in self._model.modules() if module.training]  # checkpointed blocks
        peft_model: Any = get_peft_model(self._model, config, adapter_name=adapter)
        peft_model.train(False)
        for module in training_modules:
            module.training = True
        return peft_model

    def remove(self, adapter: str) -> None:
        if adapter not in self._names:
            return
        self._names.remove(adapter)
        if not self._names:
            unwrap_base(self.peft_model)
            self.peft_model = None
            return
        if adapter == self.peft_model.active_adapter:  # PEFT fails if it is deleted
            self.peft_model.set_adapter(
                self._names[-1]
            )  # the newest, because arms usually end in the order in which they began
            self._activate_adapters()
        self.peft_model.delete_adapter(adapter)

    @contextmanager
    def route(
        self, arm_batches: Sequence[ArmBatch], pad_id: int, packed: bool = False
    ) -> Iterator[tuple[Batch, Routing]]:
        """Yield one padded batch of all arms' rows. Within the block each row, padded or packed, goes to the adapter of its arm."""
        batch = _concatenate([arm_batch.batch for arm_batch in arm_batches], pad_id)
        names = [arm_batch.adapter for arm_batch in arm_batches]
        seeds = [arm_batch.dropout_seed for arm_batch in arm_batches]
        rows = [arm_batch.batch.sequences for arm_batch in arm_batches]
        lengths = [arm_batch.batch.input_ids.shape[1] for arm_batch in arm_batches]
        if packed:  # each token is a row of its own
            rows, lengths = [arm_batch.batch.tokens for arm_batch in arm_batches], [1] * len(rows)
        with self.use_routing(Routing.from_padded(names, seeds, rows, lengths)) as routing:
            yield batch, routing

    @contextmanager
    def use_routing(self, routing: Routing) -> Iterator[Routing]:
        self.routing = routing
        try:
            yield routing
        finally:
            self.routing = None

    def _activate_adapters(self) -> None:
        """Make every adapter trainable, not only PEFT's active one, and install the multi-LoRA forward pass."""
        names = set(self._names)
        for name, parameter in self.peft_model.named_parameters():
            if not parameter.requires_grad and not names.isdisjoint(name.split(".")):
                parameter.requires_grad_(True)
        for name, module in self._model.named_modules():
            if isinstance(module, LoraLayer | ModulesToSaveWrapper) and "forward" not in module.__dict__:
                install_forward(name, module, lambda: self.routing)


def _concatenate(batches: Sequence[Batch], pad_id: int) -> Batch:
    if len(batches) == 1:
        return batches[0]
    longest = max(batch.input_ids.shape[1] for batch in batches)
    labels = [batch.labels for batch in batches]
    references = [batch.reference for batch in batches if batch.reference is not None]
    return Batch(
        _pad([batch.input_ids for batch in batches], longest, pad_id),
        _pad([batch.attention_mask for batch in batches], longest, 0),
        torch.cat(labels) if labels[0].dim() == 1 else _pad(labels, longest, IGNORED),
        tuple(index for batch in batches for index in batch.indices),
        sum(batch.tokens for batch in batches),
        reference=torch.cat(references) if references else None,
    )


def _pad(tensors: Sequence[torch.Tensor], length: int, value: int) -> torch.Tensor:
    """Concatenate the rows of all tensors, each padded to `length` with `value`."""
    return torch.cat([F.pad(tensor, (0, length - tensor.shape[1]), value=value) for tensor in tensors])
