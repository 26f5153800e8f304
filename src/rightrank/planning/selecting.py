"""The plan of a selection: what each of its ranks takes in the loop that `select` trains with, and which ranks fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rightrank.engine.adapters_per_pass import MAX_ADAPTERS_PER_PASS
from rightrank.engine.batches import collate
from rightrank.engine.loss import logits_loss
from rightrank.engine.token_store import EncodedExample
from rightrank.errors import SettingsError
from rightrank.io.models import LoadedModel, device_memory
from rightrank.planning.budget import cheapest_changes, context_bytes, needed
from rightrank.planning.calibrate import Calibration, stored_calibration
from rightrank.planning.capacity import HIGHEST_RANK, starting_range
from rightrank.planning.duration import Asked, Workload, selection_cost
from rightrank.planning.estimate import Estimator
from rightrank.planning.planner import largest_rank, pace_of, with_measured_process
from rightrank.records.plan import SelectionCost
from rightrank.settings import PlanSettings, SelectSettings, make_plan_settings
from rightrank.strategies import Strategy
from rightrank.variants import widest_rank

PROBED_ITEMS = 8
# Changes that `select` can make too, under its own names.
SHARED_SETTINGS = (
    "ranks",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "modules_to_save",
    "bias",
    "lora_dropout",
    "batch_size",
    "eval_batch_size",
    "dtype",
    "load_in_4bit",
    "load_in_8bit",
    "gradient_checkpointing",
    "trust_remote_code",
)
SELECT_CHANGES = ("batch_size", "gradient_checkpointing", "seq_len", "dtype")


@dataclass(frozen=True, slots=True)
class SelectionPlan:
    """Predicted peaks of the arms, and the ranks that are left."""

    estimator: Estimator
    found: Calibration | None  # what was measured on this device before
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

    def peak_of(self, ranks: Sequence[int]) -> int | None:
        """Bytes of tensors at the peak of these ranks trained together; None where one of them was not planned.

        Each arm adds its share over what the base takes alone: a pack of two of its rank less one of it, as traced.
        """
        if not set(ranks) <= self.peak_bytes.keys():
            return None
        if len(ranks) == 1:
            return self.peak_bytes[ranks[0]]
        pairs = self.estimator.variant(arms=2)
        shares = {rank: pairs.estimate(rank).highest.peak_bytes - self.peak_bytes[rank] for rank in set(ranks)}
        first = ranks[0]
        return self.peak_bytes[first] - shares[first] + sum(shares[rank] for rank in ranks)

    @property
    def is_timed(self) -> bool:
        """Whether there is a measured pace on this device for the step, which is traced and not by formula."""
        return self.found is not None and self.estimator.untraceable is None

    def cost(self, strategy: Strategy, work: Workload) -> SelectionCost | None:
        """The time that the selection will take; None where it is not timed."""
        if self.found is None or not self.is_timed:
            return None
        ranked = self.estimator.variant(ranks=self.ranks)
        return selection_cost(ranked, Asked.of(strategy), work, pace_of(self.found, self.estimator.settings))


def plan_selection(
    config: Any, settings: SelectSettings, longest: int, device: str, num_labels: int | None = None
) -> SelectionPlan:
    """Predict every rank's peak, and keep the ranks that fit.

    Args:
        config: the model's configuration.
        settings: of the selection; without `memory_bytes`, a CUDA device's own memory is the budget.
        longest: tokens of the longest item.
        device: `cpu`, `cuda`, …
        num_labels: of a classification.

    Raises:
        SettingsError: fewer ranks fit than a comparison needs, with what to change.
    """
    plan_settings = _plan_settings(config, settings, longest, device, num_labels)
    found = stored_calibration(config, plan_settings)
    plan_settings = with_measured_process(plan_settings, found)
    memory = plan_settings.memory_bytes
    estimator = Estimator(config, plan_settings, None if found is None else found.step_factor)
    highest = {rank: estimator.estimate(rank).highest for rank in settings.ranks}
    peaks = {rank: high.peak_bytes for rank, high in highest.items()}
    held = {rank: widest_rank(settings, rank) for rank in settings.ranks}
    wide = {
        rank: high if held[rank] == rank else estimator.estimate(held[rank]).highest for rank, high in highest.items()
    }
    needs = {rank: needed(high.reserved_bytes, plan_settings) for rank, high in wide.items()}
    fitting = tuple(rank for rank in settings.ranks if memory is None or needs[rank] <= memory)
    if len(fitting) < min(2, len(settings.ranks)):
        raise SettingsError(_refusal(estimator, needs, memory or 0))
    packs = (
        memory is not None
        and settings.adapters_per_pass != 1
        and (plan_settings.device == "cuda" or settings.adapters_per_pass is not None)
    )
    largest = (
        _largest_pack(estimator, held[max(fitting)], settings.adapters_per_pass or MAX_ADAPTERS_PER_PASS)
        if packs
        else None
    )
    return SelectionPlan(estimator, found, peaks, needs, memory, fitting, largest)


def _largest_pack(estimator: Estimator, rank: int, wanted: int) -> int:
    """Arms that fit together: `wanted`, or the largest power of two below it that does."""
    sizes = [wanted, *(2**power for power in reversed(range(wanted.bit_length())) if 2**power < wanted)]
    return next((size for size in sizes if size == 1 or _pack_fits(estimator.variant(arms=size), rank)), 1)


def _pack_fits(estimator: Estimator, rank: int) -> bool:
    settings = estimator.settings
    reserved = estimator.estimate(rank).highest.reserved_bytes
    return settings.memory_bytes is not None and needed(reserved, settings) <= settings.memory_bytes


def _plan_settings(
    config: Any, settings: SelectSettings, longest: int, device: str, num_labels: int | None
) -> PlanSettings:
    """The plan's settings for the loop that `select` trains with."""
    kind = "cuda" if device.startswith("cuda") else "cpu"
    shared = {name: getattr(settings, name) for name in SHARED_SETTINGS}
    eager = getattr(config, "_attn_implementation", None) == "eager"
    if settings.devices_per_arm > 1:  # what one of them holds, and its share of a batch
        shared["num_devices"] = settings.devices_per_arm
        shared["sharding"] = "fsdp" if settings.shard_base else "ddp"
        shared["batch_size"] = -(-settings.batch_size // settings.devices_per_arm)
    return make_plan_settings(
        shared
        | {
            "seq_len": max(2, longest),
            "loss": "chunked" if num_labels is None else "full",
            "padding": num_labels is not None,  # of a language model no row sees the padding on its right
            "num_labels": num_labels,
            "packed": True,
            "optimizer": "adamw_fused",
            "attn_implementation": "eager" if eager else "sdpa",
            "device": kind,
            "memory_bytes": settings.memory_bytes or (device_memory() if kind == "cuda" else None),
        }
    )


@torch.no_grad()
def first_pass_loss(loaded: LoadedModel, items: Sequence[EncodedExample]) -> float:
    """The base's loss on a few items, nats a label token; one at a time, since all their logits are made."""
    losses = [
        logits_loss(loaded.model, collate(items, [index], loaded.tokenizer.pad_token_id, loaded.device), 1.0)
        for index in range(min(PROBED_ITEMS, len(items)))
    ]
    return sum(float(loss.example_losses.sum()) for loss in losses) / sum(
        int(loss.example_tokens.sum()) for loss in losses
    )


def ranks_for_data(
    config: Any, settings: SelectSettings, longest: int, device: str, data: tuple[int, float]
) -> tuple[list[int], list[str]]:
    """Ranks to begin with where the user named none, and the reasoning, a line each.

    Args:
        data: label tokens of the training data, and the base's loss on some of them, nats a token.
    """
    one = settings.model_copy(update={"ranks": (1,)})
    plan_settings = _plan_settings(config, one, longest, device, None)
    found = stored_calibration(config, plan_settings)
    plan_settings = with_measured_process(plan_settings, found)
    estimator = Estimator(config, plan_settings, None if found is None else found.step_factor)
    top = min(estimator.rank_limit, HIGHEST_RANK)
    fitting = None
    if plan_settings.memory_bytes is not None:
        ends = estimator.variant(ranks=(1, top))
        fitting = largest_rank(ends, [ends.estimate(rank) for rank in sorted({1, top})]) or 0
    shapes = [(matrix.out_features, matrix.in_features) for matrix in estimator.skeleton.matrices]
    limits, ranks = starting_range(shapes, *data, fitting)
    lines = [
        f"limit by {limit.name}: {'none' if limit.rank is None else limit.rank} ({limit.reason})" for limit in limits
    ]
    return ranks, [*lines, f"ranks to begin with: {', '.join(map(str, ranks))}"]


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
