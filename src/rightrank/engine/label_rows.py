"""Label rows: in the last block, position-wise layers run only at positions whose next token is a label.

The last block's output at other positions reaches no loss, so its query projection, attention output projection and MLP
are skipped there. Keys and values are needed at every position. Losses and gradients stay the same; `fast_paths.py` checks
this for each model on real data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from rightrank.engine.batches import Batch
from rightrank.engine.encoder import IGNORED
from rightrank.kinds.routing import Routing

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
