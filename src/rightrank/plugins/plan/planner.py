"""The plan: the memory of every rank, what fits, and what to change where nothing fits; of a model alone, and in the loop of `select`."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from rightrank.models.base_models import LoadedModel, device_memory, is_known
from rightrank.plugins.plan.estimate import Estimator, NotSharedError, UntraceableError, context_bytes
from rightrank.report.format import size
from rightrank.runs.plugins import MemoryPlan
from rightrank.schema.command import arguments_of
from rightrank.schema.errors import ModelError, SettingsError
from rightrank.schema.plan_settings import STEP_OF_SELECT, PlanSettings
from rightrank.schema.results import Plan, RankPlan
from rightrank.schema.settings import SelectSettings
from rightrank.train.pace import MAX_ADAPTERS_PER_PASS
from rightrank.train.targets import require_ranks
from rightrank.train.tokens import EncodedData

# The relative error of a peak: against torch's profiler on a CPU 0.06% at worst in 76 cases; on CUDA against three
# published peaks 1.4%, and not measured with weights in 4 or 8 bits.
ON_CPU, ON_CUDA, QUANTISED = 0.01, 0.05, 0.1


def plan_config(
    config: Any, name: str, settings: PlanSettings, on_progress: Callable[[str], None] = lambda _: None
) -> Plan:
    """The plan for a configuration in memory of the model called `name`."""
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
    rows = [estimator.estimate(rank) for rank in settings.ranks]
    largest = _largest_rank(estimator, rows)
    none_fits = settings.memory_bytes is not None and largest is None
    notes = ["the memory is unknown; give --memory to see what fits"] * (settings.memory_bytes is None)
    return Plan(
        model=name,
        architecture=type(estimator.skeleton.base).__name__,
        base_parameters=estimator.skeleton.base_parameters,
        base_bytes=sum(
            tensor.nbytes for tensor in estimator.inventory(rows[0].rank).stored if not tensor.requires_grad
        ),
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


def _largest_rank(estimator: Estimator, rows: Sequence[RankPlan]) -> int | None:
    """The largest rank that fits, whether it is in the settings or not; None where none of the settings' ranks fits.

    Reserved bytes may fall slightly from one rank to the next, where blocks fit better into segments. The result is the
    largest rank that bisection finds, and never below the largest fitting rank of the settings.
    """
    fitting = [row.rank for row in rows if row.fits]
    if not fitting:
        return None
    low = max(fitting)
    high = min([row.rank for row in rows if row.rank > low], default=estimator.rank_limit + 1)
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
    row = current.estimate(rank)
    for name, value in _savings(estimator.settings):
        if getattr(current.settings, name) == value:
            continue
        changed = current.variant(**{name: value})
        changed_row = changed.estimate(rank)
        if changed_row.peak_reserved_bytes < row.peak_reserved_bytes:
            taken[name] = value
            current, row = changed, changed_row
        if row.fits:
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


def plan_loaded(
    loaded: LoadedModel,
    encoded: EncodedData,
    classes: int | None,
    settings: SelectSettings,
    notice: Callable[[str], None],
) -> MemoryPlan | None:
    """The plan of a selection on loaded data; default ranks above the smallest side of a matrix are left out.

    Returns:
        None for an architecture that transformers can't build from its configuration, or whose step can't be traced.
    """
    config, device = loaded.model.config, str(loaded.device)
    if not is_known(config, encoded.is_classification):
        return None
    try:
        planned = plan_selection(
            config, settings, encoded.longest, device, classes, 2 if encoded.summary.form == "preference" else 1
        )
    except UntraceableError as error:
        notice(str(error))
        return None
    if "ranks" not in settings.model_fields_set:
        notice(f"ranks {', '.join(map(str, planned.ranks))} by default; --ranks gives others")
    if (line := left_out_line(planned)) is not None:
        notice(line)
    return planned


def left_out_line(planned: MemoryPlan) -> str | None:
    """The ranks left out, and why; None where all fit."""
    left_out = [rank for rank in planned.needed_bytes if rank not in planned.ranks]
    if not left_out or planned.memory_bytes is None:
        return None
    wanted = ", ".join(f"{rank} ({size(planned.needed_bytes[rank])})" for rank in left_out)
    return f"left out, since they need more than the {size(planned.memory_bytes)} available: ranks {wanted}"


def plan_selection(
    config: Any, settings: SelectSettings, longest: int, device: str, num_labels: int | None = None, sequences: int = 1
) -> MemoryPlan:
    """Predict every rank's peak, and keep the ranks that fit.

    Args:
        settings: without `memory_bytes`, a CUDA device's own memory is the budget.
        longest: tokens of the longest sequence.
        sequences: of each example; 2 for preference pairs.

    Raises:
        SettingsError: fewer ranks fit than a comparison needs; the message names what to change.
    """
    plan_settings = step_settings(config, settings, longest, device, num_labels, sequences)
    memory = plan_settings.memory_bytes
    estimator = Estimator(config, plan_settings)
    ranks = settings.ranks
    if "ranks" not in settings.model_fields_set:  # default ranks that the smallest matrix can't have are left out
        kept = tuple(rank for rank in ranks if rank <= estimator.rank_limit)
        ranks = kept if len(kept) > 1 else ranks[:2]
    estimates = {rank: estimator.estimate(rank) for rank in ranks}
    needs = {rank: estimate.needed_bytes for rank, estimate in estimates.items()}
    fitting = tuple(rank for rank in ranks if memory is None or needs[rank] <= memory)
    if len(fitting) < min(2, len(ranks)):
        raise SettingsError(_refusal(estimator, needs, memory or 0))
    adapters = None
    wanted = settings.adapters_per_pass or (MAX_ADAPTERS_PER_PASS if plan_settings.device == "cuda" else 1)
    if memory is not None and wanted > 1:
        adapters = _max_adapters(estimator, max(fitting), wanted)
    allocated = {rank: estimate.peak_bytes for rank, estimate in estimates.items()}
    shares: dict[int, int] = {}
    return MemoryPlan(allocated, needs, memory, fitting, adapters, partial(_peak_of, estimator, allocated, shares))


def _peak_of(
    estimator: Estimator, alone: Mapping[int, int], shares: dict[int, int], ranks: Sequence[int]
) -> int | None:
    """Each arm adds its own share: the traced peak of two arms of its rank, less that of one. `shares` keeps them."""
    if not set(ranks) <= alone.keys():
        return None
    if len(ranks) == 1:
        return alone[ranks[0]]
    if missing := set(ranks) - shares.keys():
        pairs = estimator.variant(adapters_per_pass=2)
        shares.update({rank: pairs.estimate(rank).peak_bytes - alone[rank] for rank in missing})
    first = ranks[0]
    return alone[first] - shares[first] + sum(shares[rank] for rank in ranks)


def _max_adapters(estimator: Estimator, rank: int, wanted: int) -> int:
    """Adapters in one pass: `wanted`, or the largest power of two below it that fits; 1 where the plan can't trace several."""
    sizes = [wanted, *(2**power for power in reversed(range(wanted.bit_length())) if 2**power < wanted)]
    try:
        several = (size for size in sizes if size == 1 or estimator.variant(adapters_per_pass=size).estimate(rank).fits)
        return next(several, 1)
    except NotSharedError:
        return 1


