"""Faster ways to compute the same losses. Each is used only after a check on real data finds the losses unchanged.

- Sequence packing: no padding (`sequence_packing.py`).
- Label rows: the last block's position-wise layers run only where a label follows (`label_rows.py`).
- Frozen prefix: the blocks below the first adapter run once per example (`prefix.py`).
- Attention in float32 on a CPU whose model is in 16 bits (`attention.py`). It needs no check: it rounds less.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rightrank.engine.attention import FUSED, float32_attention
from rightrank.engine.batches import Batch
from rightrank.engine.label_rows import label_rows_only
from rightrank.engine.loss import Objective, head_loss
from rightrank.engine.prefix import FrozenPrefix, find_blocks
from rightrank.engine.sequence_packing import packed, packed_attention
from rightrank.engine.token_store import EncodedExample, lengths_of
from rightrank.kinds.routing import Routing
from rightrank.records import SplitName

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
