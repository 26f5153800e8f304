"""Input and output of `decide`: tables of results, and the decision with its evidence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

from pydantic import Field

from rightrank.schema.metrics import Checkpoint
from rightrank.schema.trials import Record, Whole

if TYPE_CHECKING:
    from pandas import DataFrame

Basis: TypeAlias = Literal["items and seeds", "items", "seeds", "std", "values"]


Verdict: TypeAlias = Literal["saturated", "rising", "overfitting", "flat", "no_difference", "undecided", "no_gain"]


Grade: TypeAlias = Literal["shown", "likely", "cannot tell"]


class Result(Record):
    """One training of a table from another tool; `value` is None if it ended without a result."""

    trial_id: str
    rank: Whole
    learning_rate: float = 0.0  # 0: not stated
    seed: Whole = 0
    value: float | None
    # Examples in the same order for all results of a table; each value is a mean over the example's tokens.
    item_values: list[float] = Field(default_factory=list)
    item_weights: list[float] = Field(default_factory=list)  # tokens of each example; empty: equal weights
    item_groups: list[Whole] | None = None  # the number of each example's group; None: each stands for itself
    std: float | None = None  # stated standard deviation over seeds
    std_seeds: Whole = 1  # number of seeds that the value averages
    train_value: float | None = None
    steps: Whole | None = None
    points: list[tuple[Whole, float]] = Field(default_factory=list)  # (step, value) during the training
    others: dict[str, float] = Field(default_factory=dict)


class ResultsTable(Record):
    """A table of finished trainings, and how it was read."""

    metric: str
    higher_is_better: bool
    results: list[Result]
    understood: list[str]  # notes: the role of each column, and which rows were left out


class RankEvidence(Record):
    """The evidence on one rank."""

    rank: Whole
    value: float
    low: float
    high: float
    difference: float | None = None  # how much worse than the reference, in the metric's unit
    difference_low: float | None = None  # one-sided 95% lower bound
    difference_high: float | None = None  # one-sided 95% upper bound
    further_seed_low: float | None = None  # two-sided 95% interval of the difference that a further seed would show
    further_seed_high: float | None = None  # None: the seed noise was not measured
    non_inferior: bool | None = None  # within the margin; None: inconclusive
    # that it is within the margin of the best, over seeds and examples; None: `probability_note`
    probability: float | None = None
    learning_rate: float | None = None
    seeds: Whole = 1
    trial_ids: list[str] = Field(default_factory=list)
    winner_gap: float = 0.0  # optimism of choosing the best learning rate; subtracted from the difference


class StaircaseStep(Record):
    """The smallest margin at which this rank is enough."""

    margin: float
    rank: Whole


class NextRun(Record):
    """A run that would settle or extend the answer."""

    action: Literal["seeds", "items", "rank", "rates", "steps", "test", "data", "none"]
    ranks: list[Whole] = Field(default_factory=list)
    learning_rates: list[float] = Field(default_factory=list)
    seeds: Whole | None = None  # in total, at each rank
    items: Whole | None = None  # held-out examples in total
    steps: Whole | None = None
    trials: Whole = 0  # new trainings
    minutes: float | None = None  # about what it takes, by the trainings and evaluations so far; None: not known
    sentence: str


class MetricAnswer(Record):
    """The answer by another metric of the same trainings, with its own margin and best learning rates."""

    metric: str
    higher_is_better: bool
    margin: float
    rank: int | None  # None: no answer
    verdict: Verdict
    reference_rank: int
    conflict: bool  # one metric shows that a rank is enough, the other that it is not
    sentence: str  # for a person
    ranks: list[RankEvidence]


class Decision(Record):
    """The answer and its evidence."""

    def to_pandas(self) -> DataFrame:
        """The evidence as a table, one row per rank."""
        from pandas import DataFrame

        return DataFrame([evidence.model_dump() for evidence in self.ranks]).set_index("rank")

    @property
    def rank_at_hand(self) -> int:
        """The rank to take if one must be taken now: the answer, else the one shown to be enough, else `take`, else the best so far."""
        named = (self.rank, self.fallback_rank, self.take, self.best_so_far)
        return next((rank for rank in named if rank is not None), self.reference_rank)

    rank: Whole | None  # None: the evidence names no rank
    # the smallest rank whose comparison with the reference passed, where no higher rank may be better; None: no rank did
    fallback_rank: Whole | None
    best_so_far: Whole | None = None  # without a `fallback_rank`, the rank that came out best, without proof
    verdict: Verdict
    flags: list[str]
    sentence: str  # for a person
    next_run: str  # what would settle or extend the answer
    metric: str
    higher_is_better: bool
    margin: float
    reference_rank: Whole
    confidence: float | None  # None where nothing is shown at a level: one seed (an indication), or one number a rank
    learning_rate: float | None
    staircase: list[StaircaseStep]
    ranks: list[RankEvidence]
    basis: Basis = "items"  # the variation that the intervals rest on
    basis_note: str = ""  # what the intervals cover, and what they do not
    probability_note: str = ""  # what the ranks' probabilities say, or why there are none
    grade: Grade | None = None  # how far the answer is known; None for one number a rank
    # by probabilities, where there are any; differences and margins are in the metric's unit
    asked: float | None = None  # the probability that was asked for; None: bounds decided
    take: Whole | None = None  # the answer, or where no rank is as probable, the likeliest
    probability: float | None = None  # of `take` at the margin
    take_within: float | None = None  # the smallest margin at which `take` is as probable
    resolves: float | None = None  # the smallest margin at which any rank is
    alike: list[Whole] = Field(default_factory=list)  # ranks that are not shown to be worse than the best
    alike_within: float | None = None  # how far their differences from it are known, either way
    probably_worse: list[Whole] = Field(default_factory=list)  # the others
    # the first is the cheapest that is expected to settle the answer
    next_runs: list[NextRun] = Field(default_factory=list)
    winner_gap: float = 0.0  # the largest of the compared ranks, in the metric's unit
    checkpoint: CheckpointNote | None = None  # if evaluations during the training were given
    other_metrics: list[MetricAnswer] = Field(default_factory=list)  # metrics other than the one that decides
    adapter_sentence: str | None = (
        None  # the answer to the first question; None: no run, or one that handed nothing over
    )


class DifferenceSpread(Record):
    """How a paired difference spreads over the held-out examples, since its mean hides what is rare; in the metric's unit."""

    amount: float  # ten margins
    worse: float  # the share of examples that get worse by more than `amount`
    worst_tenth: float  # the mean difference of the tenth of the examples that gets worst


