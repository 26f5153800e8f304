"""Results: the decision with its evidence, the answers on adapter and learning rate, and the objects of `plan`, `inspect`, `resize`,
`compare` and the preflight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pydantic import Field

from rightrank.schema.trials import BoundedInt, Record

if TYPE_CHECKING:
    from pandas import DataFrame

Basis: TypeAlias = Literal["examples and seeds", "examples", "seeds", "std", "values"]


Verdict: TypeAlias = Literal["saturated", "rising", "overfitting", "flat", "undecided", "no_gain"]


class RankEvidence(Record):
    """The evidence about one rank."""

    rank: BoundedInt
    value: float
    low: float
    high: float
    difference: float | None = None  # how much worse than the reference, in the metric's unit
    difference_low: float | None = None  # one-sided 95% lower bound
    difference_high: float | None = None  # one-sided 95% upper bound
    non_inferior: bool | None = None  # within the margin; None: inconclusive
    # that it is within the margin of the best, over seeds and examples; None: one number a rank shows no noise
    probability: float | None = None
    learning_rate: float | None = None
    seeds: BoundedInt = 1
    trial_ids: list[str] = Field(default_factory=list)


class StaircaseStep(Record):
    """A step of the staircase: the smallest margin at which this rank is enough."""

    margin: float
    rank: BoundedInt


class NextRun(Record):
    """A run that is expected to settle or extend the answer."""

    action: Literal["seeds", "examples", "rank", "rates", "test", "none"]
    ranks: list[BoundedInt] = Field(default_factory=list)
    learning_rates: list[float] = Field(default_factory=list)
    seeds: BoundedInt | None = None  # in total, at each rank
    examples: BoundedInt | None = None  # held-out examples in total
    trials: BoundedInt = 0  # new trainings
    sentence: str


class Decision(Record):
    """The training rank and the evidence for it."""

    def to_pandas(self) -> DataFrame:
        """Return the evidence as a table with one row per rank."""
        from pandas import DataFrame

        return DataFrame([evidence.model_dump() for evidence in self.ranks]).set_index("rank")

    rank: BoundedInt | None  # None: the evidence names no rank
    recommended_rank: BoundedInt  # the answer or, if there is none, the likeliest rank, to use until it is settled
    verdict: Verdict
    flags: list[str]
    sentence: str  # for the user
    next_run: str  # the run that would settle or extend the answer
    metric: str
    higher_is_better: bool
    margin: float
    reference_rank: BoundedInt
    confidence: (
        float | None
    )  # None if nothing is shown at a confidence level: one seed (an indication), or one number a rank
    learning_rate: float | None
    staircase: list[StaircaseStep]
    ranks: list[RankEvidence]
    basis: Basis = "examples"  # the variation that the intervals cover
    basis_note: str = ""  # what the intervals cover, and what they exclude
    # The fields of a decision by probabilities, if there are any. Differences and margins are in the metric's unit.
    requested_confidence: float | None = None  # the requested probability; None: values decided
    probability: float | None = None  # of `recommended_rank` at the margin
    indistinguishable_ranks: list[BoundedInt] = Field(
        default_factory=list
    )  # ranks that are not shown to be worse than the best
    # The first run is expected to settle the answer.
    next_runs: list[NextRun] = Field(default_factory=list)
    # How much too good the reference looks as the best of several ranks, in the metric's unit. Lower bounds are lower by this, but by
    # at most a standard error of the rank's difference.
    selection_bias: float = 0.0
    adapter_sentence: str | None = (
        None  # the sentence on the deployment rank; None: no run, or no adapter was handed over
    )


AdapterMethod: TypeAlias = Literal["trained", "truncated"]


class Gain(Record):
    """What a training gained over the base, in the metric's unit; above 0 is better."""

    mean: float
    low: float  # 95% bounds, one-sided, over examples
    high: float


class ShareStep(Record):
    """The smallest rank that is shown to keep at least this share of the gain."""

    share: float
    rank: BoundedInt


class AdapterCandidate(Record):
    """An adapter compared with the reference adapter on the same validation examples."""

    rank: BoundedInt
    method: AdapterMethod
    trial_id: str
    value: float  # held-out, metric's unit and direction
    difference: float  # how much worse than the reference, metric's unit
    difference_low: float | None = None  # its 95% lower bound, one-sided, over examples; None without example scores
    difference_high: float | None  # its 95% upper bound, the one that is tested
    is_within_margin: bool  # whether it is shown to be within the margin
    # The share of the reference's gain over the base; None without a base, and if no gain is shown. It may be above 1 or below 0.
    share_kept: float | None = None
    share_kept_low: float | None = None  # its 95% bounds, one-sided; None without example scores
    share_kept_high: float | None = None


