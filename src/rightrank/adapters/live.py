"""The smallest adapter of a model that another program trained: its truncations, scored with the model as it is in memory.

The walk is that of `resize --data`: the adapter is saved, truncated by the same code, and each truncation is put in the place of the trained
factors for one evaluation. The model is given back as it came: parameters, modes, gradients, hooks and random states.
"""

from __future__ import annotations

import inspect
import random
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from rightrank.adapters.held_out import capped
from rightrank.adapters.resize import candidate_ranks
from rightrank.adapters.rewrite import write_resized
from rightrank.decision.adapter import Criterion, adapter_answer, trained_answer
from rightrank.models.adapter_files import AdapterFolder, open_adapter, save_adapter
from rightrank.models.kinds import kind_of
from rightrank.models.kinds.linear import Linear
from rightrank.models.truncation import Moments
from rightrank.schema.decision import AdapterAnswer
from rightrank.schema.errors import ModelError
from rightrank.schema.trials import TrialFinished
from rightrank.train.adapter import lora_modules
from rightrank.train.adapter_runtime import finished_trial
from rightrank.train.covariances import MOMENT_TOKENS, MomentSums, rank_space
from rightrank.train.evaluation import Scores

Batch = Mapping[str, Any]  # as the trainer's collator makes it: tensors with `labels`

CHUNK = 4096  # positions whose logits are in float32 at a time
NOT_FOR_THE_MODEL = ("labels", "num_items_in_batch")  # labels stay outside: fused losses return no logits


@dataclass(frozen=True, slots=True)
class LiveAdapter:
    """What is measured.

    Attributes:
        model: PEFT's model, with a LoRA adapter of linear layers.
        held_out: batches of examples that the training did not see.
        train: batches of training examples, for second moments; without them truncation is by singular values.
        margin: how much worse is still enough, in nats a token (or accuracy); None for the metric's default.
        ranks: candidates; None for the powers of two below the adapter's rank.
        name: the adapter's name in PEFT.
        metric: `loss`, or `accuracy` of a classifier.
    """

    model: Any
    held_out: Sequence[Batch]
    train: Sequence[Batch] = ()
    margin: float | None = None
    ranks: Sequence[int] | None = None
    name: str = "default"
    metric: str = "loss"


@dataclass(frozen=True, slots=True)
class LiveAnswer:
    """The answer, the folder of the adapter that it names, and what it took."""

    answer: AdapterAnswer
    folder: Path
    examples: int
    seconds: float
    notes: tuple[str, ...] = ()


def smallest_adapter(live: LiveAdapter, working: Path) -> LiveAnswer:
    """Walk down over the truncations of a live adapter until one loses more than the margin.

    Args:
        live: The model, its data and the margin.
        working: A folder that gets `trained/` and every measured truncation.

    Raises:
        ModelError: the adapter cannot be truncated.
    """
    require_truncatable(live.model, live.name)
    started = time.monotonic()
    base = str(live.model.peft_config[live.name].base_model_name_or_path or "")
    save_adapter(live.model, working / "trained", base, live.name)
    adapter = open_adapter(working / "trained")
    with as_it_came(live.model, live.name):
        moments, notes = gather(live)
        trials = _walk(live, adapter, moments, working)
    answer = _answer(trials, live) or trained_answer(trials[0], _criterion(trials, live))
    count = len(trials[0].item_losses)
    return LiveAnswer(answer, working / answer.trial_id, count, time.monotonic() - started, notes)


def require_truncatable(model: Any, name: str) -> None:
    """Refuse what no truncation can be made of.

    Raises:
        ModelError: no PEFT model, no adapter of that name, another kind than LoRA of linear layers, or rank 1.
    """
    config = getattr(model, "peft_config", {}).get(name)
    if config is None:
        raise ModelError(
            f"the model has no PEFT adapter {name!r}; give a model that PEFT has wrapped, or the adapter's name"
        )
    modules = lora_modules(model)
    odd = [
        module for module, layer in modules.items() if name in layer.lora_A and not isinstance(kind_of(layer), Linear)
    ]
    if not modules or odd or config.use_dora:
        what = odd[0] if odd else config.peft_type
        raise ModelError(
            f"{what}: only LoRA of linear layers is truncated in memory; save it and use rightrank resize --data"
        )
    if config.r < 2:
        raise ModelError("the adapter has rank 1: there is no lower rank")


def _walk(
    live: LiveAdapter, adapter: AdapterFolder, moments: Mapping[str, Moments], working: Path
) -> list[TrialFinished]:
    """The adapter and its truncations, downward until one does not hold."""
    ranks = sorted(candidate_ranks(adapter, live.ranks), reverse=True)
    top = f"r{ranks[0]}"
    trials: list[TrialFinished] = []
    for rank in ranks:
        folder = working / f"r{rank}"
        if rank == adapter.rank:
            shutil.copytree(adapter.path, folder)
        else:
            write_resized(adapter, folder, capped(adapter, rank, moments), None, moments)
            put_in_place(live.model, live.name, open_adapter(folder))
        parent = None if folder.name == top else top
        trials.append(
            finished_trial(folder.name, rank, scores(live.model, live.held_out), live.metric, truncate_from=parent)
        )
        if parent and not _holds(trials, live):
            break
    return trials


def _holds(trials: Sequence[TrialFinished], live: LiveAdapter) -> bool:
    """Whether the last truncation is the answer so far."""
    answer = _answer(trials, live)
    return answer is not None and answer.trial_id == trials[-1].trial_id


def _answer(trials: Sequence[TrialFinished], live: LiveAdapter) -> AdapterAnswer | None:
    return adapter_answer(trials, _criterion(trials, live))