def step_settings(
    config: Any, settings: SelectSettings, longest: int, device: str, num_labels: int | None, sequences: int = 1
) -> PlanSettings:
    """The plan's settings for the training loop of `select`."""
    kind = "cuda" if device.startswith("cuda") else "cpu"
    shared = {name: getattr(settings, name) for name in STEP_OF_SELECT}
    eager = getattr(config, "_attn_implementation", None) == "eager"
    for name in ("batch_size", "eval_batch_size"):  # the plan's examples are sequences
        shared[name] *= sequences
    return PlanSettings(
        **shared
        | {
            "packed": True,
            "loss": "full" if num_labels else "chunked",
            "optim": "adamw_fused",
            "seq_len": max(2, longest),
            "padding": num_labels is not None,  # a causal row never attends to padding on its right
            "num_labels": num_labels,
            "attn_implementation": "eager" if eager else "sdpa",
            "device": kind,
            "memory_bytes": settings.memory_bytes or (device_memory() if kind == "cuda" else None),
        }
    )


def _refusal(estimator: Estimator, needs: dict[int, int], memory: int) -> str:
    smallest = min(rank for rank, count in needs.items() if count > memory)
    tensors = needs[smallest] - context_bytes(estimator.settings)
    changes = changes_that_fit(estimator, min(needs))
    rows = SelectSettings.model_fields
    advice = shlex.join(
        word for name in changes if name in rows for word in arguments_of(name, rows[name], changes[name])
    )
    return (
        f"rank {smallest} needs {size(needs[smallest])} ({size(tensors)} for tensors, the rest for the process), and "
        f"{size(memory)} are available; give more --memory, lower ranks{', or ' + advice if advice else ''}"
    )
