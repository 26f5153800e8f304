"""Fast paths: they compute the losses of a batch in less time. Each is used only if a check on real data finds the losses unchanged.

- Sequence packing: no padding (`batches.py`).
- Label positions: the position-wise layers of the last block run only where the next token is a label.
- Frozen prefix: the blocks below the first adapter run once per example, and their hidden states are cached.
- Attention in float32 for 16-bit models on a CPU (`batches.py`). It needs no check, because it rounds less.

The blocks below the first adapted one give the same hidden states with every adapter. They are computed at first
use, in fixed batches of examples (so that a resumed run reads the same bits), and stored without padding in one flat tensor
in a memory-mapped file. Then the lower blocks return the stored states. The
model's own code still computes embeddings, masks and positions, so this works for any stack of blocks that take and return
hidden states.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from rightrank.data.token_store import IGNORED
from rightrank.evaluation.batches import (
    FUSED_ATTENTION,
    Batch,
    CacheBatches,
    collate,
    pack_batch,
    use_float32_attention,
    use_packed_attention,
)
from rightrank.evaluation.loss import Objective, head_loss
from rightrank.schema.errors import is_out_of_memory
from rightrank.schema.trials import SplitName

MAX_LABEL_FRACTION = 0.75  # with more label positions, gathering rows costs more than it saves
_MLP_NAMES = ("mlp", "feed_forward", "ffn")
_ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")
_POSITION_WISE = ("q_proj", "o_proj", "out_proj", "c_proj", "dense")
LOSS_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}  # relative, between losses


class RowRouting(Protocol):
    """Assigns the rows of a layer's input to the adapters of a shared pass."""

    def restrict_rows(self, mask: torch.Tensor) -> AbstractContextManager[None]:
        """Let layers within the block see only the rows of the flattened batch that `mask` [b·n] selects."""
        ...


class _ReachedBlock(Exception):  # noqa: N818 - not an error: it stops a forward pass early and carries a block's output
    pass


def _stop_forward(_module: Any, _inputs: Any, output: Any) -> None:
    raise _ReachedBlock(output)


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
        self._states: dict[str, dict[int, torch.Tensor]] = {split: {} for split in batches}  # [tokens, d] by example
        self._returns_tuple = False

    def compute_missing(self, model: Any, split: SplitName, indices: Iterable[int]) -> Iterator[list[int]]:
        """Compute the missing batches of the examples at `indices`; yield the indices of each."""
        for group in self.batches[split].iterate_missing(indices):
            self._compute(model, split, group)
            yield group

    @contextmanager
    def serve_states(self, model: Any, split: SplitName, batch: Batch) -> Iterator[None]:
        """Let the lower blocks return the stored hidden states of `batch` within the block; `model` is the bare base."""
        deque(self.compute_missing(model, split, batch.indices), maxlen=0)
        # The arms of a pass share examples.
        states = {index: self._states[split][index].to(self._device) for index in dict.fromkeys(batch.indices)}
        hidden = torch.cat([states[index] for index in batch.indices])
        if batch.lengths is None:
            sequences = list(torch.split(hidden, batch.attention_mask.sum(1).tolist()))
            hidden = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        else:
            hidden = hidden[None]
        output = (hidden,) if self._returns_tuple else hidden
        for block in self._blocks:
            block.forward = lambda *_, **__: output
        try:
            yield
        finally:
            for block in self._blocks:
                del block.forward

    @torch.no_grad()
    def _compute(self, model: Any, split: SplitName, indices: Sequence[int]) -> None:
        examples, states = self.batches[split].examples, self._states[split]
        batch = collate(examples, indices, self._pad_id, self._device)
        output = _capture_output(model, self._blocks, batch.inputs)
        self._returns_tuple = isinstance(output, tuple)
        hidden: torch.Tensor = output[0] if self._returns_tuple else output
        if not states:
            states.update(self._allocate(split, hidden))
        real = hidden[batch.attention_mask.bool()].cpu()  # [tokens, d], in the order of the examples
        for index, computed in zip(indices, torch.split(real, examples.lengths[indices].tolist()), strict=True):
            states.setdefault(index, torch.empty_like(computed)).copy_(computed)

    def _allocate(self, split: SplitName, like: torch.Tensor) -> dict[int, torch.Tensor]:
        """Allocate the hidden states of the expected examples of a split in one piece."""
        indices = [index for group in self.batches[split].batches for index in group]
        lengths = self.batches[split].examples.lengths[indices].tolist()
        elements = sum(lengths) * like.shape[-1]
        path = self._folder / f"{split}.hidden"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):  # writing to a mapped file on a full disk would kill the process
                os.posix_fallocate(file.fileno(), 0, elements * like.element_size())
        flat = torch.from_file(str(path), shared=True, size=elements, dtype=like.dtype)
        return dict(zip(indices, torch.split(flat.view(-1, like.shape[-1]), lengths), strict=True))


