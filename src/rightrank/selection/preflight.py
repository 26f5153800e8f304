"""The preflight: what a selection will do, what it costs, and what its data can settle, before any training."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from rightrank.decision.metrics import default_margin, kind_of
from rightrank.decision.precision import NoiseKind, Precision, base_spread, expected_precision, rounded_up
from rightrank.engine.runtime import Runtime
from rightrank.errors import SettingsError
from rightrank.planning.duration import Speed
from rightrank.preparation import Prepared, Request, prepare
from rightrank.records.base import split_name
from rightrank.records.plan import SelectionCost
from rightrank.records.preflight import Preflight, PreflightCost, PreflightRank, PreflightStrategy
from rightrank.report.terminal import left_out
from rightrank.selection.executor import require_placeable
from rightrank.selection.notices import adapter_lines, kind_lines, require_truncated
from rightrank.selection.timing import measured_speed
from rightrank.selection.workload import estimate
from rightrank.strategies import STRATEGIES, Strategy, make_strategy
from rightrank.trackers import require_trackers

MAX_PROBED = 128  # validation examples whose base losses are read before the start


def preflight(request: Request, price_per_hour: float | None = None) -> Preflight:
    """Prepare the selection in a temporary folder, and say what it will do.

    Raises:
        InputError: as a selection raises it before its first training.
    """
    make_strategy(request.settings, request.settings.max_steps or 1)  # refuses a wrong name before anything is loaded
    require_placeable(request)
    require_trackers(request.settings.report_to)
    notes: list[str] = []
    with tempfile.TemporaryDirectory(prefix="rightrank-") as folder:
        prepared = prepare(request, Path(folder) / "cache", notes.append)
        strategy = strategy_of(prepared)
        measured = measured_speed(prepared)
        found = preflight_of(prepared, strategy, None if measured is None else measured.speed, price_per_hour)
        if measured is not None:
            notes.append(f"time: measured on this device: {measured.basis()}, then discarded")
        return found.model_copy(update={"notes": [*notes, *kind_lines(prepared), *adapter_lines(prepared)]})


def strategy_of(prepared: Prepared, name: str | None = None) -> Strategy:
    """The strategy of the settings, or the one named, for this selection's steps and data."""
    settings = prepared.settings if name is None else prepared.settings.model_copy(update={"strategy": name})
    return make_strategy(
        settings,
        prepared.steps,
        token_loss=prepared.is_token_loss,
        unseen_steps=prepared.unseen_steps,
        truncates=require_truncated(prepared),
    )


def preflight_of(
    prepared: Prepared, strategy: Strategy, speed: Speed | None, price_per_hour: float | None = None
) -> Preflight:
    """The preflight of a prepared selection; `speed` is None where no step was measured: then by the calibration, if any."""
    settings, data = prepared.settings, prepared.started.data
    base = _base_losses(prepared.runtime)
    margin = _margin(prepared, base)
    precision = _precision(prepared, base)
    return Preflight(
        metric=settings.metric_name,
        margin=margin,
        goal=settings.goal,
        form=data.form,
        splits={split_name(name): split for name, split in data.splits.items()},
        splits_given=data.splits_given,
        left_out=left_out(data),
        longest=prepared.runtime.data.longest,
        seq_len=settings.seq_len,
        ranks=_ranks(prepared),
        memory_bytes=prepared.planned.memory_bytes if prepared.planned else None,
        cost=_cost(prepared, strategy, speed, price_per_hour),
        seeds=len(settings.seeds),
        expected_half_width=precision and precision.half_width,
        undecided_below_margin=precision and precision.undecided_below_margin,
        cures=[] if precision is None or margin is None else cures(precision, margin),
    )


