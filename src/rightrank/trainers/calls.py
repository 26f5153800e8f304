"""The task and the result of a custom trainer, the call of its function, and the check of the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import Field, ValidationError

from rightrank.schema.errors import NotFiniteError, ReportError, RunError, log_traceback, quote_value
from rightrank.schema.trials import BoundedInt, EvalPoint, Record


class TrialTask(Record):
    """The task of a custom trainer: one training to run, or for rank 0 the evaluation of the base."""

    trial_id: str
    rank: BoundedInt
    learning_rate: float
    lora_alpha: float
    seed: BoundedInt
    steps: BoundedInt  # 0: the trainer chooses the number of steps
    folder: Path  # exists; an adapter that is saved here is exported if the trial is chosen

    # Receives each report; None: reports are ignored.
    report_callback: Callable[[EvalPoint], None] | None = Field(default=None, exclude=True, repr=False)

    def report(self, step: int, value: float, example_scores: Sequence[float] | None = None) -> None:
        """Report the held-out value after `step` optimizer steps. It is written to the journal at once.

        Args:
            step: optimizer steps so far; 0 is the untrained adapter. A report for an earlier step replaces that report and all
                later ones.
            value: the deciding metric on the validation examples.
            example_scores: the deciding metric for each validation example; the same examples at every evaluation of every trial.

        Raises:
            ValueError: a value that is not a finite number. The trial ends if the function does not catch the error; with NaN
                or infinity it has diverged.
        """
        point = EvalPoint(step=step, value=value, example_scores=example_scores)
        if self.report_callback is not None:
            self.report_callback(point)


class TrialResult(Record):
    """The result of a custom trainer, which may return a number or a mapping of metrics instead. A NaN in it means that the training diverged."""

    metrics: dict[str, float]  # held-out; includes the deciding metric
    example_scores: list[float] | None = None  # the metric of each held-out example; the same examples in every trial
    example_weights: list[float] | None = None  # such as tokens per example; None: equal weights
    # Examples with the same number belong together, such as those of one document; None: each is a group of its own.
    example_groups: list[BoundedInt] | None = None
    train_value: float | None = None  # the metric on training data at the end
    points: list[EvalPoint] = Field(default_factory=list)  # evaluations during the training
    trainable_parameters: BoundedInt = 0
    train_tokens: BoundedInt = 0
    train_seconds: float | None = None  # None: the duration of the call
    eval_seconds: float = 0.0
    peak_bytes: BoundedInt = 0


TrainFunction: TypeAlias = Callable[[TrialTask], float | Mapping[str, float] | TrialResult]
EvaluateFunction: TypeAlias = Callable[[Path, TrialTask], float | Mapping[str, float] | TrialResult]
RESULT_RECORDS = ("TrialResult", "EvalPoint")


def call_function(function: TrainFunction, task: TrialTask, metric: str) -> object:
    """Call the function and return its result; a mapping, or a number that is the metric, is converted to a `TrialResult`.

    Raises:
        NotFiniteError: the function reports or returns NaN or infinity.
        ReportError: the function reports or returns something that is not a number, so the function is wrong.
        RunError: the function raises another error.
    """
    try:
        returned: Any = function(task)
        is_number = isinstance(returned, Real) and not isinstance(returned, bool)
        if is_number or getattr(returned, "ndim", None) == 0:  # also a tensor or an array without dimensions
            return TrialResult(metrics={metric: float(returned)})
        return TrialResult(metrics=dict(returned)) if isinstance(returned, Mapping) else returned
    except (NotFiniteError, ReportError):
        raise
    except ValidationError as error:
        if error.title not in RESULT_RECORDS:
            raise _report_exception(error) from error
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "its fields"
        fields = f"; the fields: {', '.join(TrialResult.model_fields)}" if first["type"] == "extra_forbidden" else ""
        kind = NotFiniteError if first["type"] == "finite_number" else ReportError
        raise kind(f"gave {field} = {quote_value(first['input'])}: {first['msg']}{fields}") from error
    except Exception as error:
        raise _report_exception(error) from error


def _report_exception(error: Exception) -> RunError:
    log_traceback(error)
    text = " ".join(str(error).split())
    return RunError(f"raised {type(error).__name__}" + (f": {text}" if text else ""))


def parse_result(returned: object, metric: str, examples: int | None) -> TrialResult:
    """Check the result of a call.

    Raises:
        ReportError: there is no result, the metric is missing, or the number of scored examples changed.
    """
    if not isinstance(returned, TrialResult):
        raise ReportError(
            f"returned {type(returned).__name__} {quote_value(returned)}; return a number, a mapping such as {{{metric!r}: 1.23}}, or a TrialResult"
        )
    if metric not in returned.metrics:
        names = ", ".join(map(repr, returned.metrics)) or "nothing"
        raise ReportError(f"returned no {metric!r} (it returned {names}); return it, or give another metric=")
    scores, weights, groups = returned.example_scores, returned.example_weights, returned.example_groups
    if scores is not None and len(scores) != (examples or len(scores) or 1):
        raise ReportError(
            f"returned {len(scores)} example_scores, but earlier trials returned {examples or 'some'}; score the same examples in the same order in every trial"
        )
    if weights is not None and (scores is None or len(weights) != len(scores) or min(weights) <= 0):
        raise ReportError(
            "returned example_weights that do not match example_scores; return one weight above 0 per example"
        )
    if groups is not None and len(groups) != len(scores or ()):
        raise ReportError("returned example_groups that do not match example_scores; return one number per example")
    return returned