@torch.no_grad()
def _capture_output(model: Any, blocks: Sequence[Any], inputs: Mapping[str, Any]) -> Any:
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


@dataclass(slots=True)
class FastPaths:
    float32_attention: bool = False
    sequence_packing: bool = False
    last_block: Any = None  # None: the last block runs at every position
    prefix: FrozenPrefix | None = None

    @contextmanager
    def apply(self, model: Any, split: SplitName, batch: Batch, routing: RowRouting | None = None) -> Iterator[Batch]:
        """Apply the fast paths to `model` within the block; yield `batch` in the layout that the model then expects.

        Run the backward pass inside the block: recomputation must see the same prefix, attention and positions.
        """
        rows = pack_batch(batch) if self.sequence_packing else batch
        with ExitStack() as stack:
            stack.enter_context(self.use_attention())
            if self.prefix is not None:
                stack.enter_context(self.prefix.serve_states(model, split, rows))
            stack.enter_context(_restrict_attention(rows))
            if self.last_block is not None:
                stack.enter_context(_restrict_to_labels(self.last_block, rows, routing))
            yield rows

    def use_attention(self) -> AbstractContextManager[None]:
        return use_float32_attention() if self.float32_attention else nullcontext()


def _restrict_attention(rows: Batch) -> AbstractContextManager[None]:
    """Limit attention to the examples of a packed row; leave a padded batch to the model's own attention."""
    return nullcontext() if rows.lengths is None else use_packed_attention(rows.lengths, rows.input_ids.device)


def _restrict_to_labels(block: Any, batch: Batch, routing: RowRouting | None) -> AbstractContextManager[None]:
    """Run the position-wise layers of `block`, the model's last, at label positions only, within the context."""
    mask = torch.zeros_like(batch.labels, dtype=torch.bool)  # [b, n], True where the next token is a label
    mask[:, :-1] = batch.labels[:, 1:] != IGNORED
    if float(mask.float().mean()) > MAX_LABEL_FRACTION or not mask.any():
        return nullcontext()
    return _restrict_to_positions(_find_position_wise_modules(block), mask, routing)


@contextmanager
def _restrict_to_positions(modules: Sequence[Any], mask: torch.Tensor, routing: RowRouting | None) -> Iterator[None]:
    """Run position-wise layers only at the positions that `mask` [b, n] marks, within the block. Other positions get zeros."""
    rows = mask.reshape(-1).nonzero()[:, 0]
    original_forwards = [module.__dict__.get("forward") for module in modules]
    for module in modules:
        module.forward = partial(_forward_at_rows, module.forward, rows, mask.shape)
    try:
        with nullcontext() if routing is None else routing.restrict_rows(mask.reshape(-1)):
            yield
    finally:
        for module, forward in zip(modules, original_forwards, strict=True):
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def _find_position_wise_modules(block: Any) -> list[Any]:
    """Find the MLP and the query and output projections of the attention by their usual names in transformers."""
    modules = [getattr(block, name) for name in _MLP_NAMES if hasattr(block, name)]
    for name in _ATTENTION_NAMES:
        attention = getattr(block, name, None)
        if attention is not None:
            modules.extend(
                getattr(attention, projection) for projection in _POSITION_WISE if hasattr(attention, projection)
            )
    return [module for module in modules if isinstance(module, torch.nn.Module)]