def cures(precision: Precision, margin: float) -> list[str]:
    """What would settle the answer at `margin`; empty where the margin is wide enough."""
    if margin >= precision.undecided_below_margin:
        return []
    found = []
    examples = precision.examples_needed(margin)
    if examples is not None:
        found.append(
            f"about {examples:,} validation examples in place of {precision.examples:,} (--eval-items, more data)"
        )
    seeds = precision.seeds_needed(margin) if precision.seeds > 1 else None
    if seeds is not None:
        found.append(f"{seeds} seeds in place of {precision.seeds} (--seeds)")
    found.append(f"a margin of {rounded_up(precision.undecided_below_margin):g} or more (--margin)")
    return found


def _ranks(prepared: Prepared) -> list[PreflightRank]:
    planned = prepared.planned
    if planned is None:
        return [
            PreflightRank(rank=rank, peak_bytes=None, needed_bytes=None, fits=None) for rank in prepared.settings.ranks
        ]
    return [
        PreflightRank(
            rank=rank,
            peak_bytes=planned.peak_bytes[rank],
            needed_bytes=planned.needed_bytes[rank],
            fits=None if planned.memory_bytes is None else rank in planned.ranks,
        )
        for rank in sorted(planned.peak_bytes)
    ]


def _cost(prepared: Prepared, strategy: Strategy, speed: Speed | None, price_per_hour: float | None) -> PreflightCost:
    rows = []
    for name in STRATEGIES:
        try:
            one = strategy if name == strategy.name else strategy_of(prepared, name)
        except SettingsError:
            continue  # the budget of the settings is too small for this one
        rows.append(_strategy_cost(one, estimate(prepared, one, speed), price_per_hour))
    chosen = next(row for row in rows if row.strategy == strategy.name)
    return PreflightCost(**chosen.model_dump(), steps=prepared.steps, strategies=rows)


def _strategy_cost(strategy: Strategy, cost: SelectionCost | None, price_per_hour: float | None) -> PreflightStrategy:
    trainings = strategy.cost()
    seconds = None if cost is None else cost.expected.seconds
    return PreflightStrategy(
        strategy=strategy.name,
        trainings=trainings.expected,
        trainings_at_most=trainings.maximum,
        trainings_to_adapter=trainings.to_adapter,
        seconds=seconds,
        seconds_at_most=None if cost is None else cost.most.seconds,
        price=None if seconds is None or price_per_hour is None else seconds / 3600 * price_per_hour,
    )


def _base_losses(runtime: Runtime) -> tuple[list[float], list[int]] | None:
    """The base's losses on some validation examples; None for a base that is sharded over processes."""
    if runtime.settings.shard_base:
        return None
    return runtime.first_losses("selection", MAX_PROBED)


def _noise_kind(prepared: Prepared) -> NoiseKind:
    if prepared.settings.metric_name != "loss":
        return "scores"
    return "tokens" if prepared.is_token_loss else "classes"


def _precision(prepared: Prepared, base: tuple[Sequence[float], Sequence[int]] | None) -> Precision | None:
    """None for a loss of tokens whose base was not read."""
    kind, settings = _noise_kind(prepared), prepared.settings
    if kind == "tokens" and base is None:
        return None
    spread = base_spread(*base) if base is not None else 0.0
    seeds = len(settings.seeds) if settings.goal == "training-rank" else 1  # an adapter file has no seed
    return expected_precision(kind, spread, len(prepared.runtime.examples("selection")), seeds, prepared.steps)


def _margin(prepared: Prepared, base: tuple[Sequence[float], Sequence[int]] | None) -> float | None:
    settings, started = prepared.settings, prepared.started
    if settings.margin is not None:
        return settings.margin
    kind = kind_of(started.metric, started.higher_is_better)
    kind = "loss" if kind == "token_loss" and not prepared.is_token_loss else kind
    if kind in ("token_loss", "accuracy"):
        return default_margin(kind, 0.0, [0.0])
    if started.metric != "loss" or base is None:
        return None
    value = sum(base[0]) / sum(base[1])
    return default_margin(kind, value, [value])
