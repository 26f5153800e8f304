"""The plan: the memory of every rank, what fits, what each axis costs, and what to change where nothing fits."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rightrank.plugins.plan.budget import (
    axis_prices,
    cheapest_changes,
    context_bytes,
    fits,
    needed,
    rank_fits,
    total,
)
from rightrank.plugins.plan.duration import planned_strategy, selection_cost, workload_of
from rightrank.plugins.plan.estimate import Estimator, RankEstimate
from rightrank.plugins.plan.skeleton import read_config, require_rank
from rightrank.schema.errors import ModelError, SettingsError
from rightrank.schema.plan_settings import PlanSettings, loop_of_select
from rightrank.schema.results import Error, Plan, RankPlan, Source

TRACED_ON_CPU = Error(
    share=0.01, basis="0.06% at worst in 76 cases against torch's profiler, several adapters per pass among them"
)
TRACED_ON_CUDA = Error(
    share=0.05, basis="assumed: not measured on a GPU; 1.4% at worst against three published peaks, not a blind test"
)
QUANTISED_ON_CUDA = Error(share=0.1, basis="assumed: the workspace inside bitsandbytes' kernels is by rule")
SHARDED = Error(share=0.1, basis="by rule; 0.5% at worst against two processes on a CPU, one small model")
FORMULA = Error(share=1.15, basis="by rule; −53% to +40% in 76 traced cases that were measured on a CPU")
EXACT = Error(share=0.0, basis="counted")


def make_plan(model: str, settings: PlanSettings) -> Plan:
    """The plan for a model folder, a GGUF file or a hub name.

    Args:
        model: holds at least a `config.json`.
        settings: see `PlanSettings`.

    Raises:
        ModelError: the model, its modules or a rank cannot be used.
        SettingsError: a length above the model's positions.
    """
    config = read_config(model, settings.trust_remote_code, settings.num_labels is not None)
    return plan_config(config, model, settings)


def plan_config(
    config: Any,
    name: str,
    settings: PlanSettings,
    prices: bool = True,
) -> Plan:
    """The plan for a configuration in memory.

    Args:
        config: of the model.
        name: of the model.
        settings: see `PlanSettings`.
        prices: adds the cost of each axis, and each rank's peak in `select`.
    """
    begun = time.perf_counter()
    _require_length(config, settings)
    strategy = planned_strategy(settings)
    estimator = Estimator(config, settings)
    if "ranks" not in settings.model_fields_set:  # default ranks: leave out those above the limit of a matrix
        limit = estimator.rank_limit
        settings = settings.model_copy(update={"ranks": tuple(r for r in settings.ranks if r <= limit)})
        estimator = estimator.variant(ranks=settings.ranks)
    require_rank(estimator.skeleton, settings)
    estimates = [estimator.estimate(rank) for rank in settings.ranks]
    in_select = _as_select(estimator) if prices else None
    rows = [_rank_plan(estimate, settings, in_select) for estimate in estimates]
    fitting = [row.rank for row in rows if row.fits]
    first, last = estimates[0], estimates[-1]
    stored = first.inventory.stored
    plan = Plan(
        model=name,
        architecture=type(estimator.skeleton.base).__name__,
        base_parameters=estimator.base_parameters,
        base_bytes=sum(tensor.size for tensor in stored if not tensor.trainable),
        targets=len(estimator.skeleton.targets),
        ranks=rows,
        max_rank=max(fitting, default=None),
        memory_bytes=settings.memory_bytes,
        headroom_share=settings.headroom,
        context_bytes=context_bytes(settings),
        activations=last.peak.activations,
        selection=None if strategy is None else selection_cost(estimator, strategy, workload_of(settings)),
        sources=_sources(settings, first),
        errors={"exact": EXACT, first.source: _peak_error(settings, first.source)},
        notes=_notes(estimator, settings),
        seconds=0.0,
        settings=settings.model_dump(mode="json"),
    )
    additions = _additions(estimator, estimates, prices)
    return plan.model_copy(update=additions | {"seconds": time.perf_counter() - begun})


def _additions(estimator: Estimator, estimates: Sequence[RankEstimate], prices: bool) -> dict[str, Any]:
    """The fields of a plan that need further estimates: the largest rank, changes or prices."""
    settings = estimator.settings
    largest = largest_rank(estimator, estimates)
    found: dict[str, Any] = {"largest_possible_rank": largest}
    if settings.memory_bytes is not None and largest is None:
        found["changes"] = cheapest_changes(estimator)
    elif prices and estimates[0].source != "formula":
        found["prices"] = axis_prices(estimator, estimates[-1])
    return found


def largest_rank(estimator: Estimator, estimates: Sequence[RankEstimate]) -> int | None:
    """The largest rank that fits, whether it is in the settings or not; None where none of the settings' ranks fits.

    Reserved bytes may fall slightly from one rank to the next, where blocks fit better into segments. The result is the
    largest rank that bisection finds, and never below the largest fitting rank of the settings.
    """
    settings = estimator.settings
    fitting = [e.rank for e in estimates if fits(e.peak.reserved_bytes, settings)]
    if not fitting:
        return None
    low = max(fitting)
    high = min([e.rank for e in estimates if e.rank > low], default=estimator.rank_limit + 1)
    wider = estimator.variant(ranks=(*settings.ranks, max(high - 1, max(settings.ranks))))
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        if rank_fits(wider, middle):
            low = middle
        else:
            high = middle
    return low


def _as_select(estimator: Estimator) -> Estimator | None:
    """The same model and step in the training loop of `select`; None where the plan is of that loop, or of none it has."""
    settings = estimator.settings
    if settings.is_packed or settings.autocast is not None or settings.sharding != "none":
        return None
    loop = loop_of_select(settings.num_labels)
    changed = estimator.variant(**loop, padding=settings.num_labels is not None)
    changed.estimate(min(settings.ranks))
    return changed if changed.untraceable is None else None


def _rank_plan(estimate: RankEstimate, settings: PlanSettings, in_select: Estimator | None = None) -> RankPlan:
    looped = None if in_select is None else in_select.estimate(estimate.rank).peak
    needed_there = None if looped is None else needed(looped.reserved_bytes, settings)
    peak = estimate.peak
    memory = settings.memory_bytes
    need = needed(peak.reserved_bytes, settings)
    error = _peak_error(settings, estimate.source).share
    return RankPlan(
        rank=estimate.rank,
        trainable_parameters=estimate.inventory.trainable_parameters,
        adapter_bytes=estimate.inventory.adapter_bytes,
        peak_bytes=peak.peak_bytes,
        peak_reserved_bytes=peak.reserved_bytes,
        total_bytes=total(peak.reserved_bytes, settings),
        needed_bytes=need,
        components=peak.components,
        peak_at=peak.at,
        fits=None if memory is None else need <= memory,
        flops_per_step=estimate.flops,
        error_share=error,
        peak_low_bytes=round(peak.peak_bytes / (1 + error)),
        peak_high_bytes=round(peak.peak_bytes * (1 + error)),
        select_peak_bytes=None if looped is None else looped.peak_bytes,
        select_needed_bytes=needed_there,
        fits_in_select=None if memory is None or needed_there is None else needed_there <= memory,
    )


def _peak_error(settings: PlanSettings, source: Source) -> Error:
    """The error bound of the peak: the largest of those it rests on."""
    on_cuda = settings.device == "cuda"
    bases = [FORMULA if source == "formula" else TRACED_ON_CUDA if on_cuda else TRACED_ON_CPU]
    if source != "formula" and on_cuda and (settings.load_in_4bit or settings.load_in_8bit):
        bases.append(QUANTISED_ON_CUDA)
    if settings.sharding != "none":
        bases.append(SHARDED)
    return max(bases, key=lambda error: error.share)


def _require_length(config: Any, settings: PlanSettings) -> None:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and settings.seq_len > positions:
        raise SettingsError(f"seq_len {settings.seq_len} is above the model's {positions} positions; give at most that")
    if config.get_text_config().num_hidden_layers < 1:
        raise ModelError("the configuration names no layers (num_hidden_layers)")


def _sources(settings: PlanSettings, estimate: RankEstimate) -> dict[str, Source]:
    counted: Source = "formula" if estimate.source == "formula" else "traced"
    on_cpu = settings.device == "cpu"
    sources: dict[str, Source] = {
        "trainable_parameters": "exact",
        "adapter_bytes": "exact",
        "weights": "exact",
        "peak_bytes": estimate.source,
        "peak_reserved_bytes": estimate.source,
        "flops_per_step": counted,
        "context_bytes": "measured" if settings.context_bytes is not None else "assumed",
        "headroom_share": "assumed",
        "error_share": "measured" if on_cpu and settings.sharding == "none" else "assumed",
    }
    if settings.sharding != "none":
        sources["sharding"] = "formula"
    if settings.adapters_per_pass > 1:
        sources["arms"] = counted
    if settings.load_in_4bit or settings.load_in_8bit:
        sources["quantisation"] = counted if on_cpu else "formula"
    if settings.optim in ("adamw_8bit", "paged_adamw_8bit"):
        sources["optimizer"] = "exact" if settings.optim == "adamw_8bit" else "formula"
    return sources


def _notes(estimator: Estimator, settings: PlanSettings) -> list[str]:
    notes = []
    if estimator.untraceable is not None:
        notes.append(
            f"the step cannot be traced ({estimator.untraceable}), so the peak comes from a formula and may be off by a "
            f"factor of {1 + FORMULA.share:.2f} either way"
        )
    if settings.optim == "paged_adamw_8bit" and settings.device == "cpu":
        notes.append("bitsandbytes has no paged states on a CPU; they are planned as those of adamw_8bit")
    if settings.attn_implementation == "flash_attention_2":
        notes.append("flash_attention_2 is planned as torch's own flash kernel")
    if settings.memory_bytes is None:
        notes.append("the memory is unknown; give --memory to see what fits")
    return notes
