"""The plan of a selection: the memory of each rank in the training loop of `select`, the ranks that fit, and the time on this
device, from operations at the speed of a few real steps.

    flops = trainings · (steps · step + eval_points · evaluation) + extra · evaluation
            + RUN_EVALUATIONS · evaluation + prefix

A strategy gives the whole trainings that it expects and its maximum (`search.protocol.CostEstimate`). `extra` counts
the evaluations of arms that are stopped early or truncated from another. Each run also evaluates the base, three times
the test split (base, chosen, reference), and computes the frozen blocks below the adapters once (`prefix`). Preference
pairs take one more pass over every example, for the log-probabilities under the base (`reference`). The traces count operations; a few real steps give seconds. Not counted: loading, checkpoints, samples, the report.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from rightrank.data.token_store import longest_sequence
from rightrank.models.base_models import LoadedModel, device_memory, is_known
from rightrank.plugins.plan.estimate import Estimator, NotSharedError, UntraceableError
from rightrank.plugins.plan.planner import changes_that_fit, context_bytes, needed, rank_fits
from rightrank.report.format import quantity
from rightrank.runs.plugins import Clock, MemoryPlan
from rightrank.runs.values import Prepared
from rightrank.schema.errors import SettingsError
from rightrank.schema.plan_settings import (
    STEP_OF_SELECT,
    PlanSettings,
    loop_of_select,
    make_plan_settings,
)
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import Arm
from rightrank.search.protocol import Extent, SelectionCost, Strategy
from rightrank.train.pace import MAX_ADAPTERS_PER_PASS, measure_pace
from rightrank.train.tokens import EncodedData, label_count


@dataclass(frozen=True, slots=True)
class SelectionPlan(MemoryPlan):
    """Predicted peaks by rank, and the ranks that fit."""

    estimator: Estimator
    _shares: dict[int, int] = field(default_factory=dict, repr=False)  # rank → bytes of one more arm; traced once

    def notice(self) -> str | None:
        """One line for the user: the ranks left out, and why; None where all fit."""
        left_out = [rank for rank in self.needed_bytes if rank not in self.ranks]
        if not left_out or self.memory_bytes is None:
            return None
        wanted = ", ".join(f"{rank} ({_gib(self.needed_bytes[rank])})" for rank in left_out)
        return f"left out, since they need more than the {_gib(self.memory_bytes)} available: ranks {wanted}"

    def peak_of(self, ranks: Sequence[int]) -> int | None:
        """Each arm adds its own share: the traced peak of two arms of its rank, less that of one."""
        if not set(ranks) <= self.peak_bytes.keys():
            return None
        if len(ranks) == 1:
            return self.peak_bytes[ranks[0]]
        if missing := set(ranks) - self._shares.keys():
            pairs = self.estimator.variant(adapters_per_pass=2)
            self._shares.update(
                {rank: pairs.estimate(rank).peak.peak_bytes - self.peak_bytes[rank] for rank in missing}
            )
        first = ranks[0]
        return self.peak_bytes[first] - self._shares[first] + sum(self._shares[rank] for rank in ranks)

    def clock(self, prepared: Prepared) -> Clock | None:
        measured = _measured_speed(self.estimator, prepared)
        if measured is None:
            return None
        speed, basis = measured
        fitting, work = self.estimator.variant(ranks=self.ranks), _workload(prepared)
        return Clock(basis, lambda strategy: selection_cost(fitting, strategy, work, speed))


def plan_loaded(
    loaded: LoadedModel,
    encoded: EncodedData,
    classes: int | None,
    settings: SelectSettings,
    notice: Callable[[str], None],
) -> SelectionPlan | None:
    """The plan of a selection on loaded data; default ranks above the smallest side of a matrix are left out.

    Returns:
        None for an architecture that transformers can't build from its configuration, or whose step can't be traced.
    """
    config, device = loaded.model.config, str(loaded.device)
    if not is_known(config, encoded.is_classification):
        return None
    try:
        planned = plan_selection(config, settings, encoded.longest, device, classes, encoded.sequences_per_example)
    except UntraceableError as error:
        notice(str(error))
        return None
    if "ranks" not in settings.model_fields_set:
        notice(f"ranks {', '.join(map(str, planned.ranks))} by default; --ranks gives others")
    if (left_out := planned.notice()) is not None:
        notice(left_out)
    return planned


def plan_selection(
    config: Any,
    settings: SelectSettings,
    longest: int,
    device: str,
    num_labels: int | None = None,
    sequences: int = 1,
) -> SelectionPlan:
    """Predict every rank's peak, and keep the ranks that fit.

    Args:
        config: the model's configuration.
        settings: of the selection; without `memory_bytes`, a CUDA device's own memory is the budget.
        longest: tokens of the longest sequence.
        device: `cpu`, `cuda`, …
        num_labels: of a classification.
        sequences: of each example; 2 for preference pairs.

    Raises:
        SettingsError: fewer ranks fit than a comparison needs; the message names what to change.
    """
    plan_settings = _plan_settings(config, settings, longest, device, num_labels, sequences)
    memory = plan_settings.memory_bytes
    estimator = Estimator(config, plan_settings)
    ranks = settings.ranks
    if "ranks" not in settings.model_fields_set:  # default ranks that the smallest matrix can't have are left out
        kept = tuple(rank for rank in ranks if rank <= estimator.rank_limit)
        ranks = kept if len(kept) > 1 else ranks[:2]
    peaks = {rank: estimator.estimate(rank).peak for rank in ranks}
    needs = {rank: needed(peak.reserved_bytes, plan_settings) for rank, peak in peaks.items()}
    fitting = tuple(rank for rank in ranks if memory is None or needs[rank] <= memory)
    if len(fitting) < min(2, len(ranks)):
        raise SettingsError(_refusal(estimator, needs, memory or 0))
    adapters = None
    wanted = settings.adapters_per_pass or (MAX_ADAPTERS_PER_PASS if plan_settings.device == "cuda" else 1)
    if memory is not None and wanted > 1:
        adapters = _max_adapters(estimator, max(fitting), wanted)
    return SelectionPlan(
        {rank: peak.peak_bytes for rank, peak in peaks.items()}, needs, memory, fitting, adapters, estimator
    )


def _max_adapters(estimator: Estimator, rank: int, wanted: int) -> int:
    """Adapters in one pass: `wanted`, or the largest power of two below it that fits; 1 where the plan can't trace several."""
    sizes = [wanted, *(2**power for power in reversed(range(wanted.bit_length())) if 2**power < wanted)]
    try:
        return next(
            (size for size in sizes if size == 1 or rank_fits(estimator.variant(adapters_per_pass=size), rank)), 1
        )
    except NotSharedError:
        return 1


