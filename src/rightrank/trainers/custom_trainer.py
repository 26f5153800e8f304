"""Selection with a custom trainer: its tasks and results, and the executor that calls the user's function, which trains with any library."""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import Field, ValidationError

from rightrank.adapters.adapter_files import open_adapter
from rightrank.adapters.resize import write_truncation
from rightrank.data.files import report_disk_errors
from rightrank.decision.adapter import Criterion
from rightrank.runs.folder import RunFolder
from rightrank.runs.hooks import Report, View
from rightrank.runs.run import Hook, Selected, select
from rightrank.runs.selection import Executor, PreparedSelection
from rightrank.schema.errors import (
    AllTrialsFailedError,
    InputError,
    InterruptedRun,
    NotFiniteError,
    ReportError,
    RightrankError,
    RunError,
    SettingsError,
    log_traceback,
    quote_value,
)
from rightrank.schema.events import DataSummary, JournalRecord, Listener, Records, RunStarted
from rightrank.schema.metrics import (
    MISSING_BASE,
    Margin,
    format_unknown_direction,
    infer_direction,
    infer_metric_kind,
    requires_base,
)
from rightrank.schema.settings import Goal, SelectSettings, select_identity_settings
from rightrank.schema.trials import (
    BoundedInt,
    EvalPoint,
    Record,
    Trial,
    TrialDiverged,
    TrialEvaluated,
    TrialFailed,
    TrialFinished,
    TrialOutcome,
    TrialStarted,
)
from rightrank.search.protocol import build_space
from rightrank.search.strategies import make_strategy


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


TrainFunction: TypeAlias = Callable[[TrialTask], float | Mapping[str, float] | TrialResult]
EvaluateFunction: TypeAlias = Callable[[Path, TrialTask], float | Mapping[str, float] | TrialResult]


@dataclass(frozen=True, slots=True)
class CustomTrainerRequest:
    settings: SelectSettings
    metric: str
    higher_is_better: bool
    name: str  # of the function
    # "train", and optionally "evaluate" of an adapter in the task's folder, which the deployment rank needs
    functions: Mapping[str, TrainFunction]
    evaluates_base: bool

    def prepare(self, folder: RunFolder, journal: Sequence[JournalRecord]) -> PreparedSelection:
        settings = self.settings
        steps = settings.max_steps or 0
        space = replace(
            build_space(settings, steps),
            can_stop_early=False,
            evaluates_base=self.evaluates_base,
            can_truncate="evaluate" in self.functions,
            criterion=Criterion(self.metric, self.higher_is_better, settings.margin),
        )
        return _CustomTrainerSelection(
            request=self,
            started=self._build_start_record(settings, journal, steps),
            settings=settings,
            steps=steps,
            strategy=make_strategy(settings.strategy, space),
            owns_working_folders=False,
            advice="give another range of learning rates, and a new out",
        )

    def _build_start_record(self, settings: SelectSettings, journal: Sequence[JournalRecord], steps: int) -> RunStarted:
        identity = {
            "trainer": self.name,
            "steps": steps,
            "metric": self.metric,
            "higher_is_better": self.higher_is_better,
        }
        values: dict[str, Any] = {"model": None, "data": None, **identity}
        values |= settings.model_dump(mode="json", include=settings.model_fields_set - {"max_steps"})
        original_settings = journal[0].settings if journal and isinstance(journal[0], RunStarted) else {}
        system = f"{platform.system()} {platform.machine()}"
        return RunStarted.build(
            "custom_trainer",
            values,
            {"settings": select_identity_settings(values, original_settings)},
            environment={"python": platform.python_version(), "system": system, "device": "the trainer's own"},
            data=DataSummary(form="custom", splits={}, splits_given=False, duplicates_across_splits=0),
            evaluation_examples=[],
            metric=self.metric,
            higher_is_better=self.higher_is_better,
        )


