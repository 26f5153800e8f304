"""Scores of the examples in another trainer's batches: of language, of labels, and of preference pairs.

A batch is what the trainer's own collator makes. Its form shows in its tensors: `completion_mask` for TRL's preference pairs, one label a
row for classification, else one label a token. Labels never reach the model, since fused losses return no logits when they get them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from rightrank.data.token_store import IGNORED
from rightrank.schema.errors import LIBRARY_ERRORS, DataError, RightrankError, RunError
from rightrank.train.evaluation import Scores
from rightrank.train.loss import adapters_off
from rightrank.train.multi_lora import lora_modules
from rightrank.train.prefix import find_blocks, frozen_blocks, returning

Batch = Mapping[str, Any]  # as the trainer's collator makes it
BETA = 0.1  # of preference pairs, as TRL's default

# What a measurement in someone else's process can end in; all else ends the process anyway.
FAILURES = (RightrankError, MemoryError, *LIBRARY_ERRORS)

AGREED = "is_known_to_all"  # of an error: every process has raised
CHUNK = 1024  # positions whose logits exist at a time: 0.5 GB in float32 for a vocabulary of 128,256
KEPT_BYTES = 2**30  # hidden states that are kept between passes, at most
ROUNDING = 1e-5  # relative: what a kept hidden state may change in a loss
GROUP = "group"  # of a batch's rows: numbers that say which of all rows belong together
NOT_FOR_THE_MODEL = (GROUP, "labels", "num_items_in_batch", "completion_mask", "ref_chosen_logps", "ref_rejected_logps")


@dataclass(frozen=True, slots=True)
class _BatchScores:
    """Of each example: losses [n] in nats, summed over its labels; tokens [n]; correct [n] of a classifier."""

    losses: torch.Tensor
    tokens: torch.Tensor
    correct: torch.Tensor | None = None
    rows: torch.Tensor | None = None  # in the batch; None: each example is one

    def groups(self, batch: Batch) -> list[int]:
        """Of each example; empty where the batch has none, or its rows are others than those that have."""
        numbers = batch.get(GROUP)
        if numbers is None or self.rows is None or len(numbers) != len(batch["input_ids"]):
            return numbers.tolist() if numbers is not None and len(numbers) == len(self.losses) else []
        found: list[int] = numbers[self.rows.to(numbers.device)].tolist()
        return found


class HeldOutBatches:
    """Batches that one model scores again and again, with other LoRA factors each time.

    What no factor changes is computed once: the hidden states below the first adapted block, and the reference of pairs. With several
    processes each scores its share of the batches; where the model is sharded all of them call it equally often.
    """

    def __init__(self, model: Any, batches: Sequence[Batch], beta: float = BETA) -> None:
        self._model = model
        self._batches = batches[process_index() :: world_size()]
        self._in_step = (
            batches[0] if len(self._batches) < -(-len(batches) // world_size()) and is_sharded(model) else None
        )
        self._beta = beta
        self._references: dict[int, torch.Tensor] = {}
        self._lower = None if is_sharded(model) else _lower_blocks(model)
        self._is_checked = False
        # A module that is trained whole is off in the reference, whose lower blocks are then others.
        self._shares_reference = not any(isinstance(one, AuxiliaryTrainingWrapper) for one in model.modules())

    @torch.no_grad()
    def scores(self) -> Scores:
        """The scores of every example of all processes, in one order."""
        with together():
            found = [self._one(number, batch) for number, batch in enumerate(self._batches)]
            if self._in_step is not None:
                batch_scores(self._model, self._in_step, self._beta)
        groups = [group for one, batch in zip(found, self._batches, strict=True) for group in one.groups(batch)]
        return _gathered(found, groups)

    def _one(self, number: int, batch: Batch) -> _BatchScores:
        if "completion_mask" in batch and number not in self._references:
            with self._serving(number) if self._shares_reference else nullcontext():
                self._references[number] = reference(self._model, batch)
        with self._serving(number):
            found = self._computed(number, batch)
        if self._lower is None or self._is_checked:
            return found
        self._is_checked = True
        whole = self._computed(number, batch)
        with self._serving(number):
            again = self._computed(number, batch)
        if not torch.allclose(again.losses, whole.losses, rtol=ROUNDING, atol=ROUNDING):
            self._lower = None  # the model's lower blocks do more than to pass hidden states on
        return whole

    def _serving(self, number: int) -> AbstractContextManager[None]:
        return nullcontext() if self._lower is None else self._lower.serving(number)

    def _computed(self, number: int, batch: Batch) -> _BatchScores:
        return batch_scores(self._model, batch, self._beta, self._references.get(number))


def _gathered(found: Sequence[_BatchScores], groups: Sequence[int]) -> Scores:
    """The examples of all processes, in the order of these."""
    losses = [loss for one in found for loss in one.losses.double().tolist()]
    tokens = [count for one in found for count in one.tokens.tolist()]
    correct = [right for one in found if one.correct is not None for right in one.correct.double().tolist()]
    losses, tokens, correct, groups = (
        list(chain(*parts)) for parts in zip(*_over_processes((losses, tokens, correct, groups)), strict=True)
    )
    by_example = {"accuracy": correct} if correct else {}
    return Scores(losses, tokens, by_example, groups if len(groups) == len(losses) else None)


@contextmanager
def together() -> Iterator[None]:
    """Where one of several processes fails in the block all of them raise: none may wait for the others.

    Raises:
        RunError: another process failed.
    """
    failure: Exception | None = None
    try:
        yield
    except FAILURES as error:
        if hasattr(error, AGREED):
            raise  # in a block within this one
        failure = error
    failed = any(_over_processes(failure is not None))
    if failed:
        failure = failure or RunError("another process of the training failed")
        setattr(failure, AGREED, True)
        raise failure


def _over_processes(mine: Any) -> list[Any]:
    """What every process has, by their numbers."""
    every = [mine] * world_size()
    if len(every) > 1:
        dist.all_gather_object(every, mine)
    return every


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """The number of this process; process 0 writes files."""
    return dist.get_rank() if world_size() > 1 else 0


def batch_scores(
    model: Any, batch: Batch, beta: float = BETA, reference_logps: torch.Tensor | None = None
) -> _BatchScores:
    """Scores of one batch.

    Args:
        model: PEFT's model.
        batch: What the trainer's collator makes.
        beta: Of the loss of preference pairs, TRL's `sigmoid`.
        reference_logps: [2n] of the pairs, where they are known.

    Raises:
        DataError: labels of another form than one class a row or one token a position.
    """
    if "completion_mask" in batch:
        before = reference(model, batch) if reference_logps is None else reference_logps
        logps = _completion_logps(model, batch)
        chosen, rejected = (logps - before.to(logps)).chunk(2)
        losses = -F.logsigmoid(beta * (chosen - rejected))
        return _BatchScores(losses, torch.ones(len(losses), dtype=torch.long, device=losses.device))
    base = model.get_base_model()
    tensors = _on_device(model, batch)
    labels = tensors.get("labels")
    if labels is None or labels.is_floating_point() or not 1 <= labels.dim() <= 2:
        raise DataError(
            "the batches have no labels of classes or tokens; a regression, several labels a row, or a loss of one's own has no scores here"
        )
    if is_of_classes(batch):
        labels = labels.flatten()
        logits = model(**_passed(model, tensors)).logits
        losses = F.cross_entropy(logits.float(), labels, reduction="none")
        return _BatchScores(losses, torch.ones_like(labels), logits.argmax(-1) == labels)
    if base.config.is_encoder_decoder or not base.can_generate():
        raise DataError(
            f"{type(base).__name__}: examples are scored of causal language models and of classifiers of whole rows; save the adapter "
            "and use rightrank resize --data"
        )
    positions = tensors.get("position_ids")
    starts = _starts(labels, positions)
    labels = labels.masked_fill(starts, IGNORED)  # no example predicts the first token of the next one
    losses = _token_losses(model, _passed(model, tensors), labels[:, 1:])
    return _by_segment(losses, labels[:, 1:], starts[:, 1:])


def is_of_classes(batch: Batch) -> bool:
    """Whether the labels are one class a row."""
    labels = batch["labels"]
    return bool(labels.dim() == 1 or labels.shape[1] == 1)


def examples_in(batch: Batch) -> int:
    """How many examples of a batch have labels, without the model; a batch of another form counts its rows."""
    labels = batch.get("labels")
    if "completion_mask" in batch:
        return int((batch["completion_mask"].sum(1) > 0).sum()) // 2
    if labels is None or is_of_classes(batch) or labels.dim() > 2:
        return 0 if labels is None else len(labels)
    starts = _starts(labels, batch.get("position_ids"))
    seen = labels.masked_fill(starts, IGNORED)[:, 1:]
    return len(_by_segment(torch.zeros_like(seen, dtype=torch.float32), seen, starts[:, 1:]).tokens)


def positions(batch: Batch) -> int:
    """The positions that a pass computes: tokens with padding, or rows where there are none."""
    tokens = batch.get("input_ids")
    return len(batch["labels"]) if tokens is None else int(tokens.numel())


@torch.no_grad()
def reference(model: Any, batch: Batch) -> torch.Tensor:
    """[2n] log-probabilities of the completions under the reference: precomputed, of the adapter `ref`, or of the base."""
    if "ref_chosen_logps" in batch:
        return torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])
    with active_adapter(model, "ref") if "ref" in model.peft_config else adapters_off(model):
        return _completion_logps(model, batch)


def _completion_logps(model: Any, batch: Batch) -> torch.Tensor:
    tensors = _on_device(model, batch)
    labels = tensors["input_ids"].masked_fill(tensors["completion_mask"] == 0, IGNORED)[:, 1:]
    return -_token_losses(model, _passed(model, tensors), labels).sum(1)


def _on_device(model: Any, batch: Batch) -> dict[str, torch.Tensor]:
    device = next(model.parameters()).device
    return {key: value.to(device) for key, value in batch.items() if isinstance(value, torch.Tensor)}


def _passed(model: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    passed: dict[str, Any] = {key: value for key, value in tensors.items() if key not in NOT_FOR_THE_MODEL}
    if "use_cache" in inspect.signature(model.get_base_model().forward).parameters:
        passed["use_cache"] = False
    return passed


def _token_losses(model: Any, passed: Mapping[str, Any], labels: torch.Tensor) -> torch.Tensor:
    """Loss of every position [rows, length - 1]; 0 without a label.

    The output head sees `CHUNK` positions at a time: its pre-hook computes the losses from its input, and the model's own call of the head
    gets one position. Where the model changes the logits after the head (a soft cap, a scale), where the head is adapted or never called,
    and in a backward pass of a sharded model, the losses come from whole logits.
    """
    head = model.get_base_model().get_output_embeddings()
    if head is None or isinstance(head, BaseTunerLayer) or (torch.is_grad_enabled() and is_sharded(model)):
        return _in_chunks(torch.nn.Identity(), model(**passed).logits[:, :-1], labels)
    found: list[torch.Tensor] = []

    def before(module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden = inputs[0]
        found.append(module.forward(hidden[:1, :1]).detach())
        found.append(_in_chunks(module.forward, hidden[:, : labels.shape[1]], labels))
        return hidden[:, :1], *inputs[1:]

    handle = head.register_forward_pre_hook(before)
    try:
        logits = model(**passed).logits
    finally:
        handle.remove()
    if not found:  # the head's weight is used without the module
        return _in_chunks(torch.nn.Identity(), logits[:, :-1], labels)
    if not torch.allclose(found[0].float(), logits[:1, :1].detach().float(), rtol=1e-3, atol=1e-4):
        return _in_chunks(torch.nn.Identity(), model(**passed).logits[:, :-1], labels)
    return found[1]


def _in_chunks(
    head: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Losses [rows, length], in float32 for `CHUNK` positions at a time; a backward pass computes them again."""

    def losses(rows: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(head(rows).float(), wanted, reduction="none", ignore_index=IGNORED)

    targets = labels.flatten().to(hidden.device)
    parts: list[Any] = [
        checkpoint(losses, *chunk, use_reentrant=False, preserve_rng_state=False)
        for chunk in zip(torch.split(hidden.flatten(0, 1), CHUNK), torch.split(targets, CHUNK), strict=True)
    ]
    return torch.cat(parts).view(labels.shape).to(labels.device)


def _starts(labels: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
    """[rows, length]: where an example begins. Examples that are packed into one row begin where `position_ids` is 0.

    Of left-padded rows the padding has position 0 too, or 1: it holds no label and makes no example.
    """
    starts = torch.zeros_like(labels, dtype=torch.bool)
    starts[:, 0] = True
    if positions is not None and positions.dim() == 2:
        starts |= positions.expand(len(labels), -1) == 0
    return starts


def _by_segment(losses: torch.Tensor, labels: torch.Tensor, starts: torch.Tensor) -> _BatchScores:
    """Sums by example; the first position of a row begins one as well."""
    starts = starts.clone()
    starts[:, 0] = True
    number = starts.flatten().cumsum(0) - 1
    count = int(number[-1]) + 1
    labelled = labels.flatten() != IGNORED
    sums = losses.new_zeros(count).index_add(0, number, losses.flatten())
    tokens = torch.zeros(count, dtype=torch.long, device=labels.device).index_add(0, number, labelled.long())
    kept = tokens > 0
    return _BatchScores(sums[kept], tokens[kept], rows=starts.nonzero()[:, 0][kept])


def is_sharded(model: Any) -> bool:
    """Whether a process holds parts of the parameters: FSDP2's `DTensor`s, or DeepSpeed's empty parameters."""
    return is_partitioned(model) or any(isinstance(one, DTensor) for one in model.parameters())


def is_partitioned(model: Any) -> bool:
    """Whether DeepSpeed's ZeRO-3 holds the parameters, which are then empty outside a pass."""
    return any(hasattr(one, "ds_id") for one in model.parameters())


@contextmanager
def gathered(model: Any) -> Iterator[None]:
    """In the block the trained parameters of ZeRO-3 are whole; nothing happens for other models."""
    parts = [
        one
        for name, one in model.named_parameters()
        if hasattr(one, "ds_id") and ("lora_" in name or one.requires_grad)
    ]
    with import_module("deepspeed").zero.GatheredParameters(parts) if parts else nullcontext():
        yield


@contextmanager
def active_adapter(model: Any, name: str) -> Iterator[None]:
    """In the block the model computes with the adapter `name`; no parameter and no configuration changes."""
    layers: list[Any] = [one for one in model.modules() if isinstance(one, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    before = [(layer, layer._active_adapter, layer._disable_adapters) for layer in layers]
    for layer in layers:
        layer._active_adapter, layer._disable_adapters = [name], False
    try:
        yield
    finally:
        for layer, active, disabled in before:
            layer._active_adapter, layer._disable_adapters = active, disabled


def _lower_blocks(model: Any) -> _LowerBlocks | None:
    """The blocks below the first adapted one; None where there are none, or where others have replaced or hooked
    their passes."""
    found = find_blocks(model.get_base_model())
    if found is None:
        return None
    adapted, head = lora_modules(model), model.get_base_model().get_output_embeddings()
    if any(not one.startswith(f"{found[0]}.") and layer is not head for one, layer in adapted.items()):
        return None  # a projector below the blocks, say
    blocks = frozen_blocks(model.get_base_model(), list(adapted))
    if not blocks or any("forward" in vars(one) or one._forward_pre_hooks or one._forward_hooks for one in blocks):
        return None
    return _LowerBlocks(blocks)


def upper_share(model: Any) -> float:
    """The share of a pass, by parameters, from the first adapted block on."""
    found, lower = find_blocks(model.get_base_model()), _lower_blocks(model)
    if found is None or lower is None:
        return 1.0
    head = model.get_base_model().get_output_embeddings()
    whole = _size(found[1]) + (0 if head is None else _size(head))
    return 1 - sum(map(_size, lower.blocks)) / whole


def _size(module: Any) -> int:
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in module.parameters())


class _LowerBlocks:
    """The output of the last of some blocks, kept for each batch number."""

    def __init__(self, blocks: Sequence[Any]) -> None:
        self.blocks = blocks
        self.kept: dict[int, Any] = {}
        self._bytes = 0

    @contextmanager
    def serving(self, number: int) -> Iterator[None]:
        """In the block, a model's pass over batch `number` takes the kept output, or keeps it."""
        if (output := self.kept.get(number)) is not None:
            device = next(self.blocks[-1].parameters()).device
            with returning(self.blocks, (output[0].to(device),) if isinstance(output, tuple) else output.to(device)):
                yield
            return
        handle = self.blocks[-1].register_forward_hook(lambda *found: self._keep(number, found[2]))
        try:
            yield
        finally:
            handle.remove()

    def _keep(self, number: int, output: Any) -> None:
        if isinstance(output, tuple) and len(output) > 1:
            return  # with attention weights, say
        hidden = output[0] if isinstance(output, tuple) else output
        self._bytes += hidden.numel() * hidden.element_size()
        if self._bytes <= KEPT_BYTES:
            kept = hidden.detach().cpu()
            self.kept[number] = (kept,) if isinstance(output, tuple) else kept