class AdapterAnswer(Record):
    """The smallest adapter from one training at the top rank that is not worse than the reference by more than the margin."""

    rank: BoundedInt
    method: AdapterMethod
    trial_id: str
    trained_rank: BoundedInt
    trained_id: str  # the training at the top rank that every candidate comes from
    reference_id: str
    difference: float  # of the chosen adapter from the reference; 0 where it is the reference
    difference_high: float | None
    share_kept: float | None = None  # as in `AdapterCandidate`
    share_kept_low: float | None = None
    margin: float  # in the metric's unit
    margin_share: float | None = (
        None  # the margin as a share of the gain; None if it was given in the metric's unit, or without a base
    )
    gain: Gain | None = None  # of the reference; None if the base was not measured
    staircase: list[ShareStep] = Field(default_factory=list)  # by falling share
    candidates: list[AdapterCandidate]  # by descending rank
    sentence: str
    notes: list[str] = Field(default_factory=list)  # other findings for the user, each with what to do

    @property
    def has_no_gain(self) -> bool:
        """Return whether the reference is not shown to be better than the base."""
        return self.gain is not None and self.gain.low <= 0

    @property
    def is_top_rank_required(self) -> bool:
        """Return whether even the largest truncation loses more than the margin. The top rank itself may then be too small."""
        lower = [cut for cut in self.candidates if cut.method == "truncated" and cut.rank < self.trained_rank]
        largest = max(lower, key=lambda cut: cut.rank, default=None)
        return (
            not self.has_no_gain
            and self.rank == self.trained_rank
            and largest is not None
            and largest.difference > self.margin
        )


class LearningRateCandidate(Record):
    """A learning rate compared with the chosen one, at the same step and on the same validation examples."""

    learning_rate: float
    # at that step, in the metric's unit and direction, with the mean of the factors if it was measured; None: it diverged or failed
    value: float | None
    difference: float | None = None  # how much worse than the chosen learning rate
    difference_low: float | None = None  # its 95% bounds, one-sided, over examples; None without example scores
    difference_high: float | None = None
    final_value: float | None = None  # at the end of the training; None if it was not finished
    failure: str | None = None  # how its training ended without a result, such as "diverged at step 40"


class LearningRateAnswer(Record):
    """The learning rate of the handed-over adapter, and how the others did."""

    learning_rate: float
    rank: BoundedInt  # of the training
    metric: str
    step: BoundedInt  # at which the learning rates were compared
    steps: BoundedInt  # of the whole training; 0: unknown
    margin: float  # in the metric's unit
    candidates: list[LearningRateCandidate]  # ascending, the chosen one included
    sentence: str


class ExportedAdapter(Record):
    """The adapter in `adapter/`. Differences are from the reference adapter, in the metric's unit; above 0 is worse."""

    rank: BoundedInt
    min_module_rank: BoundedInt | None = None  # None: unknown
    max_module_rank: BoundedInt
    method: AdapterMethod
    trained_rank: BoundedInt
    reference_adapter: str  # a folder that PEFT loads, relative to the run
    difference: float
    difference_high: float | None
    test_difference: float | None = None  # None without a test split
    test_difference_high: float | None = None

    @property
    def rank_text(self) -> str:
        """Return the rank as text, with the range of the modules if a truncation gave them different ranks."""
        lowest = self.min_module_rank
        if self.method == "trained" or lowest is None or lowest == self.max_module_rank:
            return f"{self.rank}"
        return f"{self.rank} (modules from {lowest} to {self.max_module_rank})"


class RankPlan(Record):
    """The memory and compute of one rank."""

    rank: int
    trainable_parameters: int
    adapter_bytes: int  # of adapter_model.safetensors
    peak_bytes: int  # allocated, at the peak of the step
    peak_reserved_bytes: int  # by the CUDA allocator; on the CPU the same as peak_bytes
    needed_bytes: int  # reserved, with the process and headroom; compared with the available memory
    components: dict[str, int]  # they add up to peak_bytes
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
    learning_rates: tuple[float, float]  # with which `select` starts
    memory_bytes: int | None = None
    context_bytes: int  # of the process beside its tensors
    error_share: float  # relative error of the peaks
    notes: list[str] = Field(default_factory=list)
    settings: dict[str, Any]


class SplitSummary(Record):
    """Counts of a split after tokenization."""

    examples: BoundedInt
    tokens: BoundedInt
    label_tokens: BoundedInt
    truncated: BoundedInt  # examples that were cut to the length limit
    dropped: BoundedInt  # examples without a label token
    equal: BoundedInt = 0  # preference pairs whose answers are the same within the length limit


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
    # untrained, no_token, dora, lora_bias, noise_unclear
    flags: list[str] = Field(default_factory=list)


class InspectionSummary(Record):
    """A summary of the complete adapter."""

    modules: int
    parameters: int  # of the factors
    ranks: list[int]  # the different ranks
    base_model: str | None
    energy_rank: dict[str, int]  # the maximum over modules, as one common rank requires
    untrained: list[str]  # B = 0: never trained
    modules_to_save: list[str] = Field(default_factory=list)  # fully trained modules
    notes: list[str] = Field(default_factory=list)
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
    chosen_by: str
    answer: AdapterAnswer | None = None  # with data: the truncation that is enough, and every candidate
    notes: list[str] = Field(default_factory=list)


ComparisonVerdict: TypeAlias = Literal["not_worse", "worse", "cannot_tell", "broken"]


class _ComparisonResult(Record):
    metric: str
    verdict: ComparisonVerdict
    difference: float  # B is worse by this much, metric's unit; below 0: better
    difference_low: float  # 95% lower bound of it, one-sided
    difference_high: float  # 95% upper bound of it, one-sided
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