def select_rank_with(
    train: TrainFunction,
    out: str | Path,
    *,
    ranks: Sequence[int] | int = (0, 1, 4, 16, 64),
    learning_rates: Sequence[float] | float | None = None,
    seeds: Sequence[int] | int = (0,),
    metric: str = "loss",
    margin: Margin | None = None,
    evaluate: EvaluateFunction | None = None,
    goal: Goal = "training-rank",
    strategy: str = "grid",
    lora_alpha: float = 32.0,
    max_steps: int | None = None,
    callbacks: Sequence[Hook] = (),
    progress: bool = False,
) -> Selected:
    """Find the rank with your own training function: DPO, RL, diffusion, vision, any script.

    Args:
        train: called with a `TrialTask`; returns a mapping of held-out metrics or a `TrialResult`. It is also called for the base
            if 0 is among the ranks, as by default; if it raises an error for rank 0, the result says that the base was not measured.
            With `example_scores` in the result (the same examples in every trial) ranks are compared example by example, which
            resolves far smaller differences. `task.report(step, value, example_scores)` reports values during the training. All
            randomness must come from `task.seed`, so that trainings differ only in their rank.
        out: the run folder. A second call with the same arguments resumes; failed trials run again.
        learning_rates: those to compare; None walks from .0003 and .001 to where the metric gets worse, with whole trainings of the largest
            rank (of the smallest with strategy "upward").
        seeds: the seeds of the trainings.
        metric: the name of the deciding metric, after `max:` or `min:` if its direction is not known from the name
            (`accuracy`, `reward`, `loss`, … are known).
        margin: the loss of quality that you accept: a share of the gain over rank 0 such as "2%", or a number in the metric's unit;
            None for 1% of the gain. A metric that is neither a loss nor a share of right answers needs rank 0 or a number.
        evaluate: called with a PEFT adapter folder and a `TrialTask`; returns the same as `train`. With it, the adapter that
            `train` saved for the largest rank is truncated to every lower rank, and the smallest one within the margin is
            exported (the deployment rank).
        goal: "adapter" stops at the deployment rank and needs `evaluate`; "training-rank" continues to the training rank.
        lora_alpha: passed to `train` in the task, and recorded for the adapters.
        max_steps: passed to `train` in the task as `steps`; None lets the function choose the length.
        callbacks: hooks that watch the selection and can stop it, such as `rightrank.runs.trackers.Trackers`.
        progress: show the progress on stderr.

    Raises:
        InputError: an argument that is not allowed, a metric without a known direction, or a folder made with other settings.
        AllTrialsFailedError: fewer than two ranks have a result.
        InterruptedRun: `should_stop` of a callback returned True.
    """
    values = {"ranks": ranks, "learning_rates": learning_rates, "seeds": seeds, "margin": margin, "goal": goal}
    values |= {"strategy": strategy, "lora_alpha": lora_alpha, "max_steps": max_steps}
    request = build_custom_request(train, evaluate, metric, values)
    folder = RunFolder(Path(out))
    with folder.lock(), report_disk_errors(folder.path), ExitStack() as stack:
        views = [stack.enter_context(View())] if progress else []
        return select(request.prepare, folder, [*views, Report(), *callbacks])


def build_custom_request(
    train: TrainFunction, evaluate: EvaluateFunction | None, metric: str, values: Mapping[str, Any]
) -> CustomTrainerRequest:
    """Validate the arguments and build the request.

    Args:
        metric: the name, after `max:` or `min:` if its direction is not known.
        values: settings of the selection.

    Raises:
        SettingsError: an argument that is not allowed, or a metric without a known direction.
    """
    ranks, evaluates_base = values["ranks"], False
    if isinstance(ranks, Sequence) and len(ranks) > 1 and 0 in ranks:
        values, evaluates_base = {**values, "ranks": [rank for rank in ranks if rank]}, True
    settings = SelectSettings(**values, checkpoint="last")  # the trainer's adapter is that of its last step
    make_strategy(settings.strategy, build_space(settings, 1))  # an unknown name is refused first
    direction, _, name = metric.partition(":")
    higher = {"max": True, "min": False}.get(direction) if name else infer_direction(metric)
    if higher is None:
        raise SettingsError(f"{format_unknown_direction(metric)}; give metric='max:{metric}' or 'min:{metric}'")
    if requires_base(settings.margin, infer_metric_kind(name or metric, higher)) and not evaluates_base:
        raise SettingsError(f"margin: {MISSING_BASE}")
    if settings.goal != "training-rank" and evaluate is None:
        raise SettingsError(
            f"goal {settings.goal!r} needs evaluate=, a function that takes an adapter folder and a TrialTask and returns held-out scores; "
            "give it, or goal 'training-rank'"
        )
    if settings.goal == "best-adapter" and settings.max_steps is None:
        raise SettingsError("goal 'best-adapter' trains for twice the steps: give max_steps, or goal 'adapter'")
    for label, function in (("train", train), ("evaluate", evaluate)):
        if function is not None and not callable(function):
            raise SettingsError(f"{label}: got {type(function).__name__}; give a function")
    functions: dict[str, TrainFunction] = {"train": train}
    if evaluate is not None:
        functions["evaluate"] = lambda task: evaluate(task.folder, task)
    trainer = f"{getattr(train, '__module__', '?')}.{getattr(train, '__qualname__', type(train).__name__)}"
    return CustomTrainerRequest(settings, name or metric, higher, trainer, functions, evaluates_base)


@dataclass(frozen=True, kw_only=True)
class _CustomTrainerSelection(PreparedSelection):
    request: CustomTrainerRequest

    def open_executor(
        self, folder: RunFolder, listener: Listener, records: Records
    ) -> AbstractContextManager[Executor]:
        return nullcontext(_FunctionExecutor(self.request, folder, listener, records))