AdapterOrigin: TypeAlias = Literal["trained", "truncated"]


class AdapterCandidate(Record):
    """One adapter file against the reference file, on the same validation examples."""

    rank: Whole
    how: AdapterOrigin
    trial_id: str
    value: float  # held-out, metric's unit and direction
    difference: float  # worse than the reference by this much, metric's unit
    difference_low: float | None = None  # its 95% lower bound, one-sided, over examples; None without example scores
    difference_high: float | None  # its 95% upper bound, the one that is tested
    holds: bool  # the bound is below the margin
    spread: DifferenceSpread | None = None  # None: the reference itself, or no example scores


class CheckpointNote(Record):
    """Which evaluation of each training was compared, and the ranks that either gives: of a decision by the values alone."""

    used: Checkpoint
    last: Whole
    best: Whole

    @property
    def matters(self) -> bool:
        return self.last != self.best


class AdapterAnswer(Record):
    """The smallest adapter of one training at the top rank that is not worse than the reference, the top, by more than the margin."""

    rank: Whole
    how: AdapterOrigin
    trial_id: str
    trained_rank: Whole
    trained_id: str  # the training at the top rank that every candidate comes from
    reference_id: str
    difference: float  # of the chosen adapter from the reference; 0 where it is the reference
    difference_high: float | None
    spread: DifferenceSpread | None = None  # of that difference
    margin: float
    candidates: list[AdapterCandidate]  # by descending rank
    sentence: str
    notes: list[str] = Field(default_factory=list)  # what else a person should know, each with what to do

    @property
    def keeps_the_top(self) -> bool:
        """Whether even the largest truncation loses more than the margin, so that the top itself may be too small."""
        lower = [cut for cut in self.candidates if cut.how == "truncated" and cut.rank < self.trained_rank]
        largest = max(lower, key=lambda cut: cut.rank, default=None)
        return self.rank == self.trained_rank and largest is not None and largest.difference > self.margin


class TrainingRankEstimate(Record):
    """Where the training rank probably lies, by the first question's evidence. It is no evidence for that rank."""

    low: Whole
    high: Whole
    trainings: float  # expected, to answer the second question from here
    sentence: str


class HandedOver(Record):
    """What `adapter/` holds. Differences are from the reference adapter, in the metric's unit; above 0 is worse."""

    rank: Whole
    min_module_rank: Whole | None = None  # None: not known
    max_module_rank: Whole
    how: AdapterOrigin
    trained_rank: Whole
    reference_adapter: str  # a folder that PEFT loads, relative to the run
    difference: float
    difference_high: float | None
    test_difference: float | None = None  # None without a test split
    test_difference_high: float | None = None

    @property
    def module_range(self) -> str:
        """`modules from 1 to 4` where a truncation gave them different ranks; else empty."""
        lowest = self.min_module_rank
        if self.how == "trained" or lowest is None or lowest == self.max_module_rank:
            return ""
        return f"modules from {lowest} to {self.max_module_rank}"

    @property
    def rank_text(self) -> str:
        """The rank, with the range of the modules where they differ."""
        return f"{self.rank} ({self.module_range})" if self.module_range else f"{self.rank}"

    @property
    def loads_as(self) -> int | None:
        """The rank at which it loads where its start is stored beside what was trained; None where it loads as trained."""
        return self.max_module_rank if self.how == "trained" and self.max_module_rank > self.rank else None
