"""What `decide` reads and what it answers: tables of results, and the decision with its evidence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

from pydantic import Field

from rightrank.records.base import Record, Whole

if TYPE_CHECKING:
    from pandas import DataFrame


Basis: TypeAlias = Literal["items and seeds", "items", "seeds", "std", "values"]


Verdict: TypeAlias = Literal["saturated", "rising", "overfitting", "flat", "undecided", "no_gain"]


class Result(Record):
    """One finished training of a table that others made; `value` is None where it ended without a result."""

    trial_id: str
    rank: Whole
    learning_rate: float = 0.0  # 0: not stated
    seed: Whole = 0
    value: float | None
    item_values: list[float] = Field(
        default_factory=list
    )  # in the order of the table's items; each a mean over the item's tokens
    item_weights: list[float] = Field(default_factory=list)  # tokens of each item; empty: all alike
    std: float | None = None  # stated standard deviation over seeds
    std_seeds: Whole = 1  # how many seeds the value is the mean of
    train_value: float | None = None
    seconds: float | None = None
    steps: Whole | None = None
    points: list[tuple[Whole, float]] = Field(default_factory=list)  # (step, value) along the training
    others: dict[str, float] = Field(default_factory=dict)


class ResultsTable(Record):
    """A table of finished trainings, and what was understood of it."""

    metric: str
    higher_is_better: bool
    results: list[Result]
    understood: list[str]  # for a person: which column was taken for what, and what was left out


class SweepRow(Record):
    """One further setting (an alpha, a scaling rule, an initialisation) at one rank, at its own best rate."""

    setting: str
    rank: Whole
    learning_rate: float
    value: float  # held-out, the mean over seeds
    gain: float  # over the setting that all ranks shared, at the same rank; above 0 is better
    parameters: Whole | None = None  # of the adapter
    shared_parameters: Whole | None = None  # of that rank at the shared setting


class RankEvidence(Record):
    """What is known of one rank."""

    rank: Whole
    value: float
    low: float
    high: float
    difference: float | None = None  # worse than the reference by this much, in the metric's unit
    difference_low: float | None = None  # 95% lower bound of it, one-sided
    difference_high: float | None = None  # 95% upper bound of it, one-sided
    non_inferior: bool | None = None  # within the margin: shown, refuted, or open (None)
    learning_rate: float | None = None
    seeds: Whole = 1
    trial_ids: list[str] = Field(default_factory=list)
    winner_gap: float = 0.0  # how optimistic the best of its rates is; taken out of the difference


class StaircaseStep(Record):
    """From this margin on, this rank is enough."""

    margin: float
    rank: Whole


class FittedPoint(Record):
    """The fitted curve at one rank, with its 95% interval."""

    rank: float
    value: float
    low: float
    high: float


class CurveFit(Record):
    """The curve through the ranks, in the metric's unit and direction. Intervals are 95%, by bootstrap."""

    form: Literal["power", "constant", "monotone", "u_shaped"]  # the one that predicts best
    a: float  # of the power law value(r) = a + b·r^-c, whatever the form
    b: float
    c: float
    prediction_error: dict[str, float]  # of each form: mean absolute error at a rank left out
    points: list[FittedPoint]  # from the lowest rank to the highest, to be drawn
    r_margin: float  # the rank where the curve comes within the margin of its best
    r_margin_low: float
    r_margin_high: float
    diminishing_rank: float | None  # beyond it a doubling gains less than the margin
    next_doubling_gain: float  # expected from the top rank to its double
    gain_to_come: float  # expected above the top rank, all of it
    gain_to_come_low: float
    gain_to_come_high: float


class NextRun(Record):
    """A run that would settle or extend the answer."""

    action: Literal["seeds", "items", "rank", "rates", "steps", "test", "data", "none"]
    ranks: list[Whole] = Field(default_factory=list)
    learning_rates: list[float] = Field(default_factory=list)
    seeds: Whole | None = None  # in all, at each of the ranks
    items: Whole | None = None  # held-out items in all
    steps: Whole | None = None
    trials: Whole = 0  # new trainings
    seconds: float | None = None  # by a table's own `seconds`; None for a run: its decision holds no measured time
    sentence: str


class HorizonNote(Record):
    """Whether the ranks' order had settled when the training ended."""

    steps: Whole
    holds_from: Whole  # the earliest evaluation from which on the same rank was the answer
    gap_growth: float | None  # of the chosen rank's gap to the reference, over the last stretch, metric's unit


class MetricAnswer(Record):
    """What another metric of the same trainings says of the ranks, at that metric's own margin and best rates."""

    metric: str
    higher_is_better: bool
    margin: float
    rank: int | None  # None where it names none
    verdict: Verdict
    reference_rank: int
    conflict: bool  # one metric shows a rank to be enough, the other shows that it is not
    sentence: str  # for a person
    ranks: list[RankEvidence]

    def value_at(self, rank: int) -> float | None:
        """The rank's value; None where it has none."""
        return next((evidence.value for evidence in self.ranks if evidence.rank == rank), None)


class Decision(Record):
    """The answer and its evidence."""

    def to_pandas(self) -> DataFrame:
        """The evidence by rank, one row each."""
        from pandas import DataFrame

        return DataFrame([evidence.model_dump() for evidence in self.ranks]).set_index("rank")

    rank: Whole | None  # None where the evidence names none
    fallback_rank: Whole  # the smallest rank shown to be enough: what is handed over when `rank` is None
    verdict: Verdict
    flags: list[str]
    sentence: str  # for a person
    next_run: str  # what would settle or extend it
    metric: str
    higher_is_better: bool
    margin: float
    reference_rank: Whole
    confidence: float
    learning_rate: float | None
    staircase: list[StaircaseStep]
    ranks: list[RankEvidence]
    basis: Basis = "items"  # what the intervals rest on
    basis_note: str = ""  # what they cover, and what not
    next_runs: list[NextRun] = Field(default_factory=list)  # the first is the cheapest that is expected to settle it
    curve: CurveFit | None = None  # from three ranks on
    winner_gap: float = 0.0  # the largest of the ranks compared, metric's unit
    horizon: HorizonNote | None = None  # where evaluations along the training were given
    other_metrics: list[MetricAnswer] = Field(default_factory=list)  # measured beside the one that decides