class _FunctionExecutor:
    """Runs trials by calling a function. An error in the function fails the trial and not the run.

    A result that can't be used ends the run at once, unless the same function has returned a valid one before.
    """

    def __init__(self, request: CustomTrainerRequest, folder: RunFolder, listener: Listener, records: Records) -> None:
        self._request, self._folder, self._listener, self._records = request, folder, listener, records
        self._first_fault: str | None = None  # the description of the first result that can't be used

    def run(self, trials: Sequence[Trial], base_loss: float | None) -> Iterator[TrialOutcome]:
        request = self._request
        kind = infer_metric_kind(request.metric, request.higher_is_better)
        needs_base = requires_base(request.settings.margin, kind)
        for ended, trial in enumerate(trials, 1):
            self._listener.on_event(TrialStarted(**trial.fields))
            outcome = self._run_trial(trial)
            if outcome.rank == 0 and needs_base and not isinstance(outcome, TrialFinished):
                raise SettingsError(f"rank 0: {outcome.reason}; {MISSING_BASE}")
            yield outcome
            if self._first_fault is not None:
                raise AllTrialsFailedError(
                    f"{self._first_fault}; finished trials are kept: correct the function, and call again with the same arguments"
                )
            if self._listener.should_stop():
                raise InterruptedRun(f"stopped after {ended} trials")

    def _run_trial(self, trial: Trial) -> TrialOutcome:
        arm, metric, folder = trial.arm, self._request.metric, self._folder.get_trial_folder(trial.trial_id)
        name = "train" if arm.truncate_from is None else "evaluate"

        def receive(point: EvalPoint) -> None:
            fields = point.model_dump(exclude={"train_value", "mean_value"})
            self._listener.on_event(TrialEvaluated(trial_id=trial.trial_id, **fields))

        fields = arm.model_dump(include={"rank", "learning_rate", "lora_alpha", "seed", "steps"})
        task = TrialTask(trial_id=trial.trial_id, folder=folder, report_callback=receive, **fields)
        finished, start = self._records.list_finished(), time.perf_counter()
        examples = next((len(earlier.example_scores) for earlier in finished if earlier.example_scores), None)
        try:
            if arm.truncate_from is not None:
                shutil.rmtree(folder, ignore_errors=True)
                write_truncation(open_adapter(self._folder.get_trial_folder(arm.truncate_from)), folder, arm.rank)
            folder.mkdir(parents=True, exist_ok=True)
            result = parse_result(call_function(self._request.functions[name], task, metric), metric, examples)
        except NotFiniteError as error:
            points = self._records.evaluations.get(trial.trial_id)
            return TrialDiverged(**trial.fields, step=points[-1].step if points else 0, reason=f"{name} {error}")
        except RightrankError as error:  # an `InputError`: there is no adapter that can be truncated
            reason = str(error) if isinstance(error, InputError) else f"{name} {error}"
            has_worked = any(
                (trained.arm.truncate_from is None) == (name == "train") for trained in finished if trained.rank
            )
            # A function that does not support rank 0 may be correct for all other ranks.
            if isinstance(error, ReportError) and arm.rank > 0 and not has_worked:
                self._first_fault = reason
            return TrialFailed(**trial.fields, error="error", reason=reason)

        # Returned points replace reported ones.
        by_step = {point.step: point for point in (*self._records.evaluations.get(trial.trial_id, []), *result.points)}
        returned = dict(result) | {
            "train_seconds": time.perf_counter() - start,
            "points": [by_step[step] for step in sorted(by_step)],
        }
        return TrialFinished(**trial.fields, **returned, value=result.metrics[metric])


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
        if error.title not in ("TrialResult", "EvalPoint"):
            raise _report_exception(error) from error
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "its fields"
        kind = NotFiniteError if first["type"] == "finite_number" else ReportError
        raise kind(
            f"gave {field} = {quote_value(first['input'])}: {first['msg']}; the fields: {', '.join(TrialResult.model_fields)}"
        ) from error
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
    has_wrong_weights = weights is not None and (len(weights) != len(scores or ()) or min(weights) <= 0)
    if has_wrong_weights or (groups is not None and len(groups) != len(scores or ())):
        raise ReportError(
            "returned example_weights or example_groups that do not match example_scores; return one weight above 0 and one number of a "
            "group for each example"
        )
    return returned


def causal_example_losses(model: Any, batches: Iterable[Mapping[str, Any]]) -> TrialResult:
    """Return the result of a task for a causal language model: the mean loss per label token, in nats, of each example, and `loss` over all.

    An example is weighted by its number of label tokens. Examples without label tokens are left out.

    Args:
        model: a causal language model; its training mode is restored.
        batches: collated as for training: `input_ids` and `labels` of shape (batch, length), with labels -100 for tokens
            without a loss.
    """
    from rightrank.trainers.measurement import InMemoryAdapter

    was_training = model.training
    model.eval()
    scores = InMemoryAdapter(model, list(batches)).score()
    model.train(was_training)
    means = [loss / count for loss, count in zip(scores.losses, scores.tokens, strict=True)]
    return TrialResult(metrics={"loss": scores.loss}, example_scores=means, example_weights=scores.tokens)
