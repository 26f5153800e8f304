"""Linear layers: ΔW = s·B·A, and several adapters in one pass, y = x·W₀ᵀ + s·(x·Aᵀ)·Bᵀ with the A and B of each row's arm.

Each arm owns a contiguous span of a batch's rows. The product with the base weight runs once over all rows. The products with the adapters run in
groups: neighbouring arms of equal rank and equally many rows form one batched product. Ranks are never padded, so an arm
multiplies the same shapes as it does alone, and no row is multiplied by another arm's tensors, so a NaN stays in its arm.

Example. Arm `a` has rank 2 and 5 tokens, arm `b` has rank 4 and 3 tokens. They share a layer of 16 inputs and 8 outputs;
their examples are packed into one row::

    x                    [1, 8, 16]     rows 0…4 are a's, rows 5…7 are b's
    x·W₀ᵀ                [8, 8]         one product for both arms
    group a: x[0:5]      [1, 5, 16]     A [1, 2, 16] → middle [1, 5, 2]     B [1, 8, 2] → added to y[0:5]
    group b: x[5:8]      [1, 3, 16]     A [1, 4, 16] → middle [1, 3, 4]     B [1, 8, 4] → added to y[5:8]

With rank 2 and 5 tokens for both arms, x has 10 rows and there is one group: x [2, 5, 16], A [2, 2, 16], B [2, 8, 2].

Adapter tensors are float32 and are cast to the dtype of the activations for the products. Punica's SGMV kernel (Chen et
al. 2023) groups rows by adapter in the same way, for inference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from rightrank.training.kinds.base import AdapterKind, CurrentRouting, Routing, RowSpan


class Linear(AdapterKind):
    """A `torch.nn.Linear`, transformers' `Conv1D`, or a quantised linear layer."""

    label = "a linear layer"

    def can_adapt(self, module: Any) -> bool:
        if module.lora_variant or any(module.lora_bias.values()) or not module.lora_A:
            return False
        if type(module).__name__ in ("ParamWrapper", "MultiheadAttention"):
            return False
        if not all(isinstance(a, torch.nn.Linear) for a in module.lora_A.values()):
            return False
        # A maps the layer's inputs and B its outputs, as PEFT has it for every linear layer and no other.
        a, b = next(iter(module.lora_A.values())), next(iter(module.lora_B.values()))
        return (int(a.in_features), int(b.out_features)) == (int(module.in_features), int(module.out_features))

    def forward(self, module: Any, routing: CurrentRouting, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        base, current = module.base_layer, routing()
        if current is None:
            plain: torch.Tensor = base(x, *args, **kwargs)
            return plain
        groups, names = _group_spans(module, current, x.shape[:-1].numel(), module.lora_A)
        a, b = ([factors[name] for name in names] for factors in (module.lora_A, module.lora_B))
        tensors = [layer.weight for layer in (*a, *b)]
        apply: Any = _LoraLinear.apply  # untyped in torch
        # A plain frozen linear layer runs in one operation with its adapters; any other keeps its own forward pass.
        frozen = type(base) is torch.nn.Linear and not any(p.requires_grad for p in base.parameters())
        if frozen and base.weight.dtype == x.dtype:
            y: torch.Tensor = apply(x, base.weight, base.bias, module.out_features, groups, *tensors)
            return y
        result: torch.Tensor = base(x, *args, **kwargs)
        if groups:
            result = result + apply(x, None, None, module.out_features, groups, *tensors).to(result.dtype)
        return result


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


def _group_spans(module: Any, routing: Routing, rows: int, table: Any) -> tuple[list[_RowGroup], list[str]]:
    """Return the groups of the arms that adapt `module`, which have an A in `table`, and their adapters in order."""
    runs: list[list[tuple[RowSpan, int]]] = []
    keys: list[tuple[Any, ...]] = []
    begin = 0
    for span in routing.find_spans(rows):
        if span.adapter in table and span.rows:
            dropout = module.lora_dropout[span.adapter]
            rate = float(dropout.p) if isinstance(dropout, torch.nn.Dropout) and span.dropout_seed is not None else 0.0
            key = (module.r[span.adapter], span.rows, rate)
            if runs and keys[-1] == key and runs[-1][-1][1] + span.rows == begin:
                runs[-1].append((span, begin))
            else:
                runs.append([(span, begin)])
                keys.append(key)
        begin += span.rows
    groups = [
        _RowGroup(
            run[0][1],
            run[-1][1] + run[-1][0].rows,
            tuple(span for span, _ in run),
            tuple(float(module.scaling[span.adapter]) for span, _ in run),
            key[2],
            module.rightrank_salt,
        )
        for run, key in zip(runs, keys, strict=True)
    ]
    return groups, [span.adapter for run in runs for span, _ in run]


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
    return tensors[0].detach()[None] if len(tensors) == 1 else torch.stack([tensor.detach() for tensor in tensors])


def _view_rows(rows: torch.Tensor, group: _RowGroup) -> torch.Tensor:
    """Return a view [g, rows per arm, features] of the group's rows."""
    return rows[group.begin : group.end].view(len(group.spans), -1, rows.shape[-1])


def _get_scale(group: _RowGroup, like: torch.Tensor) -> torch.Tensor | float:
    if len(set(group.scales)) == 1:
        return group.scales[0]
    return torch.tensor(group.scales, dtype=like.dtype, device=like.device)[:, None, None]
