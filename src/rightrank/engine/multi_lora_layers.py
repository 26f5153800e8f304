"""The forward pass of adapted layers with many adapters at once: y = x·W0ᵀ + s·(x·Aᵀ)·Bᵀ, each row with its own arm's A, B.

The rows of a batch belong to arms, one contiguous part each. The base's product runs once over all rows; the adapters'
products run grouped: neighbouring arms of one rank and as many rows are one batched product. No rank is padded, so an
arm multiplies the same shapes as alone. A row never meets another arm's tensors, so NaN in one arm stays there.

Adapter tensors are float32; they are cast to the dtype of the activations where they are multiplied.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from peft.utils import ModulesToSaveWrapper

from rightrank.errors import MultiLoraError


@dataclass(frozen=True, slots=True)
class Part:
    """The rows of one arm in a layer's flattened input."""

    adapter: str
    rows: int
    dropout_seed: int | None  # None: no dropout
    alone_rows: int  # rows that the arm's input would have alone, where dropout is drawn
    alone_index: torch.Tensor | None  # [rows] into those; None: the same rows


@dataclass(slots=True)
class Routing:
    """Which rows of the current batch belong to which adapter, for each number of rows that a layer may see."""

    adapters: tuple[str, ...]
    dropout_seeds: tuple[int | None, ...]
    layouts: dict[int, list[Part]] = field(default_factory=dict)  # by rows of the flattened input

    @classmethod
    def joined(cls, adapters: Sequence[str], seeds: Sequence[int | None], tokens: Sequence[int]) -> Routing:
        """Arms of `tokens[i]` tokens each, one after the other in one row."""
        parts = [
            Part(name, count, seed, count, None) for name, seed, count in zip(adapters, seeds, tokens, strict=True)
        ]
        return cls(tuple(adapters), tuple(seeds), {sum(tokens): parts})

    @classmethod
    def padded(
        cls, adapters: Sequence[str], seeds: Sequence[int | None], rows: Sequence[int], lengths: Sequence[int]
    ) -> Routing:
        """Arms of `rows[i]` items each, padded to `lengths[i]` alone and to the longest together."""
        routing = cls(tuple(adapters), tuple(seeds))
        longest = max(lengths)
        by_item = [
            Part(name, count, seed, count, None) for name, seed, count in zip(adapters, seeds, rows, strict=True)
        ]
        by_token = [
            Part(name, count * longest, seed, count * length, _padded_index(count, length, longest))
            for name, seed, count, length in zip(adapters, seeds, rows, lengths, strict=True)
        ]
        routing.layouts = {sum(rows): by_item, sum(rows) * longest: by_token}
        return routing

    def parts(self, rows: int) -> list[Part]:
        """The arms' parts of a flattened input of `rows` rows.

        Raises:
            MultiLoraError: a layer that sees neither items nor tokens, while there is more than one arm.
        """
        found = self.layouts.get(rows)
        if found is not None:
            return found
        if len(self.adapters) == 1:
            return [Part(self.adapters[0], rows, self.dropout_seeds[0], rows, None)]
        raise MultiLoraError(f"a layer sees {rows} rows that can't be told apart by arm")

    @contextmanager
    def only_rows(self, keep: torch.Tensor) -> Iterator[None]:
        """Within the block, layers may also see just the rows of the flattened batch that `keep` [b·n] marks."""
        by_token = self.layouts[keep.numel()]
        parts: list[Part] = []
        begin = 0
        for part in by_token:
            chosen = keep[begin : begin + part.rows].nonzero()[:, 0]
            begin += part.rows
            index = chosen if part.alone_index is None else part.alone_index.to(chosen.device)[chosen]
            parts.append(Part(part.adapter, len(chosen), part.dropout_seed, part.alone_rows, index))
        total = sum(part.rows for part in parts)
        before = self.layouts
        self.layouts = before | {total: parts}
        try:
            yield
        finally:
            self.layouts = before


def _padded_index(rows: int, length: int, longest: int) -> torch.Tensor | None:
    """Where each of rows × longest positions is among rows × length; padding is anywhere."""
    if length == longest:
        return None
    columns = torch.arange(longest).clamp(max=length - 1)
    return (torch.arange(rows)[:, None] * length + columns).reshape(-1)


