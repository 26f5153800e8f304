"""The answer: every rank's table, what fits, what each axis costs, and what to change where nothing fits."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rightrank.errors import ModelError, SettingsError
from rightrank.planning.budget import ALLOWED_ERROR, axis_prices, cheapest_changes, context_bytes, needed, total
from rightrank.planning.calibrate import calibrate, stored_calibration
from rightrank.planning.capacity import starting_range
from rightrank.planning.estimate import Estimator, RankEstimate
from rightrank.planning.formula import ERROR_SHARE as FORMULA_ERROR
from rightrank.planning.skeleton import read_config, require_rank
from rightrank.records.plan import Plan, RankPlan, SelectionCost, Source
from rightrank.settings import PlanSettings


def make_plan(model: str, settings: PlanSettings) -> Plan:
    """The plan for a model folder, a GGUF file or a hub name.

    Args:
        model: holds at least a `config.json`.
        settings: see `PlanSettings`.

    Raises:
        ModelError: the model, its modules or a rank can't be used.
        SettingsError: a length above the model's positions, or a device that can't be calibrated.
    """
    config = read_config(model, settings.trust_remote_code, settings.num_labels is not None)
    _require_length(config, settings)
    found = calibrate(config, settings) if settings.calibrate else stored_calibration(config, settings)
    plan = plan_config(config, model, settings, None if found is None else found.seconds_per_flop)
    if found is None or found.peak_ratio is None:
        return plan
    note = f"on this device four groups of blocks took {found.peak_ratio - 1:+.1%} of the traced peak"
    return plan.model_copy(update={"notes": [*plan.notes, note]})


def plan_config(
    config: Any, name: str, settings: PlanSettings, seconds_per_flop: float | None = None, prices: bool = True
) -> Plan:
    """The plan for a configuration in memory; `prices` also works out the price of each axis."""
    begun = time.perf_counter()
    _require_length(config, settings)
    estimator = Estimator(config, settings)
    if "ranks" not in settings.model_fields_set:  # nobody asked for these ranks: leave out those no matrix can have
        limit = estimator.rank_limit
        settings = settings.model_copy(update={"ranks": tuple(r for r in settings.ranks if r <= limit)})
        estimator = estimator.variant(ranks=settings.ranks)
    require_rank(estimator.skeleton, settings)
    estimates = [estimator.estimate(rank) for rank in settings.ranks]
    rows = [_rank_plan(estimate, settings, seconds_per_flop) for estimate in estimates]
    fitting = [row.rank for row in rows if row.fits]
    first, last = estimates[0], estimates[-1]
    stored = first.anatomy.stored
    plan = Plan(
        model=name,
        architecture=type(estimator.skeleton.base).__name__,
        base_parameters=estimator.base_parameters,
        base_bytes=sum(tensor.size for tensor in stored if not tensor.trainable),
        targets=len(estimator.skeleton.matrices),
        ranks=rows,
        max_rank=max(fitting, default=None),
        memory_bytes=settings.memory_bytes,
        headroom_share=settings.headroom,
        context_bytes=context_bytes(settings),
        activations=last.highest.activations,
        selection=_selection_cost(rows, settings),
        sources=_sources(settings, first, seconds_per_flop),
        notes=_notes(estimator, settings),
        seconds=0.0,
        settings=settings.model_dump(mode="json"),
    )
    largest = largest_rank(estimator, estimates)
    extra: dict[str, Any] = {"largest_possible_rank": largest}
    if settings.data_tokens is not None and settings.first_loss is not None:
        shapes = [(matrix.out_features, matrix.in_features) for matrix in estimator.skeleton.matrices]
        limits, ranks = starting_range(shapes, settings.data_tokens, settings.first_loss, largest)
        extra |= {"limits": limits, "suggested_ranks": ranks}
    if settings.memory_bytes is not None and not fitting:
        extra["changes"] = cheapest_changes(estimator)
    elif prices and first.source == "traced":
        extra["prices"] = axis_prices(estimator, last)
    return plan.model_copy(update=extra | {"seconds": time.perf_counter() - begun})


def largest_rank(estimator: Estimator, estimates: Sequence[RankEstimate]) -> int | None:
    """The largest rank at all that fits, between the ranks asked for and above them; None where none of them fits.

    What is reserved may fall a little from one rank to the next, as blocks happen to fit into segments: this is the
    largest rank that bisection finds, and never below the largest asked for that fits.
    """
    memory = estimator.settings.memory_bytes
    if memory is None:
        return None
    fitting = [e.rank for e in estimates if needed(e.highest.reserved_bytes, estimator.settings) <= memory]
    if not fitting:
        return None
    low = max(fitting)
    high = min([e.rank for e in estimates if e.rank > low], default=estimator.rank_limit + 1)
    wider = estimator.variant(ranks=(*estimator.settings.ranks, max(high - 1, max(estimator.settings.ranks))))
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        if needed(wider.estimate(middle).highest.reserved_bytes, estimator.settings) <= memory:
            low = middle
        else:
            high = middle
    return low


def _rank_plan(estimate: RankEstimate, settings: PlanSettings, seconds_per_flop: float | None) -> RankPlan:
    highest = estimate.highest
    memory = settings.memory_bytes
    need = needed(highest.reserved_bytes, settings)
    return RankPlan(
        rank=estimate.rank,
        trainable_parameters=estimate.anatomy.trainable_parameters,
        adapter_bytes=estimate.anatomy.adapter_bytes,
        peak_bytes=highest.peak_bytes,
        peak_reserved_bytes=highest.reserved_bytes,
        total_bytes=total(highest.reserved_bytes, settings),
        needed_bytes=need,
        components=highest.components,
        peak_at=highest.at,
        fits=None if memory is None else need <= memory,
        flops_per_step=estimate.flops,
        seconds_per_step=None if seconds_per_flop is None else estimate.flops * seconds_per_flop,
        error_share=FORMULA_ERROR if estimate.source == "formula" else ALLOWED_ERROR,
    )


def _require_length(config: Any, settings: PlanSettings) -> None:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and settings.seq_len > positions:
        raise SettingsError(f"seq_len {settings.seq_len} is above the model's {positions} positions; give up to that")
    if config.get_text_config().num_hidden_layers < 1:
        raise ModelError("the configuration names no layers (num_hidden_layers)")


def _selection_cost(rows: Sequence[RankPlan], settings: PlanSettings) -> SelectionCost | None:
    """Every training at the mean cost of the ranks asked for; evaluations are not counted."""
    if settings.steps is None or settings.trainings is None:
        return None
    steps, trainings = settings.steps, settings.trainings
    flops = sum(row.flops_per_step for row in rows) / len(rows) * steps * trainings
    paces = [row.seconds_per_step for row in rows if row.seconds_per_step is not None]
    seconds = None if not paces else sum(paces) / len(paces) * steps * trainings
    price = None
    if seconds is not None and settings.price_per_hour is not None:
        price = seconds / 3600 * settings.price_per_hour
    return SelectionCost(trainings=trainings, steps=steps, seconds=seconds, price=price, flops=flops)


def _sources(settings: PlanSettings, estimate: RankEstimate, seconds_per_flop: float | None) -> dict[str, Source]:
    sources: dict[str, Source] = {
        "trainable_parameters": "exact",
        "adapter_bytes": "exact",
        "weights": "exact",
        "peak_bytes": estimate.source,
        "peak_reserved_bytes": estimate.source,
        "flops_per_step": estimate.source,
        "context_bytes": "assumed",
        "headroom_share": "assumed",
        "error_share": "assumed",
    }
    if settings.sharding != "none":
        sources["sharding"] = "formula"
    if settings.arms > 1:
        sources["arms"] = "formula"
    if settings.load_in_4bit or settings.load_in_8bit:
        sources["quantisation"] = "formula"
    if seconds_per_flop is not None:
        sources["seconds_per_step"] = "measured"
    return sources


def _notes(estimator: Estimator, settings: PlanSettings) -> list[str]:
    notes = []
    if estimator.untraceable is not None:
        notes.append(
            f"the step can't be traced ({estimator.untraceable}); the peak is by formula, ±{FORMULA_ERROR:.0%}"
        )
    if settings.attn_implementation == "flash_attention_2":
        notes.append("flash attention is planned as torch's own flash kernel")
    if settings.memory_bytes is None:
        notes.append("no memory was given or found: give --memory to learn what fits")
    return notes
