"""The records of `plan`, `inspect`, `resize`, `compare` and the preflight; one JSON object each."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from pydantic import Field

from rightrank.schema.decision import AdapterAnswer, DifferenceDistribution, Gain
from rightrank.schema.events import SplitSummary
from rightrank.schema.trials import BoundedInt, Record

Components: TypeAlias = dict[str, int]


class RankPlan(Record):
    """The memory and compute of one rank."""

    rank: int
    trainable_parameters: int
    adapter_bytes: int  # of adapter_model.safetensors
    peak_bytes: int  # allocated, at the peak of the step
    peak_reserved_bytes: int  # by the CUDA allocator; on the CPU the same as peak_bytes
    needed_bytes: int  # reserved, with the process and headroom; compared with the available memory
    components: Components  # they add up to peak_bytes
    peak_at: str  # where in the step the peak is
    fits: bool | None  # None: the available memory is unknown
    flops_per_step: int


class Plan(Record):
    """The cost of every rank, and the largest rank that fits."""

    model: str
    architecture: str
    base_parameters: int
    base_bytes: int
    targets: int  # adapted matrices
    ranks: list[RankPlan]
    max_rank: int | None  # the largest requested rank that fits; None: none fits, or the memory is unknown
    largest_possible_rank: int | None = None  # of all ranks, also those that were not requested
    memory_bytes: int | None = None
    context_bytes: int  # of the process beside its tensors
    changes: dict[str, Any] = Field(default_factory=dict)  # settings with which the smallest rank fits, if none fits
    source: Literal["traced"]  # of the peaks
    error_share: float  # relative error of the peaks
    notes: list[str] = Field(default_factory=list)
    seconds: float  # spent on planning
    settings: dict[str, Any]


class PreflightRank(Record):
    """One rank and its memory; None where the model can't be planned or the memory is unknown."""

    rank: BoundedInt
    peak_bytes: BoundedInt | None  # of tensors
    needed_bytes: BoundedInt | None  # with segments, process and headroom
    fits: bool | None


class PreflightCost(Record):
    """The cost of the selection, in complete trainings and in seconds."""

    strategy: str
    steps: BoundedInt  # optimizer steps of a training
    trainings: float  # expected
    trainings_at_most: float
    trainings_to_adapter: float  # expected, until the first question is answered
    seconds: float | None  # None: not measured
    seconds_at_most: float | None


class Preflight(Record):
    """A preview of a selection before its first training."""

    metric: str
    margin: float | None  # None: a share of the gain, which is not known yet
    goal: str
    form: str
    splits: dict[str, SplitSummary]  # train, validation, test
    splits_given: bool
    left_out: list[str]  # what was left out or truncated, with its number and why
    not_evaluated: BoundedInt = 0  # held-out examples beyond `max_eval_examples`
    longest: BoundedInt  # tokens of the longest example
    seq_len: BoundedInt
    ranks: list[PreflightRank]
    memory_bytes: BoundedInt | None
    cost: PreflightCost
    # The smallest difference that the validation examples can tell from 0, about, and the number that can tell the margin.
    resolution: float | None = None  # None: a metric that no grid has
    examples_needed: BoundedInt | None = None
    notes: list[str] = Field(default_factory=list)


class ModuleSpectrum(Record):
    """The spectrum of one module's update ΔW."""

    name: str
    kind: str  # linear, embedding, convolution or expert
    shape: tuple[int, int]  # of ΔW: out × in
    rank: int  # of the factors
    scaling: float  # s in s·B·A
    singular_values: list[float]  # of s·B·A, descending
    frobenius_norm: float
    spectral_norm: float
    stable_rank: float
    effective_rank: float
    energy_rank: dict[str, int]  # by fraction
    noise_rank: int  # above the optimal hard threshold
    # untrained, no_token, dead, dora, lora_bias, noise_unclear
    flags: list[str] = Field(default_factory=list)


class AdapterContent(Record):
    """What the bytes of an adapter's file are."""

    factor_bytes: BoundedInt  # LoRA factors, with magnitudes and biases of theirs
    full_bytes: BoundedInt  # fully trained modules, such as embeddings and heads
    types: list[str]  # of the values, as safetensors names them


class InspectionSummary(Record):
    """A summary of the complete adapter."""

    modules: int
    parameters: int  # of the factors
    ranks: list[int]  # the different ranks
    scaling_rule: str
    base_model: str | None
    energy_rank: dict[str, int]  # the maximum over modules, as one common rank requires
    untrained: list[str]  # B = 0: never trained
    dead: list[str]  # updates under a thousandth of the median module's
    modules_to_save: list[str] = Field(default_factory=list)  # fully trained modules
    notes: list[str] = Field(default_factory=list)
    content: AdapterContent | None = None  # of the file
    sentence: str


class Inspection(Record):
    """The object of `inspect --json`."""

    modules: list[ModuleSpectrum]
    summary: InspectionSummary


class ModuleResize(Record):
    """The change of one module."""

    name: str
    from_rank: int
    rank: int
    relative_delta_error: float  # ‖ΔW' − ΔW‖ / ‖ΔW‖ of the tensors as written


class HeldOutValue(Record):
    """The held-out value of a truncation."""

    rank: int
    value: float


class Resized(Record):
    """The object of `resize --json`."""

    rank: int | None  # None: modules differ
    relative_delta_error: float  # over all modules, of the written tensors
    modules: list[ModuleResize]
    out: str
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    content: AdapterContent | None = None  # of the written file
    chosen_by: str
    held_out: list[HeldOutValue] = Field(default_factory=list)
    scored_examples: int | None = None  # with data: how many held-out examples every candidate was measured on
    answer: AdapterAnswer | None = None  # with data: the truncation that is enough, and every candidate
    no_gain: bool = False  # with data: the base alone is not worse than the adapter by more than the margin
    notes: list[str] = Field(default_factory=list)


ComparisonVerdict: TypeAlias = Literal["not_worse", "worse", "cannot_tell", "broken"]


class _ComparisonResult(Record):
    metric: str
    verdict: ComparisonVerdict
    difference: float  # B is worse by this much, metric's unit; below 0: better
    difference_low: float  # 95% lower bound of it, one-sided
    difference_high: float  # 95% upper bound of it, one-sided
    distribution: DifferenceDistribution
    margin: float  # in the metric's unit
    margin_share: float | None = None  # of A's gain; None: the margin is one in the metric's unit
    gain: Gain | None = None  # of A over the base
    examples: BoundedInt
    groups: BoundedInt | None = None  # of examples that belong together; None: each stands for itself
    left_out: BoundedInt = 0  # examples without a label within the maximum length
    trained_on: BoundedInt = 0  # rows that A or B was trained on, which are left out too
    # about how many, of groups where there are any, would show "not worse" at this difference; None: none would, or it is shown
    examples_needed: BoundedInt | None


class MetricComparison(_ComparisonResult):
    """The comparison of B with A by one metric on one data set."""

    data: str
    value_a: float
    value_b: float


class AdapterComparison(_ComparisonResult):
    """The verdict whether B is no worse than A. The figures at the top are those of the comparison with the worst verdict."""

    sentence: str
    comparisons: list[MetricComparison]
    cause: str | None = None  # of `broken`
