"""The plan: the memory of every rank, what fits, and what to change where nothing fits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rightrank.plugins.plan.estimate import Estimator, RankEstimate, context_bytes
from rightrank.schema.errors import ModelError, SettingsError
from rightrank.schema.plan_settings import PlanSettings
from rightrank.schema.results import Plan, RankPlan
from rightrank.train.targets import require_ranks

# The relative error of a peak: against torch's profiler on a CPU 0.06% at worst in 76 cases; on CUDA against three
# published peaks 1.4%, and not measured with weights in 4 or 8 bits.
ON_CPU, ON_CUDA, QUANTISED = 0.01, 0.05, 0.1


def plan_config(
    config: Any, name: str, settings: PlanSettings, on_progress: Callable[[str], None] = lambda _: None
) -> Plan:
    """The plan for a configuration in memory of the model called `name`.

    Raises:
        ModelError: the modules or a rank cannot be used.
        SettingsError: a length above the model's positions.
    """
    begun = time.perf_counter()
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if isinstance(positions, int) and settings.seq_len > positions:
        raise SettingsError(f"seq_len {settings.seq_len} is above the model's {positions} positions; give at most that")
    if text.num_hidden_layers < 1:
        raise ModelError("the configuration names no layers (num_hidden_layers)")
    estimator = Estimator(config, settings, on_progress)
    if "ranks" not in settings.model_fields_set:  # default ranks: leave out those above the limit of a matrix
        limit = estimator.rank_limit
        settings = settings.model_copy(update={"ranks": tuple(r for r in settings.ranks if r <= limit)})
    for target in estimator.skeleton.targets:
        require_ranks(target, settings.ranks)
    estimates = [estimator.estimate(rank) for rank in settings.ranks]
    rows = [_rank_plan(estimate, settings) for estimate in estimates]
    largest = _largest_rank(estimator, estimates)
    none_fits = settings.memory_bytes is not None and largest is None
    notes = ["the memory is unknown; give --memory to see what fits"] * (settings.memory_bytes is None)
    return Plan(
        model=name,
        architecture=type(estimator.skeleton.base).__name__,
        base_parameters=estimator.skeleton.base_parameters,
        base_bytes=sum(tensor.nbytes for tensor in estimates[0].inventory.stored if not tensor.requires_grad),
        targets=len(estimator.skeleton.targets),
        ranks=rows,
        max_rank=max((row.rank for row in rows if row.fits), default=None),
        largest_possible_rank=largest,
        memory_bytes=settings.memory_bytes,
        context_bytes=context_bytes(settings),
        changes=changes_that_fit(estimator, min(settings.ranks)) if none_fits else {},
        source="traced",
        error_share=(ON_CUDA if settings.weight_bits is None else QUANTISED) if settings.device == "cuda" else ON_CPU,
        notes=notes,
        seconds=time.perf_counter() - begun,
        settings=settings.model_dump(mode="json"),
    )


def _rank_plan(estimate: RankEstimate, settings: PlanSettings) -> RankPlan:
    peak = estimate.peak
    return RankPlan(
        rank=estimate.rank,
        trainable_parameters=estimate.inventory.trainable_parameters,
        adapter_bytes=estimate.inventory.adapter_bytes,
        peak_bytes=peak.peak_bytes,
        peak_reserved_bytes=peak.reserved_bytes,
        needed_bytes=estimate.needed_bytes,
        components=peak.components,
        peak_at=peak.at,
        fits=None if settings.memory_bytes is None else estimate.fits,
        flops_per_step=estimate.flops,
    )


def _largest_rank(estimator: Estimator, estimates: Sequence[RankEstimate]) -> int | None:
    """The largest rank that fits, whether it is in the settings or not; None where none of the settings' ranks fits.

    Reserved bytes may fall slightly from one rank to the next, where blocks fit better into segments. The result is the
    largest rank that bisection finds, and never below the largest fitting rank of the settings.
    """
    fitting = [estimate.rank for estimate in estimates if estimate.fits]
    if not fitting:
        return None
    low = max(fitting)
    high = min([e.rank for e in estimates if e.rank > low], default=estimator.rank_limit + 1)
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        if estimator.estimate(middle).fits:
            low = middle
        else:
            high = middle
    return low


def changes_that_fit(estimator: Estimator, rank: int) -> dict[str, Any]:
    """Settings with which `rank` fits, those that cost least first; empty where none of them is enough."""
    current, taken = estimator, dict[str, Any]()
    reserved = current.estimate(rank).peak.reserved_bytes
    for name, value in _savings(estimator.settings):
        if getattr(current.settings, name) == value:
            continue
        changed = current.variant(**{name: value})
        if (saved := changed.estimate(rank).peak.reserved_bytes) < reserved:
            taken[name] = value
            current, reserved = changed, saved
        if current.estimate(rank).fits:
            return taken
    return {}


def _savings(settings: PlanSettings) -> Iterator[tuple[str, Any]]:
    """Changes that save memory: first those that cost no quality and no time, then time, then precision."""
    if settings.loss == "full" and settings.num_labels is None:
        yield "loss", "chunked"
    if settings.attn_implementation == "eager":
        yield "attn_implementation", "sdpa"
    if settings.device == "cuda":
        if not settings.is_packed:  # `select` has 32-bit states alone
            yield "optim", "adamw_8bit"
        yield "dtype", "bfloat16"
    yield "adapters_per_pass", 1
    yield "gradient_checkpointing", True
    batch = settings.batch_size
    while batch > 1:
        batch //= 2
        yield "batch_size", batch
    if not settings.load_in_8bit:
        yield "load_in_4bit", True
    length = settings.seq_len
    while length > 256:
        length //= 2
        yield "seq_len", length
