"""Faster ways to compute the same losses. Each is used only after a check on real data finds the losses unchanged.

- Sequence packing: no padding (`sequence_packing.py`).
- Label rows: the last block's position-wise layers run only where a label follows (`label_rows.py`).
- Frozen prefix: the blocks below the first adapter run once per example (`prefix.py`).
- Attention in float32 on a CPU whose model is in 16 bits (`attention.py`). It needs no check: it rounds less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rightrank.data.token_store import EncodedExample, lengths_of
from rightrank.models.kinds.routing import Routing
from rightrank.schema.trials import SplitName
from rightrank.train.attention import FUSED, float32_attention, packed, packed_attention
from rightrank.train.batches import Batch
from rightrank.train.loss import Objective, head_loss
from rightrank.train.prefix import FrozenPrefix, find_blocks
from rightrank.train.tokens import IGNORED

MAX_LABEL_SHARE = 0.75  # above this share of positions with a label, gathering rows costs more than it saves
_MLP_NAMES = ("mlp", "feed_forward", "ffn")
_ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")
_POSITION_WISE = ("q_proj", "o_proj", "out_proj", "c_proj", "dense")


def label_positions(batch: Batch) -> torch.Tensor:
    """[b, n]: True where the next token is a label."""
    keep = torch.zeros_like(batch.labels, dtype=torch.bool)
    keep[:, :-1] = batch.labels[:, 1:] != IGNORED
    return keep


@contextmanager
def label_rows_only(block: Any, batch: Batch, routing: Routing | None) -> Iterator[None]:
    """Within the block, the position-wise layers of `block`, the model's last, run at label positions only."""
    keep = label_positions(batch)
    if float(keep.float().mean()) > MAX_LABEL_SHARE or not keep.any():
        yield
        return
    rows = keep.reshape(-1).nonzero()[:, 0]
    modules = position_wise_modules(block)
    before = [module.__dict__.get("forward") for module in modules]
    for module in modules:
        module.forward = _on_rows(module.forward, rows, keep.shape)
    try:
        with nullcontext() if routing is None else routing.only_rows(keep.reshape(-1)):
            yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def position_wise_modules(block: Any) -> list[Any]:
    """The MLP and the query and output projections of the attention, by their usual names in transformers."""
    found = [getattr(block, name) for name in _MLP_NAMES if hasattr(block, name)]
    for name in _ATTENTION_NAMES:
        attention = getattr(block, name, None)
        if attention is not None:
            found.extend(getattr(attention, part) for part in _POSITION_WISE if hasattr(attention, part))
    return [module for module in found if isinstance(module, torch.nn.Module)]


def _on_rows(forward: Callable[..., Any], rows: torch.Tensor, shape: torch.Size) -> Callable[..., Any]:
    """`forward` on the given rows of an input [b, n, d], and zeros elsewhere; plain `forward` on any other shape.

    Of several outputs (gpt-oss's experts also return the router's scores) the first is the layer's.
    """

    def on_rows(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.shape[:-1] != shape:
            return forward(x, *args, **kwargs)
        chosen = x.reshape(-1, x.shape[-1])[rows]
        y = forward(chosen[None], *args, **kwargs)
        first, *others = y if isinstance(y, tuple) else (y,)
        whole = first.new_zeros(shape.numel(), first.shape[-1])
        spread = whole.index_copy(0, rows, first[0]).view(*shape, -1)
        return (spread, *others) if isinstance(y, tuple) else spread

    return on_rows


TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}  # relative, between losses


@dataclass(slots=True)
class FastPaths:
    float32_attention: bool = False
    sequence_packing: bool = False
    last_block: Any = None  # None: the last block runs at every position
    prefix: FrozenPrefix | None = None

    @contextmanager
    def applied(self, model: Any, split: SplitName, batch: Batch, routing: Routing | None = None) -> Iterator[Batch]:
        """Within the block, `model` takes the fast paths; yields `batch` in the layout to give to it.

        The backward pass belongs inside the block: what it recomputes must see the same prefix, attention and rows.
        """
        rows = self.layout(batch)
        with ExitStack() as stack:
            stack.enter_context(self.attention())
            if self.prefix is not None:
                stack.enter_context(self.prefix.serving(model, split, rows))
            stack.enter_context(attention_of(rows))
            if self.last_block is not None:
                stack.enter_context(label_rows_only(self.last_block, rows, routing))
            yield rows

    def layout(self, batch: Batch) -> Batch:
        """`batch` as the model takes it: packed into one row, or padded."""
        return packed(batch) if self.sequence_packing else batch

    def attention(self) -> AbstractContextManager[None]:
        return float32_attention() if self.float32_attention else nullcontext()


def attention_of(rows: Batch) -> AbstractContextManager[None]:
    """Attention within the examples of a packed row; the model's own for a padded batch."""
    return nullcontext() if rows.lengths is None else packed_attention(rows.lengths, rows.input_ids.device)


def packing_probe(splits: Mapping[SplitName, Sequence[EncodedExample]]) -> tuple[SplitName, list[int]]:
    """The examples on which sequence packing is checked: the longest of all, with the shortest and the median of its split."""
    split = max(splits, key=lambda name: int(lengths_of(splits[name]).max(initial=0)))
    by_length = np.argsort(lengths_of(splits[split]), kind="stable").tolist()
    return split, [by_length[0], by_length[-1], by_length[len(by_length) // 2]]


@torch.no_grad()
def can_pack_sequences(model: Any, objective: Objective, probe: Batch) -> bool:
    """Whether examples packed into one row have the losses that they have padded."""
    if objective is not head_loss or getattr(model.config, "_attn_implementation", None) != FUSED:
        return False
    plain = head_loss(model, probe, 1.0).example_losses
    rows = packed(probe)
    with attention_of(rows):
        ours = head_loss(model, rows, 1.0).example_losses
    return torch.allclose(ours, plain, rtol=_tolerance(model), atol=0)


@torch.no_grad()
def find_last_block(model: Any, objective: Objective, rows: Batch) -> Any:
    """The model's last block if label rows alone give the same losses; None otherwise."""
    found = find_blocks(model)
    if found is None or objective is not head_loss:
        return None
    last = found[1][-1]
    with attention_of(rows):
        plain = head_loss(model, rows, 1.0).example_losses
        with label_rows_only(last, rows, None):
            ours = head_loss(model, rows, 1.0).example_losses
    return last if torch.allclose(ours, plain, rtol=_tolerance(model), atol=0) else None


@torch.no_grad()
def prefix_agrees(model: Any, objective: Objective, prefix: FrozenPrefix, probe: Batch, rows: Batch) -> bool:
    """Whether the cached prefix gives the loss of `probe`, a batch of the validation split; `rows` is its layout."""
    plain = objective(model, probe, 1.0).example_losses.sum()
    with prefix.serving(model, "selection", rows), attention_of(rows):
        cached = objective(model, rows, 1.0).example_losses.sum()
    return bool(torch.isclose(cached, plain, rtol=_tolerance(model), atol=0))


def _tolerance(model: Any) -> float:
    return TOLERANCE[next(model.parameters()).dtype]
