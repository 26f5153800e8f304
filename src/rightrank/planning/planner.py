"""Plan the memory of every rank, which ranks fit, and what to change if none fits; for `plan` and for the training loop of `select`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rightrank.bases.base_models import LoadedModel, is_supported, read_device_memory
from rightrank.evaluation.tokens import EncodedData
from rightrank.planning.estimate import Estimator, SharedPassError, UntraceableError, estimate_context_bytes
from rightrank.report.format import format_bytes
from rightrank.schema.errors import ModelError, SettingsError
from rightrank.schema.results import Plan
from rightrank.schema.settings import MAX_ADAPTERS_PER_PASS, STEP_OF_SELECT, PlanSettings, SelectSettings
from rightrank.search.rates import choose_start_rates
from rightrank.training.targets import require_ranks

# The relative error of a predicted peak. The largest measured error is 0.06% on a CPU (76 cases against torch's profiler)
# and 1.6% on CUDA (three published peaks). There, and with weights in 4 or 8 bits, the fragmentation of the allocator varies: a model of it
# gave 1% to 10% for models from 3B, 13% to 17% with 4 bits and recomputed blocks.
ON_CPU, ON_CUDA, QUANTISED = 0.01, 0.05, 0.15
SAVINGS = "a smaller --batch-size, --set gradient_checkpointing=true, --load-in-4bit or a smaller --seq-len"


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The memory that each rank of a selection needs, and the ranks that fit."""

    peak_bytes: Mapping[int, int]  # by rank: peak memory of tensors
    needed_bytes: Mapping[int, int]  # by rank: peak memory including that of the process and the allocator
    memory_bytes: int | None  # available memory; None: unknown, and all ranks are tried
    ranks: tuple[int, ...]  # the ranks that fit, or all
    max_adapters_per_pass: (
        int | None
    )  # adapters of the highest rank that fit; None: unknown, or the settings ask for one


def plan_config(config: Any, name: str, settings: PlanSettings) -> Plan:
    """Plan a model from its configuration in memory; `name` is the name to report."""
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if isinstance(positions, int) and settings.seq_len > positions:
        raise SettingsError(
            f"seq_len {settings.seq_len} is larger than the model's {positions} positions; give seq_len {positions} or less"
        )
    if text.num_hidden_layers < 1:
        raise ModelError("the model's configuration has no layers: num_hidden_layers is below 1; restore config.json")
    estimator = Estimator(config, settings)
    if "ranks" not in settings.model_fields_set:  # Default ranks above the limit of a matrix are left out.
        limit = estimator.rank_limit
        settings = settings.model_copy(update={"ranks": tuple(r for r in settings.ranks if r <= limit)})
    for target in estimator.skeleton.targets:
        require_ranks(target, settings.ranks)
    rows = [estimator.estimate(rank) for rank in settings.ranks]
    max_rank = max((row.rank for row in rows if row.fits), default=None)
    notes = []
    if settings.memory_bytes is None:
        notes.append("the available memory is unknown; give --memory to see which ranks fit")
    elif max_rank is None:
        notes.append(f"no requested rank fits in {format_bytes(settings.memory_bytes)}: give {SAVINGS}")
    return Plan(
        model=name,
        architecture=type(estimator.skeleton.base).__name__,
        base_parameters=estimator.skeleton.base_parameters,
        base_bytes=sum(
            tensor.nbytes for tensor in estimator.get_inventory(rows[0].rank).stored if not tensor.requires_grad
        ),
        targets=len(estimator.skeleton.targets),
        ranks=rows,
        max_rank=max_rank,
        learning_rates=choose_start_rates(estimator.skeleton.base_parameters),
        memory_bytes=settings.memory_bytes,
        context_bytes=estimate_context_bytes(settings),
        error_share=(ON_CUDA if settings.weight_bits is None else QUANTISED) if settings.device == "cuda" else ON_CPU,
        notes=notes,
        settings=settings.model_dump(mode="json"),
    )


def plan_loaded(
    loaded: LoadedModel,
    encoded: EncodedData,
    classes: int | None,
    settings: SelectSettings,
    notice: Callable[[str], None],
) -> MemoryPlan | None:
    """Plan a selection on loaded data. Default ranks above the smallest side of a matrix are left out.

    Returns:
        None for an architecture that transformers cannot build from its configuration, or whose step cannot be traced.
    """
    config, device = loaded.model.config, str(loaded.device)
    if not is_supported(config, encoded.is_classification):
        return None
    try:
        planned = plan_selection(
            config,
            settings,
            encoded.max_sequence_length,
            device,
            classes,
            2 if encoded.summary.form == "preference" else 1,
        )
    except UntraceableError as error:
        notice(str(error))
        return None
    if "ranks" not in settings.model_fields_set:
        notice(f"using the default ranks {', '.join(map(str, planned.ranks))}; give --ranks to choose others")
    left_out = [rank for rank in planned.needed_bytes if rank not in planned.ranks]
    if left_out and planned.memory_bytes is not None:
        ranks = ", ".join(f"{rank} ({format_bytes(planned.needed_bytes[rank])})" for rank in left_out)
        available = format_bytes(planned.memory_bytes)
        notice(f"ranks left out because they need more than the available {available}: {ranks}")
    return planned


