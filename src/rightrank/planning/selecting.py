"""The plan of a selection: what each of its ranks takes in the loop that `select` trains with, and which ranks fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rightrank.errors import SettingsError
from rightrank.io.models import device_memory
from rightrank.plan_records import PlanSettings, make_plan_settings
from rightrank.planning.budget import cheapest_changes, context_bytes, needed
from rightrank.planning.estimate import Estimator
from rightrank.settings import SelectSettings

# Changes that `select` can make too, under its own names.
SELECT_CHANGES = ("batch_size", "gradient_checkpointing", "seq_len", "dtype")


@dataclass(frozen=True, slots=True)
class SelectionPlan:
    """Predicted peaks of the arms, and the ranks that are left."""

    peak_bytes: dict[int, int]  # allocated by tensors, by rank
    needed_bytes: dict[int, int]  # with segments, process and headroom
    memory_bytes: int | None  # None: not known, so nothing is refused
    ranks: tuple[int, ...]  # those that fit, or all

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
    return SelectionPlan(peaks, needs, memory, fitting)


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
            "gradient_checkpointing": settings.gradient_checkpointing,
            "loss": "chunked",
            "optimizer": "adamw_fused",
            "device": kind,
            "memory_bytes": memory,
            "trust_remote_code": settings.trust_remote_code,
        }
    )


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
