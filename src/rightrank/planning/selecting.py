"""The plan of a selection: what each of its ranks takes in the loop that `select` trains with, and which ranks fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rightrank.engine.batches import collate
from rightrank.engine.loss import logits_loss
from rightrank.engine.pack_size import MOST_ARMS
from rightrank.engine.token_store import EncodedItem
from rightrank.errors import SettingsError
from rightrank.io.models import LoadedModel, device_memory
from rightrank.planning.budget import cheapest_changes, context_bytes, needed
from rightrank.planning.capacity import starting_range
from rightrank.planning.estimate import Estimator
from rightrank.settings import PlanSettings, SelectSettings, make_plan_settings

PROBED_ITEMS = 8
# Changes that `select` can make too, under its own names.
SELECT_CHANGES = ("batch_size", "gradient_checkpointing", "seq_len", "dtype")


@dataclass(frozen=True, slots=True)
class SelectionPlan:
    """Predicted peaks of the arms, and the ranks that are left."""

    peak_bytes: dict[int, int]  # allocated by tensors, by rank
    needed_bytes: dict[int, int]  # with segments, process and headroom
    memory_bytes: int | None  # None: not known, so nothing is refused
    ranks: tuple[int, ...]  # those that fit, or all
    largest_pack: int | None = None  # arms of the highest rank that fit together; None: not known, or none are packed

    def left_out(self) -> tuple[int, ...]:
        return tuple(rank for rank in self.needed_bytes if rank not in self.ranks)

    def notice(self) -> str | None:
        """What a person should know: the ranks left out, and why."""
        left_out = self.left_out()
        if not left_out or self.memory_bytes is None:
            return None
        wanted = ", ".join(f"{rank} ({_gib(self.needed_bytes[rank])})" for rank in left_out)
        return f"left out, as they need more than the {_gib(self.memory_bytes)} there are: ranks {wanted}"


def plan_selection(config: Any, settings: SelectSettings, longest: int, device: str) -> SelectionPlan:
    """Predict every rank's peak, and keep the ranks that fit.

    Args:
        config: the model's configuration.
        settings: of the selection; without `memory_bytes`, a CUDA device's own memory is the budget.
        longest: tokens of the longest item.
        device: `cpu`, `cuda`, …

    Raises:
        SettingsError: fewer ranks fit than a comparison needs, with what to change.
    """
    kind = "cuda" if device.startswith("cuda") else "cpu"
    memory = settings.memory_bytes or (device_memory() if kind == "cuda" else None)
    plan_settings = _plan_settings(settings, longest, kind, memory)
    if getattr(config, "_attn_implementation", None) == "eager":
        plan_settings = plan_settings.model_copy(update={"attn_implementation": "eager"})
    estimator = Estimator(config, plan_settings)
    highest = {rank: estimator.estimate(rank).highest for rank in settings.ranks}
    peaks = {rank: high.peak_bytes for rank, high in highest.items()}
    needs = {rank: needed(high.reserved_bytes, plan_settings) for rank, high in highest.items()}
    fitting = tuple(rank for rank in settings.ranks if memory is None or needs[rank] <= memory)
    if len(fitting) < min(2, len(settings.ranks)):
        raise SettingsError(_refusal(estimator, needs, memory or 0))
    packs = memory is not None and settings.pack_size != 1 and (kind == "cuda" or settings.pack_size is not None)
    largest = _largest_pack(estimator, max(fitting), settings.pack_size or MOST_ARMS) if packs else None
    return SelectionPlan(peaks, needs, memory, fitting, largest)


def _largest_pack(estimator: Estimator, rank: int, wanted: int) -> int:
    """Arms that fit together: `wanted`, or the largest power of two below it that does."""
    sizes = [wanted, *(2**power for power in reversed(range(wanted.bit_length())) if 2**power < wanted)]
    return next((size for size in sizes if size == 1 or _pack_fits(estimator.variant(arms=size), rank)), 1)


def _pack_fits(estimator: Estimator, rank: int) -> bool:
    settings = estimator.settings
    reserved = estimator.estimate(rank).highest.reserved_bytes
    return settings.memory_bytes is not None and needed(reserved, settings) <= settings.memory_bytes


def _plan_settings(settings: SelectSettings, longest: int, kind: str, memory: int | None) -> PlanSettings:
    return make_plan_settings(
        {
            "ranks": settings.ranks,
            "target_modules": settings.target_modules,
            "exclude_modules": settings.exclude_modules,
            "layers_to_transform": settings.layers_to_transform,
            "modules_to_save": settings.modules_to_save,
            "bias": settings.bias,
            "lora_dropout": settings.lora_dropout,
            "batch_size": settings.batch_size,
            "eval_batch_size": settings.eval_batch_size,
            "seq_len": max(2, longest),
            "dtype": settings.dtype,
            "load_in_4bit": settings.load_in_4bit,
            "load_in_8bit": settings.load_in_8bit,
            "gradient_checkpointing": settings.gradient_checkpointing,
            "loss": "chunked",
            "optimizer": "adamw_fused",
            "device": kind,
            "memory_bytes": memory,
            "trust_remote_code": settings.trust_remote_code,
        }
    )


@torch.no_grad()
def first_pass_loss(loaded: LoadedModel, items: Sequence[EncodedItem]) -> float:
    """The base's loss on a few items, nats a label token; one at a time, since all their logits are made."""
    losses = [
        logits_loss(loaded.model, collate(items, [index], loaded.tokenizer.pad_token_id, loaded.device), 1.0)
        for index in range(min(PROBED_ITEMS, len(items)))
    ]
    return sum(float(loss.item_losses.sum()) for loss in losses) / sum(int(loss.item_tokens.sum()) for loss in losses)


def ranks_for_data(config: Any, settings: SelectSettings, tokens: int, first_loss: float) -> tuple[list[int], str]:
    """Ranks to begin with where the user named none, and why these."""
    estimator = Estimator(config, _plan_settings(settings.model_copy(update={"ranks": (1,)}), 2, "cpu", None))
    shapes = [(matrix.out_features, matrix.in_features) for matrix in estimator.skeleton.matrices]
    limits, ranks = starting_range(shapes, tokens, first_loss, None)
    reasons = "; ".join(f"{limit.name} {limit.rank} ({limit.reason})" for limit in limits if limit.rank is not None)
    return ranks, f"ranks {', '.join(map(str, ranks))}, from the limits {reasons}"


def _refusal(estimator: Estimator, needs: dict[int, int], memory: int) -> str:
    smallest = min(needs)
    tensors = needs[smallest] - context_bytes(estimator.settings)
    changes = [change for change in cheapest_changes(estimator) if change.setting in SELECT_CHANGES]
    advice = ", ".join(f"{change.setting} {change.value}" for change in changes)
    return (
        f"rank {smallest} needs {_gib(needs[smallest])} ({_gib(tensors)} for tensors, the rest for the process) and "
        f"there are {_gib(memory)}: give more --memory, fewer ranks{', or ' + advice if advice else ''}"
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
