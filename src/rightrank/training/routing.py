"""The rows of several adapters in one pass, and their product in a linear layer: y = x·W₀ᵀ + s·(x·Aᵀ)·Bᵀ with the A and B of each row's arm.

A `Routing` says which rows of a batch belong to which adapter.

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
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from rightrank.schema.errors import MultiLoraError


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
    def from_packed(cls, adapters: Sequence[str], seeds: Sequence[int | None], tokens: Sequence[int]) -> Routing:
        """Create the routing of packed sequences: arms of `tokens[i]` tokens, one after the other in one row."""
        spans = [
            RowSpan(name, count, seed, count, None) for name, seed, count in zip(adapters, seeds, tokens, strict=True)
        ]
        return cls(tuple(adapters), tuple(seeds), {sum(tokens): spans})

    @classmethod
    def from_padded(
        cls, adapters: Sequence[str], seeds: Sequence[int | None], rows: Sequence[int], lengths: Sequence[int]
    ) -> Routing:
        """Create the routing of padded batches: arms of `rows[i]` examples of length `lengths[i]`, all padded to the longest length."""
        routing = cls(tuple(adapters), tuple(seeds))
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
        routing.layouts = {sum(rows): by_example, sum(rows) * longest: by_token}
        return routing

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
    groups, names = _group_spans(module, routing, x.shape[:-1].numel())
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


def _group_spans(module: Any, routing: Routing, rows: int) -> tuple[list[_RowGroup], list[str]]:
    """Return the groups of the arms that adapt `module`, and their adapters in order."""
    runs: list[list[tuple[RowSpan, int]]] = []
    keys: list[tuple[Any, ...]] = []
    begin = 0
    for span in routing.find_spans(rows):
        if span.adapter in module.lora_A and span.rows:
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
