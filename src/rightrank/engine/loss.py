"""The loss of a batch, item by item.

For language models the output head runs only where there is a label, in chunks, and the gradient to the hidden
states is taken chunk by chunk in the forward pass: no batch × length × vocabulary tensor ever exists. The technique
is that of fused linear cross-entropy kernels (Liger kernel, Hsu et al. 2024), here for any head module.

Whether a model's logits are its head applied to its last hidden states is checked once on real data; where they are
not, the model's own logits are used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from rightrank.engine.batches import Batch
from rightrank.engine.encode import IGNORED
from rightrank.engine.sequence_packing import position_ids

CHUNK_LOGITS = 2**24  # logits held at once, in elements: 64 MiB in float32
HEAD_TOLERANCE = 1e-3  # relative, between the head's loss and the model's own, in the model's dtype

Head: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
Scale: TypeAlias = float | torch.Tensor  # of every label loss, or [b], of each item's


@dataclass(frozen=True, slots=True)
class BatchLoss:
    """What a forward pass over a batch of b items gives."""

    total: torch.Tensor  # scalar with a graph: the sum of all label losses times the scale asked for
    example_losses: torch.Tensor  # [b], summed over each item's labels, nats, no graph, on the CPU
    example_tokens: torch.Tensor  # [b], labels of each item
    example_correct: torch.Tensor | None  # [b], 1 where a classification is right


class Objective(Protocol):
    """A model and the way its loss is taken."""

    def __call__(self, model: Any, batch: Batch, scale: Scale) -> BatchLoss: ...


def make_objective(model: Any, batch: Batch, classification: bool) -> Objective:
    """The objective that suits the model, proven on `batch`."""
    if classification:
        return classification_loss
    if _head_agrees(model, batch):
        return head_loss
    return logits_loss


def classification_loss(model: Any, batch: Batch, scale: Scale) -> BatchLoss:
    """Cross-entropy of one label an item."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.float()
    losses = F.cross_entropy(logits, batch.labels, reduction="none")
    correct = (logits.argmax(-1) == batch.labels).long()
    return BatchLoss(
        (losses * scale).sum(), losses.detach().cpu().double(), torch.ones_like(batch.labels).cpu(), correct.cpu()
    )


def head_loss(model: Any, batch: Batch, scale: Scale) -> BatchLoss:
    """Shifted cross-entropy with the head applied only where there is a label."""
    # Padding is on the right and every loss is causal, so no position with a label sees a padded one:
    # the mask can be left out, and attention takes its causal fast path.
    restarting = {} if batch.lengths is None else {"position_ids": position_ids(batch.lengths, batch.input_ids.device)}
    hidden = model.base_model(input_ids=batch.input_ids, use_cache=False, **restarting).last_hidden_state
    keep, targets = _label_positions(batch)
    items = batch.example_numbers()[:, 1:][keep]
    total, losses = chunked_cross_entropy(hidden[:, :-1][keep], targets, output_head(model), _by_label(scale, items))
    return _by_item(total, losses, items, len(batch.indices))


def logits_loss(model: Any, batch: Batch, scale: Scale) -> BatchLoss:
    """Shifted cross-entropy of the model's own logits, all of them at once."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    keep, targets = _label_positions(batch)
    losses = F.cross_entropy(logits[:, :-1][keep].float(), targets, reduction="none")
    items = batch.example_numbers()[:, 1:][keep]
    return _by_item((losses * _by_label(scale, items)).sum(), losses.detach(), items, len(batch.indices))


def chunked_cross_entropy(
    hidden: torch.Tensor, targets: torch.Tensor, head: Head, scale: Scale
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(sum of scale × losses, losses [n] without a graph)` of `hidden` [n, d] and `targets` [n]; scale is [n] or one."""
    if any(parameter.requires_grad for parameter in _parameters(head)):
        pieces = [
            checkpoint(_chunk_losses, part, labels, head, use_reentrant=False)
            for part, labels in _chunks(hidden, targets, head)
        ]
        losses = torch.cat(pieces)
        return (losses * scale).sum(), losses.detach()
    apply: Any = _FrozenHeadLoss.apply  # untyped in torch
    total, losses = apply(hidden, targets, head, scale)
    return total, losses