@dataclass(frozen=True, slots=True)
class _Group:
    """Neighbouring parts of one rank and as many rows: g arms in one batched product."""

    begin: int
    end: int
    parts: tuple[Part, ...]
    scales: tuple[float, ...]
    dropout: float
    salt: int  # of the layer, so that each draws its own dropout

    def mask(self, width: int, like: torch.Tensor) -> torch.Tensor | None:
        """[g, rows, width] of 0 and 1/(1-p), the same at every call; None without dropout.

        Drawn from the arm's seed and the layer, not from a running state: a recomputation draws it again.
        """
        if self.dropout == 0 or self.parts[0].dropout_seed is None:
            return None
        drawn = [self._draw(part, width) for part in self.parts]
        return torch.stack(drawn).to(like)

    def _draw(self, part: Part, width: int) -> torch.Tensor:
        assert part.dropout_seed is not None
        generator = torch.Generator().manual_seed((part.dropout_seed * 0x9E3779B1 + self.salt) % 2**63)
        kept = torch.rand((part.alone_rows, width), generator=generator) >= self.dropout
        chosen = kept if part.alone_index is None else kept[part.alone_index.cpu()]
        return chosen / (1 - self.dropout)


def _groups(module: Any, routing: Routing, rows: int, table: Any) -> tuple[list[_Group], list[str]]:
    """Groups of the parts whose arm adapts `module` (its A's are in `table`), and the adapters in their order."""
    runs: list[list[tuple[Part, int]]] = []
    keys: list[tuple[Any, ...]] = []
    begin = 0
    for part in routing.parts(rows):
        if part.adapter in table and part.rows:
            dropout = module.lora_dropout[part.adapter]
            rate = float(dropout.p) if isinstance(dropout, torch.nn.Dropout) and part.dropout_seed is not None else 0.0
            key = (module.r[part.adapter], part.rows, rate)
            if runs and keys[-1] == key and runs[-1][-1][1] + part.rows == begin:
                runs[-1].append((part, begin))
            else:
                runs.append([(part, begin)])
                keys.append(key)
        begin += part.rows
    groups = [
        _Group(
            run[0][1],
            run[-1][1] + run[-1][0].rows,
            tuple(part for part, _ in run),
            tuple(float(module.scaling[part.adapter]) for part, _ in run),
            key[2],
            module.rightrank_salt,
        )
        for run, key in zip(runs, keys, strict=True)
    ]
    return groups, [part.adapter for run in runs for part, _ in run]


class _LoraLinear(torch.autograd.Function):
    """`x·Wᵀ + bias` (nothing where W is None) plus every group's adapters, added in place."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        out_features: int,
        groups: list[_Group],
        *adapters: torch.Tensor,  # A of every arm in the groups' order, then B
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = rows.new_zeros(rows.shape[0], out_features) if weight is None else F.linear(rows, weight, bias)
        middles: list[torch.Tensor] = []
        for group, (a, b) in zip(groups, _stacked(groups, adapters, x.dtype), strict=True):
            inputs = _view(rows, group)
            mask = group.mask(x.shape[-1], x)
            middle = torch.bmm(inputs if mask is None else inputs * mask, a.mT) * _scale(group, x)
            _view(y, group).baddbmm_(middle, b.mT)
            middles.append(middle)
        ctx.groups, ctx.shape, ctx.count = groups, x.shape, len(adapters)
        ctx.save_for_backward(x, weight, *middles, *adapters)
        return y.view(*x.shape[:-1], out_features)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        x, weight, *rest = ctx.saved_tensors
        groups: list[_Group] = ctx.groups
        middles, adapters = rest[: len(groups)], rest[len(groups) :]
        rows = x.reshape(-1, x.shape[-1])
        dy = gradients[0].reshape(-1, gradients[0].shape[-1])
        dx: torch.Tensor | None = None
        if ctx.needs_input_grad[0]:
            dx = torch.zeros_like(rows) if weight is None else dy @ weight
        das: list[torch.Tensor] = []
        dbs: list[torch.Tensor] = []
        for group, middle, (a, b) in zip(groups, middles, _stacked(groups, adapters, x.dtype), strict=True):
            mask = group.mask(x.shape[-1], x)
            inputs = _view(rows, group)
            outputs = _view(dy, group)
            dmiddle = torch.bmm(outputs, b) * _scale(group, x)
            dbs.extend(torch.bmm(outputs.mT, middle).float())
            das.extend(torch.bmm(dmiddle.mT, inputs if mask is None else inputs * mask).float())
            if dx is not None and mask is None:
                _view(dx, group).baddbmm_(dmiddle, a)
            elif dx is not None and mask is not None:
                _view(dx, group).add_(torch.bmm(dmiddle, a) * mask)
        return (None if dx is None else dx.view(ctx.shape), None, None, None, None, *das, *dbs)


def _stacked(
    groups: Sequence[_Group], adapters: Sequence[torch.Tensor], dtype: torch.dtype
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """`(A [g, r, in], B [g, out, r])` of each group, in `dtype`."""
    count = len(adapters) // 2
    begin = 0
    for group in groups:
        end = begin + len(group.parts)
        yield _stack(adapters[begin:end]).to(dtype), _stack(adapters[count + begin : count + end]).to(dtype)
        begin = end


def _stack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0].detach()[None] if len(tensors) == 1 else torch.stack([tensor.detach() for tensor in tensors])


def _view(rows: torch.Tensor, group: _Group) -> torch.Tensor:
    """The group's rows as [g, rows of an arm, features], without a copy."""
    return rows[group.begin : group.end].view(len(group.parts), -1, rows.shape[-1])