def _plan_settings(
    config: Any, settings: SelectSettings, longest: int, device: str, num_labels: int | None, sequences: int = 1
) -> PlanSettings:
    """The plan's settings for the training loop of `select`."""
    kind = "cuda" if device.startswith("cuda") else "cpu"
    shared = {name: getattr(settings, name) for name in STEP_OF_SELECT}
    eager = getattr(config, "_attn_implementation", None) == "eager"
    for name in ("batch_size", "eval_batch_size"):  # the plan's examples are sequences
        shared[name] *= sequences
    return make_plan_settings(
        shared
        | loop_of_select(num_labels)
        | {
            "seq_len": max(2, longest),
            "padding": num_labels is not None,  # a causal row never attends to padding on its right
            "num_labels": num_labels,
            "attn_implementation": "eager" if eager else "sdpa",
            "device": kind,
            "memory_bytes": settings.memory_bytes or (device_memory() if kind == "cuda" else None),
        }
    )


def _refusal(estimator: Estimator, needs: dict[int, int], memory: int) -> str:
    smallest = min(rank for rank, size in needs.items() if size > memory)
    tensors = needs[smallest] - context_bytes(estimator.settings)
    changes = changes_that_fit(estimator)
    advice = ", ".join(f"{name} {value}" for name, value in changes.items() if name in SelectSettings.model_fields)
    return (
        f"rank {smallest} needs {_gib(needs[smallest])} ({_gib(tensors)} for tensors, the rest for the process), and "
        f"{_gib(memory)} are available; give more --memory, lower ranks{', or ' + advice if advice else ''}"
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _measured_speed(estimator: Estimator, prepared: Prepared) -> tuple[Speed, str] | None:
    """`(seconds per operation of this run, the steps and examples that they come from)`.

    None where trainings run in other processes, or memory runs out.
    """
    settings = prepared.settings
    if settings.executor != "local":
        return None
    rank = max(settings.ranks)
    arm = Arm(
        rank=rank,
        learning_rate=min(settings.learning_rates),
        lora_alpha=settings.lora_alpha,
        seed=settings.seeds[0],
        steps=prepared.steps,
    )
    pace = measure_pace(prepared.runtime, arm)
    if pace is None:
        return None
    work = _workload(prepared, pace.batches, pace.evaluated)
    flops, filled = _flops_of(estimator, rank, work), estimator.frozen_flops * work.filled * pace.filled
    speed = Speed(
        pace.train_seconds / flops.training,
        pace.eval_seconds / flops.evaluation,
        # None: no block is computed once, or beside a reference
        pace.fill_seconds / filled if filled and not work.reference else None,
    )
    steps, examples = quantity(len(pace.batches), "step"), quantity(len(pace.evaluated), "validation example")
    return speed, f"{steps} of rank {pace.rank} and {examples}"


def _workload(
    prepared: Prepared, batches: Sequence[Sequence[int]] | None = None, evaluated: Sequence[int] | None = None
) -> Workload:
    """The work of one training, counted over all its batches.

    Args:
        prepared: the selection.
        batches: training examples of each step; None for those of a whole training.
        evaluated: validation examples; None for all.
    """
    data, settings = prepared.runtime.data, prepared.settings
    train = data.splits["train"]
    batches = prepared.runtime.batch_plan(settings.seeds[0]) if batches is None else batches
    size = settings.batch_size
    micro = [batch[start : start + size] for batch in batches for start in range(0, len(batch), size)]
    used = [train[index] for rows in micro for index in rows]
    if prepared.runtime.fast_paths.sequence_packing:
        computed = sum(example.length for example in used)
    else:
        padded = sum(len(rows) * longest_sequence([train[index] for index in rows]) for rows in micro)
        computed = padded * data.sequences_per_example
    labels = sum(label_count(example) for example in used)
    trained = len({index for rows in micro for index in rows})
    held_out = len(data.splits["selection"]) if evaluated is None else len(evaluated)
    return Workload(
        steps=len(batches),
        examples=trained * data.sequences_per_example,
        eval_examples=held_out * data.sequences_per_example,
        eval_points=settings.eval_points,
        passes=settings.gradient_accumulation_steps,
        filled=computed / (len(used) * data.sequences_per_example * data.longest),
        labelled=1.0 if data.is_classification else labels / computed,
        reference=trained / held_out + 2 if data.is_preference else 0.0,
    )


RUN_EVALUATIONS = 4  # of the base, and three of the test split, which is about as large


@dataclass(frozen=True, slots=True)
class Workload:
    """The size of one training, beside the plan's settings."""

    steps: int  # optimizer steps of a whole training
    examples: int  # different training examples that it sees
    eval_examples: int
    eval_points: int
    passes: int = 1  # micro-batches in a step
    filled: float = 1.0  # mean positions computed for an example, padding included, as a share of the planned length
    labelled: float = 1.0  # share of positions with a label, where the output head runs
    reference: float = 0.0  # the passes for the reference of preference pairs, in evaluations


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds per operation, of training steps and of forward passes."""

    seconds_per_flop: float
    seconds_per_forward_flop: float
    seconds_per_prefix_flop: float | None = None  # of the blocks that are computed once; None: as of forward passes

    def seconds(self, training: float, forward: float, prefix: float) -> float:
        of_prefix = self.seconds_per_prefix_flop or self.seconds_per_forward_flop
        return training * self.seconds_per_flop + forward * self.seconds_per_forward_flop + prefix * of_prefix


@dataclass(frozen=True, slots=True)
class _Flops:
    """Operations of one rank: the steps of a whole training, and one pass over the held-out examples."""

    training: float
    evaluation: float


def selection_cost(
    estimator: Estimator, strategy: Strategy, work: Workload, speed: Speed | None = None
) -> SelectionCost:
    """The cost of the selection, expected and at most; its seconds where the speed of this device was measured."""
    counted = {rank: _flops_of(estimator, rank, work) for rank in estimator.settings.ranks}
    mean = _Flops(fmean(f.training for f in counted.values()), fmean(f.evaluation for f in counted.values()))
    costliest = max(counted.values(), key=lambda flops: flops.training)
    prefix = estimator.frozen_flops * (work.examples + 2 * work.eval_examples) * work.filled
    shared = mean.evaluation * (RUN_EVALUATIONS + work.reference)
    cost = strategy.cost()

    def extent(trainings: float, arms: float, each: _Flops) -> Extent:
        training, extra = each.training * trainings, max(0.0, arms - 1 - trainings)
        forward = each.evaluation * (trainings * work.eval_points + extra) + shared
        seconds = None if speed is None else speed.seconds(training, forward, prefix)
        return Extent(trainings=trainings, flops=training + forward + prefix, seconds=seconds)

    return SelectionCost(
        steps=work.steps,
        expected=extent(cost.expected, strategy.expected_arms(), mean),
        most=extent(cost.maximum, strategy.max_arms(), costliest),
    )


def _flops_of(estimator: Estimator, rank: int, work: Workload) -> _Flops:
    """Operations of one rank, less what the cached prefix and positions without a label save."""
    settings = estimator.settings
    rows = settings.batch_size * settings.adapters_per_pass
    prefix = estimator.frozen_flops
    head = estimator.head_flops * (1 - work.labelled)
    step = estimator.flops(rank) - rows * (prefix + 2 * head)  # the head runs forward and backward
    forward = estimator.forward_flops(rank) - prefix - head
    scale = work.filled
    return _Flops(
        step / settings.adapters_per_pass * scale * work.passes * work.steps, forward * scale * work.eval_examples
    )
