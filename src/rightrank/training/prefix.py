"""The frozen prefix: hidden states of the blocks below the adapters, computed once and cached.

The blocks below the first adapted one give the same hidden states in every arm and every step. They are computed at first
use, in fixed batches of examples (so that a resumed run reads the same bits), and stored without padding in one flat tensor:
in memory if it is small, otherwise in a memory-mapped file. During training the lower blocks return the stored states. The
model's own code still computes embeddings, masks and positions, so this works for any stack of blocks that take and return
hidden states. `fast_paths.py` checks on real data that the losses stay the same.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rightrank.data.token_store import EncodedExample
from rightrank.schema.trials import SplitName
from rightrank.training.batches import Batch, CacheBatches, collate

MAX_IN_MEMORY_BYTES = 2**30  # larger states go to a memory-mapped file


class _ReachedBlock(Exception):  # noqa: N818 - not an error: it stops a forward pass early and carries a block's output
    pass


def _stop_forward(_module: Any, _inputs: Any, output: Any) -> None:
    raise _ReachedBlock(output)


@dataclass(slots=True)
class _StoredStates:
    """Hidden states of one split: a flat [tokens, d] tensor of the expected examples, and single tensors of other examples."""

    examples: Sequence[EncodedExample]
    offsets: dict[int, int]  # first token of each expected example
    tokens: int  # number of tokens of the expected examples
    hidden: torch.Tensor | None = None
    extra_states: dict[int, torch.Tensor] = field(default_factory=dict)

    def get_states(self, index: int) -> torch.Tensor:
        """Return the hidden states of an example [tokens, d]."""
        if index in self.extra_states:
            return self.extra_states[index]
        assert self.hidden is not None
        begin = self.offsets[index]
        return self.hidden[begin : begin + self.examples[index].length]


class FrozenPrefix:
    """The lowest blocks of a model, computed once per example in fixed batches. An unexpected example is computed alone."""

    def __init__(
        self,
        blocks: Sequence[Any],
        batches: Mapping[SplitName, CacheBatches],
        pad_id: int,
        device: torch.device,
        folder: Path,
    ) -> None:
        self.batches = batches
        self._blocks = blocks
        self._pad_id = pad_id
        self._device = device
        self._folder = folder
        self._stores: dict[str, _StoredStates] = {}
        for split, split_batches in batches.items():
            ordered = [index for group in split_batches.batches for index in group]
            lengths = split_batches.examples.lengths[ordered]
            begins = dict(zip(ordered, (np.cumsum(lengths) - lengths).tolist(), strict=True))
            self._stores[split] = _StoredStates(split_batches.examples, begins, int(lengths.sum()))
        self._returns_tuple = False

    def compute_missing(self, model: Any, split: SplitName, indices: Iterable[int]) -> Iterator[list[int]]:
        """Compute the missing batches of the examples at `indices`; yield the indices of each."""
        for group in self.batches[split].iterate_missing(indices):
            self._compute(model, self._stores[split], split, group)
            yield group

    @contextmanager
    def serve_states(self, model: Any, split: SplitName, batch: Batch) -> Iterator[None]:
        """Let the lower blocks return the stored hidden states of `batch` within the block; `model` is the bare base."""
        store = self._stores[split]
        deque(self.compute_missing(model, split, batch.indices), maxlen=0)
        distinct = list(dict.fromkeys(batch.indices))  # the arms of a pass share examples
        rows = [store.get_states(index) for index in distinct]
        numbers = [distinct.index(index) for index in batch.indices]
        if batch.lengths is None:
            lengths = [[len(ids) for ids, _ in store.examples[index].sequences()] for index in distinct]
            sequences = [
                sequence for row, split in zip(rows, lengths, strict=True) for sequence in torch.split(row, split)
            ]
            hidden = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True).to(self._device)
            each = len(sequences) // len(rows)  # sequences of an example
            order = [each * number + sequence for number in numbers for sequence in range(each)]
            hidden = hidden[order] if len(distinct) < len(numbers) else hidden
        else:
            moved = [row.to(self._device) for row in rows]
            hidden = torch.cat([moved[number] for number in numbers])[None]
        output = (hidden,) if self._returns_tuple else hidden
        for block in self._blocks:
            block.forward = lambda *_, **__: output
        try:
            yield
        finally:
            for block in self._blocks:
                del block.forward

    @torch.no_grad()
    def _compute(self, model: Any, store: _StoredStates, split: str, indices: Sequence[int]) -> None:
        batch = collate(store.examples, indices, self._pad_id, self._device)
        output = capture_output(model, self._blocks, batch.inputs)
        self._returns_tuple = isinstance(output, tuple)
        hidden: torch.Tensor = output[0] if self._returns_tuple else output
        if store.hidden is None:
            store.hidden = self._allocate(split, store.tokens, hidden)
        real = hidden[batch.attention_mask.bool()].cpu()  # [tokens, d], in the order of the examples
        lengths = [store.examples[index].length for index in indices]
        for index, computed in zip(indices, torch.split(real, lengths), strict=True):
            if index in store.offsets:
                store.get_states(index).copy_(computed)
            else:
                store.extra_states[index] = computed.clone()

    def _allocate(self, split: str, tokens: int, like: torch.Tensor) -> torch.Tensor:
        width = like.shape[-1]
        if tokens * width * like.element_size() <= MAX_IN_MEMORY_BYTES:
            return torch.zeros((tokens, width), dtype=like.dtype)
        path, size = self._folder / f"{split}.hidden", tokens * width * like.element_size()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):  # writing to a mapped file on a full disk would kill the process
                os.posix_fallocate(file.fileno(), 0, size)
            else:  # macOS
                file.truncate(size)
        return torch.from_file(str(path), shared=True, size=tokens * width, dtype=like.dtype).view(tokens, width)


@torch.no_grad()
def capture_output(model: Any, blocks: Sequence[Any], inputs: Mapping[str, Any]) -> Any:
    """Run the model up to the last of these blocks and return that block's output."""
    handle = blocks[-1].register_forward_hook(_stop_forward)
    try:
        model(**inputs)
    except _ReachedBlock as reached:
        return reached.args[0]
    finally:
        handle.remove()


def find_blocks(model: Any) -> tuple[str, torch.nn.ModuleList] | None:
    """Return the name and the list of a model's transformer blocks; None if it has no such list or more than one."""
    stacks = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList)
        and len(module) > 1
        and not any(component.isdigit() for component in name.split("."))  # no list inside a block
    ]
    return stacks[0] if len(stacks) == 1 else None


def find_frozen_blocks(model: Any, trainable: Sequence[str]) -> list[Any]:
    """Find the blocks below every trainable module, except the last block; return none if an embedding below them is trainable."""
    stack = find_blocks(model)
    if stack is None:
        return []
    prefix, blocks = f"{stack[0]}.", list(stack[1])[:-1]
    for name in trainable:
        if name.startswith(prefix):
            blocks = blocks[: int(name.removeprefix(prefix).split(".", 1)[0])]
        elif "embed" in name or name.endswith(("wte", "wpe")):
            return []
    return blocks
