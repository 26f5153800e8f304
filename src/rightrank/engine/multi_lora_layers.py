"""The forward pass of layers with several adapters: y = x·W₀ᵀ + s·(x·Aᵀ)·Bᵀ, each row with the A and B of its own arm.

Each arm owns one contiguous part of a batch's rows. The base's product runs once over all rows. The adapters' products run in
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

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft.utils import ModulesToSaveWrapper

from rightrank.engine.routing import Part, Routing


@dataclass(frozen=True, slots=True)
class _Group:
    """Neighbouring parts of equal rank and equally many rows: g arms in one batched product."""

    begin: int
    end: int
    parts: tuple[Part, ...]
    scales: tuple[float, ...]
    dropout: float
    salt: int  # differs between layers, so that each draws its own dropout

    def mask(self, width: int, like: torch.Tensor) -> torch.Tensor | None:
        """[g, rows, width] of 0 and 1/(1-p); None without dropout.

        The mask is a function of the arm's seed and the layer, so gradient checkpointing draws the same one again.
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
    """The groups of the arms that adapt `module`, which have an A in `table`, and their adapters in order."""
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
    """`x·Wᵀ + bias` (zero if W is None) plus the output of every group's adapters, added in place."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        out_features: int,
        groups: list[_Group],
        *adapters: torch.Tensor,  # the A of every arm in the order of the groups, then the B
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
    """Yield `(A [g, r, in], B [g, out, r])` of each group, in `dtype`."""
    count = len(adapters) // 2
    begin = 0
    for group in groups:
        end = begin + len(group.parts)
        yield _stack(adapters[begin:end]).to(dtype), _stack(adapters[count + begin : count + end]).to(dtype)
        begin = end


def _stack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0].detach()[None] if len(tensors) == 1 else torch.stack([tensor.detach() for tensor in tensors])


def _view(rows: torch.Tensor, group: _Group) -> torch.Tensor:
    """The group's rows as a view [g, rows per arm, features]."""
    return rows[group.begin : group.end].view(len(group.parts), -1, rows.shape[-1])


def _scale(group: _Group, like: torch.Tensor) -> torch.Tensor | float:
    if len(set(group.scales)) == 1:
        return group.scales[0]
    return torch.tensor(group.scales, dtype=like.dtype, device=like.device)[:, None, None]


CurrentRouting = Callable[[], Routing | None]


def install(name: str, module: Any, current_routing: CurrentRouting) -> None:
    """Give an adapted module (PEFT's LoraLayer or ModulesToSaveWrapper) the multi-LoRA forward pass."""
    if isinstance(module, ModulesToSaveWrapper):
        vars(module)["forward"] = _saved_forward(module, current_routing)
        return
    digest = hashlib.sha256(name.encode()).digest()
    vars(module)["rightrank_salt"] = int.from_bytes(digest[:6], "big")
    is_embedding = isinstance(module.base_layer, torch.nn.Embedding)
    forward = _embedding_forward if is_embedding else _linear_forward
    vars(module)["forward"] = forward(module, current_routing)


def _linear_forward(module: Any, current_routing: CurrentRouting) -> Callable[..., torch.Tensor]:
    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        base, routing = module.base_layer, current_routing()
        if routing is None:
            plain: torch.Tensor = base(x, *args, **kwargs)
            return plain
        groups, names = _groups(module, routing, x.shape[:-1].numel(), module.lora_A)
        tensors = [module.lora_A[name].weight for name in names] + [module.lora_B[name].weight for name in names]
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

    return forward


def _embedding_forward(module: Any, current_routing: CurrentRouting) -> Callable[..., torch.Tensor]:
    def forward(ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result: torch.Tensor = module.base_layer(ids, *args, **kwargs)
        routing = current_routing()
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


def _saved_forward(module: Any, current_routing: CurrentRouting) -> Callable[..., Any]:
    """A module in `modules_to_save`, of which every arm trains a copy: each arm's rows go through its own copy."""

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        routing = current_routing()
        if routing is None:
            return module.original_module(x, *args, **kwargs)
        if len(routing.adapters) == 1:
            return module.modules_to_save[routing.adapters[0]](x, *args, **kwargs)
        along = 1 if x.shape[0] == 1 else 0  # packed: one row of tokens; padded: one row per example
        parts = routing.parts(x.shape[along])
        pieces = torch.split(x, [part.rows for part in parts], dim=along)
        outputs = [
            module.modules_to_save[part.adapter](piece, *args, **kwargs)
            for part, piece in zip(parts, pieces, strict=True)
        ]
        return torch.cat(outputs, dim=along)

    return forward
