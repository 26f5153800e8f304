"""What a user's function receives and may return, how it is called, and the check of its result."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import ConfigDict, Field, PrivateAttr, ValidationError

from rightrank.schema.errors import NotFiniteError, ReportError, quoted
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

    _receive: Callable[[EvalPoint], None] | None = PrivateAttr(default=None)  # None: nobody listens

    def report(self, step: int, value: float, item_scores: Sequence[float] | None = None) -> None:
        """Report the held-out value after `step` optimizer steps. It is in the journal at once.

        Args:
            step: optimizer steps so far; 0 is the untrained adapter. A step that is reported again replaces the earlier
                report and all later ones.
            value: the metric that decides, on validation examples.
            item_scores: that metric for each validation example, the same examples at every look of every trial.

        Raises:
            NotFiniteError: a value or a score is NaN or infinite. A function that lets it pass has diverged.
            ReportError: a step, a value or scores that are no numbers.
        """
        step, value = int(_reported(step, "the step")), _reported(value, "the value")
        if item_scores is not None and (isinstance(item_scores, str | dict) or not hasattr(item_scores, "__iter__")):
            raise ReportError(
                f"reported item_scores {quoted(item_scores)}; report one number for each example, or None"
            )
        scores = None if item_scores is None else [_reported(score, "a score") for score in item_scores]
        bad = next((score for score in (float(value), *(scores or ())) if not math.isfinite(score)), None)
        if bad is not None:
            raise NotFiniteError(f"step {step}: reported {bad}; report finite numbers")
        if self._receive is not None:
            self._receive(EvalPoint(step=step, value=float(value), item_scores=scores))

    def reporting_to(self, receive: Callable[[EvalPoint], None]) -> TrialTask:
        """A copy of the task whose `report` calls `receive`."""
        task = self.model_copy()
        task._receive = receive
        return task


def _reported(value: Any, what: str) -> float:
    if isinstance(value, str | bool) or not hasattr(value, "__float__"):
        raise ReportError(f"reported {what} as {type(value).__name__} {quoted(value)}; report a number")
    return float(value)


class TrialResult(Record):
    """What a custom trainer may return instead of a mapping of metrics. NaN counts as diverged."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=True)

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

    def not_finite(self) -> str | None:
        """The first of the values that is NaN or infinite; None where there is none."""
        numbers = [*self.metrics.items(), *(("an example's score", score) for score in self.item_scores or [])]
        numbers += [] if self.train_value is None else [("train_value", self.train_value)]
        numbers += [("a point's value", point.value) for point in self.points]
        numbers += [("a point's score", score) for point in self.points for score in point.item_scores or []]
        return next((name for name, value in numbers if not math.isfinite(value)), None)


TrainFunction: TypeAlias = Callable[[TrialTask], Mapping[str, float] | TrialResult]
EvaluateFunction: TypeAlias = Callable[[Path, TrialTask], Mapping[str, float] | TrialResult]
RESULT_RECORDS = ("TrialResult", "EvalPoint")


class TrainerError(Exception):
    """The function gave no usable result; the message says why, after the function's name."""


CALL_ERRORS = (TrainerError, NotFiniteError, ReportError)  # what a call raises; with the last, the function is wrong


def call(function: TrainFunction, task: TrialTask) -> object:
    """What the function returns, unchecked; each of its errors as one of `CALL_ERRORS`."""
    try:
        return function(task)
    except (NotFiniteError, ReportError):
        raise
    except ValidationError as error:
        if error.title not in RESULT_RECORDS:
            raise TrainerError(_raised(error)) from error
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "its fields"
        fields = f"; the fields: {', '.join(TrialResult.model_fields)}" if first["type"] == "extra_forbidden" else ""
        raise ReportError(
            f"made a {error.title} of {place} = {quoted(first['input'])}: {first['msg']}{fields}"
        ) from error
    except Exception as error:
        raise TrainerError(_raised(error)) from error


def _raised(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"raised {type(error).__name__}" + (f": {text}" if text else "")


def parse_result(returned: object, metric: str, examples: int | None) -> TrialResult:
    """Check what a function returned and convert it to a `TrialResult`.

    Raises:
        ReportError: not a mapping of numbers, the metric is missing, or scores of other examples than before.
    """
    if isinstance(returned, Mapping):
        for name, value in returned.items():
            if not isinstance(name, str) or isinstance(value, bool) or not hasattr(value, "__float__"):
                raise ReportError(
                    f"returned {name!r}: {type(value).__name__} {quoted(value)}; return names with numbers"
                )
        returned = TrialResult(metrics={name: float(value) for name, value in returned.items()})
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