def _forward_at_rows(
    forward: Callable[..., Any], rows: torch.Tensor, shape: torch.Size, x: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    """Run `forward` on the given rows of an input [b, n, d] and return zeros elsewhere. Run it as usual on any other shape.

    Additional tensors [b, n, …], such as the residual of BLOOM's MLP, are reduced to the same rows. If there are several outputs
    (the experts of gpt-oss also return the router's scores), the first is the layer's.
    """
    if x.shape[:-1] != shape:
        return forward(x, *args, **kwargs)

    def select_rows(value: Any) -> Any:
        has_rows = isinstance(value, torch.Tensor) and value.ndim > 2 and value.shape[:2] == shape
        return value.flatten(0, 1)[rows][None] if has_rows else value

    outputs = forward(
        select_rows(x), *map(select_rows, args), **{name: select_rows(value) for name, value in kwargs.items()}
    )
    output, *extra_outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    zeros = output.new_zeros(shape.numel(), output.shape[-1])
    scattered = zeros.index_copy(0, rows, output[0]).view(*shape, -1)
    return (scattered, *extra_outputs) if isinstance(outputs, tuple) else scattered


@torch.no_grad()
def find_fast_paths(
    model: Any, objective: Objective, longest: Batch, probe: Batch, prefix: FrozenPrefix | None
) -> FastPaths:
    """Find the fast paths that do not change the losses. Each check uses the fast paths found before it.

    Args:
        longest: the examples on which sequence packing is checked.
        probe: a batch of the validation split, on which the other fast paths are checked.
        prefix: the frozen blocks, if there are any.
    """
    on_cpu, dtype = probe.input_ids.device.type == "cpu", next(model.parameters()).dtype
    paths = FastPaths(float32_attention=on_cpu and dtype in (torch.bfloat16, torch.float16))
    if objective is head_loss and getattr(model.config, "_attn_implementation", None) == FUSED_ATTENTION:
        reference_losses = _compute_losses(model, objective, longest)
        paths.sequence_packing = _has_equal_losses(
            model, reference_losses, lambda: _compute_losses(model, objective, pack_batch(longest))
        )
    rows = pack_batch(probe) if paths.sequence_packing else probe
    stack = find_blocks(model)
    if objective is head_loss and stack is not None:
        last_block, sparse_rows = stack[1][-1], _drop_labels(rows)
        reference_losses = _compute_losses(model, objective, sparse_rows)
        if _has_equal_losses(
            model,
            reference_losses,
            lambda: _compute_losses(model, objective, sparse_rows, _restrict_to_labels(last_block, sparse_rows, None)),
        ):
            paths.last_block = last_block
    if prefix is not None:
        reference_losses = _compute_losses(model, objective, probe).sum()
        if _has_equal_losses(
            model,
            reference_losses,
            lambda: _compute_losses(model, objective, rows, prefix.serve_states(model, "validation", rows)).sum(),
        ):
            paths.prefix = prefix
    return paths


def _drop_labels(rows: Batch) -> Batch:
    """Remove every second label if labels are so frequent that the last block would run at every position.

    Without this, the check of label positions would compare two identical computations.
    """
    labelled = (rows.labels.view(-1) != IGNORED).nonzero()[:, 0]
    if len(labelled) <= MAX_LABEL_FRACTION * rows.labels.numel():
        return rows
    labels = rows.labels.clone()
    labels.view(-1)[labelled[::2]] = IGNORED
    return replace(rows, labels=labels)


def _compute_losses(
    model: Any, objective: Objective, rows: Batch, *fast_paths: AbstractContextManager[None]
) -> torch.Tensor:
    with ExitStack() as stack:
        for context in (*fast_paths, _restrict_attention(rows)):
            stack.enter_context(context)
        return objective(model, rows, 1.0).example_losses


def _has_equal_losses(model: Any, reference_losses: torch.Tensor, compute_losses: Callable[[], torch.Tensor]) -> bool:
    """Return whether `compute_losses` gives the reference losses; False if it raises."""
    try:
        losses = compute_losses()
    except (RuntimeError, TypeError, ValueError) as error:  # of shapes, of arguments, and of a model's own checks
        if is_out_of_memory(error):
            raise
        return False
    return torch.allclose(losses, reference_losses, rtol=LOSS_TOLERANCE[next(model.parameters()).dtype], atol=0)
