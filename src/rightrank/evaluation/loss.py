"""The loss of a batch, per example.

For language models the output head runs only at label positions and in chunks. The forward pass already computes the
gradient with respect to the hidden states of each chunk, so no batch × length × vocabulary tensor exists. This is the
technique of fused linear cross-entropy kernels (Liger kernel, Hsu et al. 2024), for any head module.

`make_likelihood` checks on real data whether a model's logits are its head applied to its last hidden states. If they are
not, the loss is computed from the model's own logits.

Preference pairs use the loss of DPO (Rafailov et al. 2023). Its reference model is the base without an adapter.

    r(y) = log p(y | prompt) - log p_base(y | prompt)      summed over the tokens of an answer y
    loss = -log sigmoid(beta * (r(chosen) - r(rejected)))  nats per pair

The log-probabilities under the base do not depend on the adapter. They are computed once per pair and cached, so that
training needs no second model and no second pass.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.utils.checkpoint import checkpoint

from rightrank.data.token_store import IGNORED
from rightrank.evaluation.batches import Batch, CacheBatches
from rightrank.schema.trials import SplitName

MAX_CHUNK_LOGITS = 2**24  # elements of a chunk's logits: 64 MiB in float32
HEAD_TOLERANCE = 1e-3  # relative, between the head's loss and the model's own, in the model's dtype
CAUSALITY_TOKENS = 16  # tokens of an example on which causality is checked
# The largest change of logits at earlier tokens, relative to the change at the changed token.
CAUSALITY_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 3e-2}

Head: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
Scale: TypeAlias = float | torch.Tensor  # factor of every loss; or [b], one factor per example


@dataclass(frozen=True, slots=True)
class BatchLoss:
    """The losses of a batch of b examples."""

    total: torch.Tensor  # scalar with a graph: the sum of losses times the scale
    example_losses: torch.Tensor  # [b], nats, summed over each example's labels; no graph, on the CPU
    example_tokens: torch.Tensor  # [b], labels of each example; 1 if the loss is one of the complete example
    example_metrics: Mapping[str, torch.Tensor] = field(default_factory=dict)  # metric → [b], by example


class LabelledBatch(Protocol):
    """The interface of a batch of s sequences that a loss needs: a `Batch`, or a batch of another trainer's collator."""

    @property
    def inputs(self) -> Mapping[str, Any]: ...

    @property
    def labels(self) -> torch.Tensor: ...

    @property
    def reference(self) -> torch.Tensor | None: ...

    @property
    def sequences(self) -> int: ...

    def sequence_numbers(self) -> torch.Tensor: ...

    def split_pairs(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...


Objective: TypeAlias = Callable[[Any, Any, Scale], BatchLoss]  # its arguments: a model, a `LabelledBatch`, a scale


@dataclass(frozen=True, slots=True)
class _LabelLosses:
    """The cross-entropies of a batch's m labels, in the order of its sequences."""

    scaled: torch.Tensor  # [m] with a graph: the losses times the scale
    losses: torch.Tensor  # [m], nats; no graph
    sequences: torch.Tensor  # [m], the index of each label's sequence in the batch


LabelLoss: TypeAlias = Callable[[Any, Any, Scale], _LabelLosses]


@dataclass(frozen=True, slots=True)
class Likelihood:
    """The objective of language models: the cross-entropy of labels, summed over each sequence."""

    labels: LabelLoss

    def __call__(self, model: Any, batch: LabelledBatch, scale: Scale) -> BatchLoss:
        labels = self.labels(model, batch, scale)
        sequences = labels.sequences.cpu()  # not every device supports float64
        sums = torch.zeros(batch.sequences, dtype=torch.float64)
        sums.index_add_(0, sequences, labels.losses.cpu().double())
        return BatchLoss(labels.scaled.sum(), sums, torch.bincount(sequences, minlength=batch.sequences))


def make_likelihood(model: Any, batch: LabelledBatch, classification: bool) -> Objective:
    """Return the fastest objective that gives the model's own cross-entropies on `batch`."""
    if classification:
        return classification_loss
    if _is_head_equivalent(model, batch):
        return head_loss
    return logits_loss


def classification_loss(model: Any, batch: LabelledBatch, scale: Scale) -> BatchLoss:
    logits = model(**batch.inputs).logits.float()
    losses = F.cross_entropy(logits, batch.labels, reduction="none")
    correct = (logits.argmax(-1) == batch.labels).cpu().double()
    label_counts = torch.ones_like(batch.labels).cpu()
    return BatchLoss((losses * scale).sum(), losses.detach().cpu().double(), label_counts, {"accuracy": correct})


def _compute_head_losses(model: Any, batch: Batch, scale: Scale) -> _LabelLosses:
    """Compute the shifted cross-entropy with the head applied at label positions only."""
    # Padding is on the right and attention is causal, so no label position attends to padding. Without the mask,
    # attention takes its causal fast path.
    position_inputs: dict[str, torch.Tensor] = {}
    if batch.lengths is not None:  # the position of each token in its example
        positions = [torch.arange(length, device=batch.input_ids.device) for length in batch.lengths]
        position_inputs["position_ids"] = torch.cat(positions)[None]
    hidden = model.base_model(input_ids=batch.input_ids, use_cache=False, **position_inputs).last_hidden_state
    return _compute_hidden_losses(hidden, batch, OutputHead(model), scale)


def _compute_hidden_losses(hidden: torch.Tensor, batch: LabelledBatch, head: OutputHead, scale: Scale) -> _LabelLosses:
    """Compute the cross-entropies of the labels from the last hidden states [rows, n, d]."""
    is_label, targets, sequences, label_scale = _select_labels(batch, scale)
    return _LabelLosses(*chunked_cross_entropy(hidden[:, :-1][is_label], targets, head, label_scale), sequences)


def _compute_full_logits_losses(model: Any, batch: LabelledBatch, scale: Scale) -> _LabelLosses:
    return _compute_logits_losses(model(**batch.inputs, use_cache=False).logits, batch, scale)


def _compute_logits_losses(logits: torch.Tensor, batch: LabelledBatch, scale: Scale) -> _LabelLosses:
    is_label, targets, sequences, label_scale = _select_labels(batch, scale)
    losses = F.cross_entropy(logits[:, :-1][is_label].float(), targets, reduction="none")
    return _LabelLosses(losses * label_scale, losses.detach(), sequences)


def get_base_model(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def compute_native_pass_losses(model: Any, batch: LabelledBatch, scale: Scale) -> _LabelLosses:
    """Compute the same losses as `_compute_head_losses` in the native forward pass of another trainer's model.

    A pre-hook of the head computes the losses from the head's input, and the model's own call of the head gets one position. The
    losses come from complete logits if the head is adapted or never called, or if the model changes the logits in a way of its own.
    """
    base = get_base_model(model)
    head = base.get_output_embeddings()
    if head is None or isinstance(head, BaseTunerLayer):
        return _compute_logits_losses(model(**batch.inputs).logits, batch, scale)
    first_logits: list[torch.Tensor] = []
    losses: list[_LabelLosses] = []

    def compute_from_head_input(module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        output_head = OutputHead(base, module.forward)
        first_logits.append(output_head(inputs[0][:1, :1]).detach().float())
        losses.append(_compute_hidden_losses(inputs[0], batch, output_head, scale))
        return inputs[0][:, :1], *inputs[1:]

    handle = head.register_forward_pre_hook(compute_from_head_input)
    try:
        logits = model(**batch.inputs).logits
    finally:
        handle.remove()
    if not losses:  # the head's weight is used without the module
        return _compute_logits_losses(logits, batch, scale)
    if torch.allclose(first_logits[0], logits[:1, :1].detach().float(), rtol=HEAD_TOLERANCE, atol=1e-4):
        return losses[0]
    return _compute_logits_losses(model(**batch.inputs).logits, batch, scale)


head_loss = Likelihood(_compute_head_losses)
logits_loss = Likelihood(_compute_full_logits_losses)


def chunked_cross_entropy(
    hidden: torch.Tensor, targets: torch.Tensor, head: Head, scale: Scale
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the cross-entropy of `head(hidden)` in chunks.

    Args:
        hidden: hidden states [n, d].
        targets: labels [n].
        scale: a number, or one per label [n].

    Returns:
        `(scale × losses [n] with a graph, losses [n] without one)`.
    """
    if any(parameter.requires_grad for parameter in getattr(head, "linear", torch.nn.Module()).parameters()):
        chunk_losses = [
            checkpoint(_compute_chunk_losses, hidden_chunk, labels, head, use_reentrant=False)
            for hidden_chunk, labels in _split_chunks(hidden, targets, head)
        ]
        losses = torch.cat(chunk_losses)
        return losses * scale, losses.detach()
    apply: Any = _FrozenHeadLoss.apply  # untyped in torch
    scaled, losses = apply(hidden, targets, head, scale)
    return scaled, losses


class _FrozenHeadLoss(torch.autograd.Function):
    """Losses of a frozen head. The forward pass computes the gradient with respect to the hidden states.

    A row of hidden states affects no label but its own, so the backward pass multiplies the rows by the gradients of their losses.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, head: Head, scale: Scale
    ) -> tuple[torch.Tensor, torch.Tensor]:
        needs_gradient = ctx.needs_input_grad[0]
        losses: list[torch.Tensor] = []
        gradients: list[torch.Tensor] = []
        begin = 0
        for hidden_chunk, labels in _split_chunks(hidden, targets, head):
            weight = scale[begin : begin + len(labels)] if isinstance(scale, torch.Tensor) else scale
            begin += len(labels)
            with torch.set_grad_enabled(needs_gradient):
                leaf = hidden_chunk.detach().requires_grad_(needs_gradient)
                chunk_losses = _compute_chunk_losses(leaf, labels, head)
                total = (chunk_losses * weight).sum()
            if needs_gradient:
                gradients.append(torch.autograd.grad(total, leaf)[0])
            losses.append(chunk_losses.detach())
        if needs_gradient:
            ctx.save_for_backward(torch.cat(gradients))
        all_losses = torch.cat(losses)
        ctx.mark_non_differentiable(all_losses)
        return all_losses * scale, all_losses

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (hidden_gradient,) = ctx.saved_tensors
        return hidden_gradient * gradients[0][:, None].to(hidden_gradient.dtype), None, None, None


def _compute_chunk_losses(hidden: torch.Tensor, targets: torch.Tensor, head: Head) -> torch.Tensor:
    return F.cross_entropy(head(hidden).float(), targets, reduction="none")


def _split_chunks(hidden: torch.Tensor, targets: torch.Tensor, head: Head) -> list[tuple[torch.Tensor, torch.Tensor]]:
    vocabulary = getattr(head, "vocabulary", 2**16)
    rows = max(1, MAX_CHUNK_LOGITS // vocabulary)
    return list(zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True))


class OutputHead:
    """A model's output embedding, followed by the logit scaling and soft capping of its configuration."""

    def __init__(self, model: Any, call: Head | None = None) -> None:
        """Read the configuration of `model`. `call` runs the embedding; None calls the module itself, with its hooks."""
        config = model.config.get_text_config()
        self.linear = model.get_output_embeddings()
        self._call: Head = call or self.linear
        self.vocabulary: int = config.vocab_size
        self._cap: float | None = getattr(config, "final_logit_softcapping", None)  # Gemma
        self._multiply: float = getattr(config, "logit_scale", None) or 1.0  # Cohere
        self._divide: float = getattr(config, "logits_scaling", None) or 1.0  # Granite

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self._call(hidden)
        if self._multiply != self._divide:
            logits = logits * self._multiply / self._divide
        return logits if self._cap is None else torch.tanh(logits / self._cap) * self._cap


def _select_labels(batch: LabelledBatch, scale: Scale) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Scale]:
    """Return where the next token is a label [b, n-1], and of each of these m labels the token, the sequence and the scale."""
    shifted = batch.labels[:, 1:]
    is_label = shifted != IGNORED
    sequences = batch.sequence_numbers()[:, 1:][is_label]
    return is_label, shifted[is_label], sequences, scale[sequences] if isinstance(scale, torch.Tensor) else scale


@torch.no_grad()
def _is_head_equivalent(model: Any, batch: LabelledBatch) -> bool:
    """Return whether the head alone gives the model's own losses on `batch`."""
    base = getattr(model, "base_model", None)
    if model.get_output_embeddings() is None or not isinstance(base, torch.nn.Module) or base is model:
        return False
    model_losses = logits_loss(model, batch, 1.0).example_losses
    head_losses = head_loss(model, batch, 1.0).example_losses
    return torch.allclose(
        head_losses, model_losses, rtol=HEAD_TOLERANCE if model_losses.isfinite().all() else 0, atol=1e-4
    )


@torch.no_grad()
def can_see_later_tokens(model: Any, token_ids: torch.Tensor) -> bool:
    """Return whether changing the last token changes the logits before it, as in BERT.

    Such a model sees the label that it predicts. Two rows of one batch are compared; those of a causal model are equal except
    for rounding.

    Args:
        token_ids: the token ids [n] of an example.
    """
    ids = token_ids[:CAUSALITY_TOKENS].repeat(2, 1)
    ids[1, -1] = (ids[1, -1] + 1) % model.config.get_text_config().vocab_size
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float()
    changes = (logits[1] - logits[0]).abs().amax(dim=1)
    return bool(changes[:-1].max() > CAUSALITY_TOLERANCE[next(model.parameters()).dtype] * changes[-1])


TIE_MARGIN = 1e-5  # smaller reward margins are rounding errors and count as half a correct pair


@dataclass(frozen=True, slots=True)
class PreferenceLoss:
    labels: LabelLoss  # computes the cross-entropies of the labels
    beta: float  # weight of the deviation from the base

    def __call__(self, model: Any, batch: LabelledBatch, scale: Scale) -> BatchLoss:
        """Compute the loss of each of b pairs; `batch` holds 2b sequences and their reference log-probabilities [2b]."""
        assert batch.reference is not None
        labels = self.labels(model, batch, 1.0)
        counts = torch.bincount(labels.sequences, minlength=batch.sequences).tolist()
        # Each sequence is summed alone, because a sum over padded rows depends on the longest sequence of the batch.
        sums = torch.stack([sequence_losses.sum() for sequence_losses in torch.split(labels.scaled, counts)])
        chosen, rejected = batch.split_pairs(-sums - batch.reference.to(sums))
        margins = self.beta * (chosen - rejected)
        losses = -F.logsigmoid(margins)
        metrics = {
            "reward_accuracy": (1 + margins.sign() * (margins.abs() > TIE_MARGIN)) / 2,
            "reward_margin": margins,
            "chosen_log_ratio": chosen,
        }
        return BatchLoss(
            (losses * scale).sum(),
            losses.detach().cpu().double(),
            torch.ones(len(losses), dtype=torch.long),
            {name: values.detach().cpu().double() for name, values in metrics.items()},
        )


class Reference:
    """The log-probabilities of both answers of every pair under the base, computed once and kept in memory."""

    def __init__(
        self,
        batches: Mapping[SplitName, CacheBatches],
        compute: Callable[[SplitName, Sequence[int]], torch.Tensor],
    ) -> None:
        """Prepare the storage without computing anything.

        Args:
            batches: the pairs that are computed together, by split.
            compute: a function that returns the log-probabilities [2b] of pairs of a split.
        """
        self.batches = batches
        self._compute = compute
        self._values = {
            split: np.full((len(split_batches.examples), 2), np.nan) for split, split_batches in batches.items()
        }

    def compute_missing(self, split: SplitName, indices: Iterable[int]) -> Iterator[list[int]]:
        for group in self.batches[split].iterate_missing(indices):
            self._values[split][group] = self._compute(split, group).view(-1, 2).numpy()
            yield group

    def get_log_probabilities(self, split: SplitName, indices: Sequence[int]) -> torch.Tensor:
        """Return the log-probabilities [2b] of the chosen and the rejected answer of each pair, in float64 on the CPU."""
        deque(self.compute_missing(split, indices), maxlen=0)
        return torch.from_numpy(self._values[split][list(indices)]).flatten()