class _FrozenHeadLoss(torch.autograd.Function):
    """Loss of a frozen head; the gradient to the hidden states is ready when the forward pass ends."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, head: Head, scale: Scale
    ) -> tuple[torch.Tensor, torch.Tensor]:
        needs_gradient = ctx.needs_input_grad[0]
        losses: list[torch.Tensor] = []
        gradients: list[torch.Tensor] = []
        begin = 0
        for part, labels in _chunks(hidden, targets, head):
            weight = scale[begin : begin + len(labels)] if isinstance(scale, torch.Tensor) else scale
            begin += len(labels)
            with torch.set_grad_enabled(needs_gradient):
                leaf = part.detach().requires_grad_(needs_gradient)
                chunk = _chunk_losses(leaf, labels, head)
                total = (chunk * weight).sum()
            if needs_gradient:
                gradients.append(torch.autograd.grad(total, leaf)[0])
            losses.append(chunk.detach())
        if needs_gradient:
            ctx.save_for_backward(torch.cat(gradients))
        all_losses = torch.cat(losses)
        ctx.mark_non_differentiable(all_losses)
        return (all_losses * scale).sum(), all_losses

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (hidden_gradient,) = ctx.saved_tensors
        return hidden_gradient * gradients[0], None, None, None


def _chunk_losses(hidden: torch.Tensor, targets: torch.Tensor, head: Head) -> torch.Tensor:
    return F.cross_entropy(head(hidden).float(), targets, reduction="none")


def _chunks(hidden: torch.Tensor, targets: torch.Tensor, head: Head) -> list[tuple[torch.Tensor, torch.Tensor]]:
    vocabulary = getattr(head, "vocabulary", 2**16)
    rows = max(1, CHUNK_LOGITS // vocabulary)
    return list(zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True))


class _CappedHead:
    """A model's output embedding followed by the scaling and capping of logits that its configuration names."""

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config()
        self.linear = model.get_output_embeddings()
        self.vocabulary: int = config.vocab_size
        self._cap: float | None = getattr(config, "final_logit_softcapping", None)  # Gemma
        self._multiply: float = getattr(config, "logit_scale", None) or 1.0  # Cohere
        self._divide: float = getattr(config, "logits_scaling", None) or 1.0  # Granite

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.linear(hidden)
        if self._multiply != self._divide:
            logits = logits * self._multiply / self._divide
        return logits if self._cap is None else torch.tanh(logits / self._cap) * self._cap


def output_head(model: Any) -> Head:
    """The model's output head, with what its configuration does to the logits."""
    return _CappedHead(model)


def _parameters(head: Head) -> list[torch.nn.Parameter]:
    return list(getattr(head, "linear", torch.nn.Module()).parameters())


def _label_positions(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """`(keep [b, n-1], targets [m])`: where the next token is a label, and those labels."""
    shifted = batch.labels[:, 1:]
    keep = shifted != IGNORED
    return keep, shifted[keep]


def _by_label(scale: Scale, items: torch.Tensor) -> Scale:
    """The scale of each label [m], from the scale of each item [b]."""
    return scale[items] if isinstance(scale, torch.Tensor) else scale


def _by_item(total: torch.Tensor, losses: torch.Tensor, items: torch.Tensor, count: int) -> BatchLoss:
    """Losses [m] summed by the item [m] of each label."""
    items = items.cpu()  # summed in float64, which not every device has
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, items, losses.cpu().double())
    return BatchLoss(total, sums, torch.bincount(items, minlength=count), None)


@torch.no_grad()
def _head_agrees(model: Any, batch: Batch) -> bool:
    """Whether head and model give the same losses on `batch`."""
    if model.get_output_embeddings() is None or not isinstance(getattr(model, "base_model", None), torch.nn.Module):
        return False
    if model.base_model is model:
        return False
    theirs = logits_loss(model, batch, 1.0).example_losses
    ours = head_loss(model, batch, 1.0).example_losses
    return torch.allclose(ours, theirs, rtol=HEAD_TOLERANCE if theirs.isfinite().all() else 0, atol=1e-4)