def _criterion(trials: Sequence[TrialFinished], live: LiveAdapter) -> Criterion:
    is_token_loss = trials[0].item_correct is None
    return Criterion(live.metric, live.metric == "accuracy", live.margin, token_loss=is_token_loss)


def put_in_place(model: Any, name: str, adapter: AdapterFolder) -> None:
    """Write the factors of an adapter folder over the leading rows and columns of a live adapter; the others become zero.

    The live module multiplies by its own scale s, the folder's by s': B takes s'/s.
    """
    layers = lora_modules(model)
    with torch.no_grad():
        for module in adapter.modules:
            layer = layers[module.name]
            b, a = (torch.from_numpy(part) for part in adapter.factors(module))
            ratio = module.scaling / layer.scaling[name]
            for weight, part in ((layer.lora_B[name].weight, b * ratio), (layer.lora_A[name].weight, a)):
                weight.zero_()[: part.shape[0], : part.shape[1]].copy_(part)


@contextmanager
def as_it_came(model: Any, name: str) -> Iterator[None]:
    """In the block the model evaluates with the adapter `name`; afterwards it is as before, to the bit."""
    weights = {id(one): (one, one.detach().clone()) for one in _adapter_weights(model, name)}
    modes = [(module, module.training) for module in model.modules()]
    active = list(model.active_adapters) if hasattr(model, "active_adapters") else [name]
    needs = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        if active != [name]:
            model.set_adapter(name)
        model.eval()
        yield
    finally:
        if active != [name]:
            model.base_model.set_adapter(active)
        with torch.no_grad():
            for parameter, value in weights.values():
                parameter.copy_(value)
        for parameter, required in needs:
            parameter.requires_grad_(required)
        for module, training in modes:
            module.training = training
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
        if devices:
            torch.cuda.set_rng_state_all(devices)


def _adapter_weights(model: Any, name: str) -> list[torch.Tensor]:
    return [
        part[name].weight
        for layer in lora_modules(model).values()
        for part in (layer.lora_A, layer.lora_B)
        if name in part
    ]


def gather(live: LiveAdapter) -> tuple[dict[str, Moments], tuple[str, ...]]:
    """`(second moments by module, notes)` of about `MOMENT_TOKENS` tokens of training examples."""
    if not live.train:
        return {}, ("truncated by singular values: no training examples were given for second moments",)
    sums, read, labels = MomentSums(), 0, 0
    names = [name for name, layer in lora_modules(live.model).items() if live.name in layer.lora_A]
    with rank_space(live.model, names, sums.add, live.name):
        for batch in live.train:
            if read >= MOMENT_TOKENS:
                break
            found = batch_scores(live.model, batch)
            torch.autograd.backward(found.losses.sum())
            read += batch["input_ids"].numel()
            labels += int(found.tokens.sum())
    if not sums.pairs:
        return {}, ("truncated by singular values: the model's layers do not call PEFT's modules (fused kernels)",)
    return sums.moments(labels), ()


@dataclass(frozen=True, slots=True)
class BatchScores:
    """Of each example: losses [n] in nats, summed over its labels; tokens [n]; correct [n] of a classifier."""

    losses: torch.Tensor
    tokens: torch.Tensor
    correct: torch.Tensor | None = None


def scores(model: Any, batches: Sequence[Batch]) -> Scores:
    """The scores of every example, without gradients."""
    with torch.no_grad():
        found = [batch_scores(model, batch) for batch in batches]
    losses = torch.cat([one.losses for one in found]).double().tolist()
    tokens = torch.cat([one.tokens for one in found]).tolist()
    correct = [one.correct for one in found if one.correct is not None]
    return Scores(losses, tokens, {"accuracy": torch.cat(correct).double().tolist()} if correct else {})


def batch_scores(model: Any, batch: Batch) -> BatchScores:
    """Scores of one batch from its logits: the labels are not passed to the model, whose fused loss would return none."""
    device = next(model.parameters()).device
    inputs = {key: value.to(device) for key, value in batch.items() if isinstance(value, torch.Tensor)}
    labels = inputs["labels"]
    passed: dict[str, Any] = {key: value for key, value in inputs.items() if key not in NOT_FOR_THE_MODEL}
    if "use_cache" in inspect.signature(model.get_base_model().forward).parameters:
        passed["use_cache"] = False
    logits = model(**passed).logits
    if logits.dim() == 2:
        losses = cross_entropy(logits.float(), labels, reduction="none")
        return BatchScores(losses, torch.ones_like(labels), logits.argmax(-1) == labels)
    return _by_segment(token_losses(logits[:, :-1], labels[:, 1:]), labels[:, 1:], inputs.get("position_ids"))


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Loss of every position [rows, length]; 0 without a label. Logits are in float32 for `CHUNK` positions at a time."""
    flat, targets = logits.flatten(0, 1), labels.flatten()
    parts = [
        cross_entropy(
            flat[start : start + CHUNK].float(), targets[start : start + CHUNK], reduction="none", ignore_index=-100
        )
        for start in range(0, len(targets), CHUNK)
    ]
    return torch.cat(parts).view(labels.shape)


def _by_segment(losses: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor | None) -> BatchScores:
    """Sums by example. Examples that are packed into one row begin where `position_ids` is 0."""
    rows = len(labels)
    starts = torch.zeros_like(labels, dtype=torch.bool)
    starts[:, :1].fill_(True)
    if positions is not None:
        starts |= positions[:, 1:].expand(rows, -1) == 0
    number = starts.flatten().cumsum(0) - 1
    count = int(number[-1]) + 1
    labelled = labels.flatten() != -100
    sums = losses.new_zeros(count).index_add(0, number, losses.flatten())
    tokens = torch.zeros(count, dtype=torch.long, device=labels.device).index_add(0, number, labelled.long())
    kept = tokens > 0
    return BatchScores(sums[kept], tokens[kept])