def plan_selection(
    config: Any, settings: SelectSettings, longest: int, device: str, num_labels: int | None = None, sequences: int = 1
) -> MemoryPlan:
    """Predict every rank's peak, and keep the ranks that fit.

    Args:
        settings: without `memory_bytes`, a CUDA device's own memory is the budget.
        longest: number of tokens of the longest sequence.
        sequences: number of sequences in each example; 2 for preference pairs.

    Raises:
        SettingsError: fewer ranks fit than a comparison needs; the message names what to change.
    """
    plan_settings = build_step_settings(config, settings, longest, device, num_labels, sequences)
    memory = plan_settings.memory_bytes
    estimator = Estimator(config, plan_settings)
    estimator.num_means = 2 if settings.checkpoint == "best" else 1  # of a training in the search of the learning rate
    ranks = settings.ranks
    if "ranks" not in settings.model_fields_set:  # Default ranks above the smallest matrix's limit are left out.
        allowed_ranks = tuple(rank for rank in ranks if rank <= estimator.rank_limit)
        ranks = allowed_ranks if len(allowed_ranks) > 1 else ranks[:2]
    estimates = {rank: estimator.estimate(rank) for rank in ranks}
    needs = {rank: estimate.needed_bytes for rank, estimate in estimates.items()}
    fitting_ranks = tuple(rank for rank in ranks if memory is None or needs[rank] <= memory)
    if len(fitting_ranks) < min(2, len(ranks)):
        raise SettingsError(_format_refusal(estimator, needs, memory or 0))
    adapters = None
    max_adapters = settings.adapters_per_pass or (MAX_ADAPTERS_PER_PASS if plan_settings.device == "cuda" else 1)
    if memory is not None and max_adapters > 1:
        adapters = _find_max_adapters(estimator, max(fitting_ranks), max_adapters)
    peaks = {rank: estimate.peak_bytes for rank, estimate in estimates.items()}
    return MemoryPlan(peaks, needs, memory, fitting_ranks, adapters)


def _find_max_adapters(estimator: Estimator, rank: int, max_adapters: int) -> int:
    """Return how many adapters fit in one pass: `max_adapters`, or the largest smaller power of two.

    Returns 1 if the step with several adapters cannot be traced.
    """
    counts = [
        max_adapters,
        *(2**power for power in reversed(range(max_adapters.bit_length())) if 2**power < max_adapters),
    ]
    try:
        fitting_counts = (count for count in counts if count == 1 or estimator.share_pass(count).estimate(rank).fits)
        return next(fitting_counts, 1)
    except SharedPassError:
        return 1


def build_step_settings(
    config: Any, settings: SelectSettings, longest: int, device: str, num_labels: int | None, sequences: int = 1
) -> PlanSettings:
    """Return the plan's settings for the training loop of `select`."""
    kind = "cuda" if device.startswith("cuda") else "cpu"
    shared = {name: getattr(settings, name) for name in (*STEP_OF_SELECT, "eval_batch_size")}
    eager = getattr(config, "_attn_implementation", None) == "eager"
    for name in ("batch_size", "eval_batch_size"):  # The plan counts sequences as examples.
        shared[name] *= sequences
    return PlanSettings(
        **shared
        | {
            "packed": True,
            "loss": "full" if num_labels else "chunked",
            "optim": "adamw_fused",
            "seq_len": max(2, longest),
            "padding": num_labels is not None,  # A causal row never attends to padding on its right.
            "num_labels": num_labels,
            "attn_implementation": "eager" if eager else "sdpa",
            "device": kind,
            "memory_bytes": settings.memory_bytes or (read_device_memory() if kind == "cuda" else None),
        }
    )


def _format_refusal(estimator: Estimator, needs: dict[int, int], memory: int) -> str:
    smallest = min(rank for rank, count in needs.items() if count > memory)
    tensors = needs[smallest] - estimate_context_bytes(estimator.settings)
    return (
        f"rank {smallest} needs {format_bytes(needs[smallest])} of memory ({format_bytes(tensors)} for tensors, the rest for the "
        f"process), but only {format_bytes(memory)} are available; give more --memory, lower ranks, {SAVINGS}"
    )
