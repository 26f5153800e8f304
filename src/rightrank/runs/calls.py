"""What a user's function receives and may return, how it is called, and the check of its result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from pydantic import Field, ValidationError

from rightrank.schema.errors import NotFiniteError, ReportError, RunError, quoted
from rightrank.schema.trials import EvalPoint, Record, Whole


class TrialTask(Record):
    """What a custom trainer receives: one training to run, or for rank 0 the evaluation of the base."""

    trial_id: str
    rank: Whole
    learning_rate: float
    lora_alpha: float
    seed: Whole
    steps: Whole  # 0: the trainer's own number
    folder: Path  # exists; an adapter saved here is the result if the trial is chosen
    collapse_drop: float | None = None  # a fall of the held-out value by more than this is a collapse; None: not judged

    # What takes each report; None: nobody listens.
    receive: Callable[[EvalPoint], None] | None = Field(default=None, exclude=True, repr=False)

    def report(self, step: int, value: float, item_scores: Sequence[float] | None = None) -> None:
        """Report the held-out value after `step` optimizer steps. It is in the journal at once.

        Args:
            step: optimizer steps so far; 0 is the untrained adapter. A step that is reported again replaces the earlier
                report and all later ones.
            value: the metric that decides, on validation examples.
            item_scores: that metric for each validation example, the same examples at every look of every trial.

        Raises:
            ValueError: what is no finite number. A function that lets it pass ends its trial; with NaN or infinity it has diverged.
        """
        point = EvalPoint(step=step, value=value, item_scores=item_scores)
        if self.receive is not None:
            self.receive(point)


class TrialResult(Record):
    """What a custom trainer may return instead of a mapping of metrics. A function that makes one of NaN has diverged."""

    metrics: dict[str, float]  # held-out; includes the deciding metric
    item_scores: list[float] | None = None  # that metric for each held-out example; the same examples in every trial
    item_weights: list[float] | None = None  # such as tokens per example; None: equal weights
    # Examples of one number belong together, as those of a document; None: each stands for itself.
    item_groups: list[Whole] | None = None
    train_value: float | None = None  # the metric on training data at the end
    points: list[EvalPoint] = Field(default_factory=list)  # held-out values during the training
    trainable_parameters: Whole = 0
    train_tokens: Whole = 0
    train_seconds: float | None = None  # None: the duration of the call
    eval_seconds: float = 0.0
    peak_bytes: Whole = 0


TrainFunction: TypeAlias = Callable[[TrialTask], Mapping[str, float] | TrialResult]
EvaluateFunction: TypeAlias = Callable[[Path, TrialTask], Mapping[str, float] | TrialResult]
RESULT_RECORDS = ("TrialResult", "EvalPoint")


def call(function: TrainFunction, task: TrialTask) -> object:
    """What the function returns, a mapping as a `TrialResult`.

    Raises:
        NotFiniteError: a number that it reports or returns is NaN or infinite.
        ReportError: it reports or returns no numbers; the function is wrong.
        RunError: it raises another error.
    """
    try:
        returned = function(task)
        return TrialResult(metrics=dict(returned)) if isinstance(returned, Mapping) else returned
    except (NotFiniteError, ReportError):
        raise
    except ValidationError as error:
        if error.title not in RESULT_RECORDS:
            raise RunError(_raised(error)) from error
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "its fields"
        fields = f"; the fields: {', '.join(TrialResult.model_fields)}" if first["type"] == "extra_forbidden" else ""
        kind = NotFiniteError if first["type"] == "finite_number" else ReportError
        raise kind(f"gave {place} = {quoted(first['input'])}: {first['msg']}{fields}") from error
    except Exception as error:
        raise RunError(_raised(error)) from error


def _raised(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"raised {type(error).__name__}" + (f": {text}" if text else "")


def parse_result(returned: object, metric: str, examples: int | None) -> TrialResult:
    """Check what a call returned.

    Raises:
        ReportError: no result, the metric is missing, or scores of other examples than before.
    """
    if not isinstance(returned, TrialResult):
        raise ReportError(
            f"returned {type(returned).__name__} {quoted(returned)}; return a mapping such as {{{metric!r}: 1.23}}, or a TrialResult"
        )
    if metric not in returned.metrics:
        names = ", ".join(map(repr, returned.metrics)) or "nothing"
        raise ReportError(f"returned no {metric!r} (it returned {names}); return it, or give another metric=")
    scores, weights, groups = returned.item_scores, returned.item_weights, returned.item_groups
    if scores is not None and len(scores) != (examples or len(scores) or 1):
        raise ReportError(
            f"returned {len(scores)} item_scores, earlier trials {examples or 'some'}; score the same examples in the same order in every trial"
        )
    if weights is not None and (scores is None or len(weights) != len(scores) or min(weights) <= 0):
        raise ReportError("returned item_weights that do not match item_scores; return one weight above 0 per example")
    if groups is not None and len(groups) != len(scores or ()):
        raise ReportError("returned item_groups that do not match item_scores; return one number per example")
    return returned