def _scale(group: _Group, like: torch.Tensor) -> torch.Tensor | float:
    if len(set(group.scales)) == 1:
        return group.scales[0]
    return torch.tensor(group.scales, dtype=like.dtype, device=like.device)[:, None, None]


RoutingNow = Callable[[], Routing | None]


def install(name: str, module: Any, routing_now: RoutingNow) -> None:
    """Give an adapted module (PEFT's LoraLayer or ModulesToSaveWrapper) the forward pass of its pass."""
    if isinstance(module, ModulesToSaveWrapper):
        vars(module)["forward"] = _saved_forward(module, routing_now)
        return
    digest = hashlib.sha256(name.encode()).digest()
    vars(module)["rightrank_salt"] = int.from_bytes(digest[:6], "big")
    is_embedding = isinstance(module.base_layer, torch.nn.Embedding)
    forward = _embedding_forward if is_embedding else _linear_forward
    vars(module)["forward"] = forward(module, routing_now)


def _linear_forward(module: Any, routing_now: RoutingNow) -> Callable[..., torch.Tensor]:
    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        base, routing = module.base_layer, routing_now()
        if routing is None:
            plain: torch.Tensor = base(x, *args, **kwargs)
            return plain
        groups, names = _groups(module, routing, x.shape[:-1].numel(), module.lora_A)
        tensors = [module.lora_A[name].weight for name in names] + [module.lora_B[name].weight for name in names]
        apply: Any = _LoraLinear.apply  # untyped in torch
        # A plain frozen linear layer is computed with its adapters in one operation; others keep their own forward.
        frozen = type(base) is torch.nn.Linear and not any(p.requires_grad for p in base.parameters())
        if frozen and base.weight.dtype == x.dtype:
            y: torch.Tensor = apply(x, base.weight, base.bias, module.out_features, groups, *tensors)
            return y
        result: torch.Tensor = base(x, *args, **kwargs)
        if groups:
            result = result + apply(x, None, None, module.out_features, groups, *tensors).to(result.dtype)
        return result

    return forward


def _embedding_forward(module: Any, routing_now: RoutingNow) -> Callable[..., torch.Tensor]:
    def forward(ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result: torch.Tensor = module.base_layer(ids, *args, **kwargs)
        routing = routing_now()
        if routing is None:
            return result
        factor = module._get_embed_scale()  # Gemma scales inside its embedding
        pieces: list[torch.Tensor] = []
        begin = 0
        for part in routing.parts(ids.numel()):
            part_ids = ids.reshape(-1)[begin : begin + part.rows]
            begin += part.rows
            if part.adapter not in module.lora_embedding_A:
                pieces.append(result.new_zeros(part.rows, result.shape[-1]))
                continue
            down = F.embedding(part_ids, module.lora_embedding_A[part.adapter].T)
            delta = (down @ module.lora_embedding_B[part.adapter].T) * module.scaling[part.adapter]
            pieces.append(delta if factor is None else delta * factor.to(delta.dtype))
        return result + torch.cat(pieces).view_as(result).to(result.dtype)

    return forward


def _saved_forward(module: Any, routing_now: RoutingNow) -> Callable[..., Any]:
    """A module that every arm trains a copy of (`modules_to_save`): each arm's rows through its own copy."""

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        routing = routing_now()
        if routing is None:
            return module.original_module(x, *args, **kwargs)
        if len(routing.adapters) == 1:
            return module.modules_to_save[routing.adapters[0]](x, *args, **kwargs)
        along = 1 if x.shape[0] == 1 else 0  # joined items are one row of tokens; padded ones a row each
        parts = routing.parts(x.shape[along])
        pieces = torch.split(x, [part.rows for part in parts], dim=along)
        outputs = [
            module.modules_to_save[part.adapter](piece, *args, **kwargs)
            for part, piece in zip(parts, pieces, strict=True)
        ]
        return torch.cat(outputs, dim=along)

    return forward
