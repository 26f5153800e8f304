"""The decision with its evidence, and the answers on the adapter and the learning rate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

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


class DifferenceDistribution(Record):
    """The distribution of a paired difference over the held-out examples, in the metric's unit. Its mean hides rare large differences."""

    threshold: float  # ten margins
    share_worse: float  # the share of examples that get worse by more than `threshold`
    worst_tenth_mean: float  # the mean difference of the tenth of the examples with the largest differences


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
    current_value: float | None = None  # the same with the current factors, if `value` is that of a mean
    difference: float | None = None  # how much worse than the chosen learning rate
    difference_low: float | None = None  # its 95% bounds, one-sided, over examples; None without example scores
    difference_high: float | None = None
    is_within_margin: bool | None = None  # by the upper bound; False: not shown; None: without example scores
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
    def module_rank_range(self) -> str:
        """Return a text such as `modules from 1 to 4` if a truncation gave modules different ranks, else an empty text."""
        lowest = self.min_module_rank
        if self.method == "trained" or lowest is None or lowest == self.max_module_rank:
            return ""
        return f"modules from {lowest} to {self.max_module_rank}"

    @property
    def rank_text(self) -> str:
        """Return the rank as text, with the range of the modules where they differ."""
        return f"{self.rank} ({self.module_rank_range})" if self.module_rank_range else f"{self.rank}"
