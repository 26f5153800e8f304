"""Prepare a selection in this process and train its trials: load data and base, determine the ranks, compute the run's identity.

Preparing the same request again, here or in another process, gives an equal runtime and the same identity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from rightrank.bases.base_models import (
    DTYPES,
    LoadedModel,
    adopt_model,
    align_labels,
    build_meta_model,
    load_base,
    load_model_config,
    resolve_dtype,
)
from rightrank.data.forms import DataForm
from rightrank.data.hub import pin_revision
from rightrank.data.splits import DataSplits, load_data
from rightrank.evaluation.answers import measure_metrics, require_metric_functions
from rightrank.evaluation.attached_adapters import attach_adapter
from rightrank.evaluation.device import describe_environment
from rightrank.evaluation.scores import MetricResults
from rightrank.evaluation.tokens import EncodedData, encode_splits
from rightrank.planning.planner import MemoryPlan, plan_loaded
from rightrank.runs.folder import RunFolder
from rightrank.runs.selection import Executor, PreparedSelection, SelectionRequest
from rightrank.schema.errors import SettingsError
from rightrank.schema.events import JournalRecord, Listener, Records, RunStarted, TestEvaluated
from rightrank.schema.settings import SelectSettings, select_identity_settings
from rightrank.schema.trials import Trial, TrialFinished, TrialOutcome
from rightrank.search.protocol import build_space
from rightrank.search.strategies import make_strategy
from rightrank.training.loop import TrialFolders, train_trials
from rightrank.training.pace import choose_adapters_per_pass
from rightrank.training.runtime import Runtime, build_runtime
from rightrank.training.targets import Targets, find_targets

Notice: TypeAlias = Callable[[str], None]
OpenWorkers: TypeAlias = Callable[["LoadedSelection", RunFolder, Listener], AbstractContextManager[Executor]]

METRIC_DATA_FORMS = (  # kind of metric, the form of data that it needs, and the columns of that form
    ("classes", "classification", "`text` and `label`"),
    ("pairs", "preference", "`prompt`, `chosen` and `rejected`"),
)


@dataclass(frozen=True, kw_only=True)
class LoadedSelection(PreparedSelection):
    """A prepared selection whose base and data are loaded."""

    request: SelectionRequest  # with the settings with which the run began
    runtime: Runtime
    planned: MemoryPlan | None  # None: the memory of this architecture can't be planned
    open_workers: OpenWorkers | None = None  # None: this process trains

    @property
    def base_identity(self) -> bytes:
        return self.runtime.loaded.identity.to_json()

    @contextmanager
    def open_executor(self, folder: RunFolder, listener: Listener, records: Records) -> Iterator[Executor]:
        """Open the executor of this process, or that of the workers."""
        if self.open_workers is None:
            yield LocalExecutor(self.runtime, folder, listener, self.planned)
            return
        with self.open_workers(self, folder, listener) as executor:
            yield executor

    def evaluate_test_split(self, trial: TrialFinished, adapter: Path | None) -> TestEvaluated | None:
        if not self.runtime.data.splits["test"]:
            return None
        evaluator = self.runtime.evaluator
        with attach_adapter(evaluator, adapter):
            scores = evaluator.evaluate("test")
            measured = measure_metrics(evaluator, "test")
        metric = self.started.metric
        measured.require_values([metric])
        values = scores.metrics | measured.values
        return TestEvaluated(
            trial_id=trial.trial_id,
            rank=trial.rank,
            value=values.get(metric, scores.loss),
            metric=None if metric in values else "loss",
            metrics=values,
            **scores.to_record_fields(MetricResults()),
        )


@dataclass(slots=True)
class LocalExecutor:
    """The executor of a single process. Errors other than running out of memory propagate with their traceback."""

    _runtime: Runtime
    _folder: RunFolder
    _listener: Listener
    _planned: MemoryPlan | None = None

    def run(self, trials: Sequence[Trial], base_loss: float | None) -> Iterator[TrialOutcome]:
        base = [trial for trial in trials if trial.arm.rank == 0]
        trained = [trial for trial in trials if trial.arm.rank > 0]
        yield from train_trials(self._runtime, base, base_loss, self._get_trial_folders, self._listener)
        if not trained:
            return
        self._runtime.prepare(self._listener.on_event, self._listener.should_stop)  # computes what is missing
        arms = [trial.arm for trial in trained]
        largest = self._planned.max_adapters_per_pass if self._planned else None
        size = choose_adapters_per_pass(self._runtime, arms, self._listener.send_notice, largest)
        yield from train_trials(self._runtime, trained, base_loss, self._get_trial_folders, self._listener, size)

    def _get_trial_folders(self, trial: Trial) -> TrialFolders:
        arm, folder = trial.arm, self._folder
        parent = arm.truncate_from
        return TrialFolders(
            folder.get_checkpoint_path(trial.trial_id),
            folder.get_trial_folder(trial.trial_id),
            None if arm.continue_from is None else folder.get_checkpoint_path(arm.continue_from),
            None if parent is None else folder.get_trial_folder(parent),
            None if parent is None else folder.get_checkpoint_path(parent).with_suffix(".moments.safetensors"),
            folder.get_answers_path(trial.trial_id),
        )


def prepare_selection(
    request: SelectionRequest,
    cache: Path,
    announce: Notice = lambda _: None,
    open_workers: OpenWorkers | None = None,
) -> LoadedSelection:
    """Load the base, encode the data, and plan the memory.

    Args:
        cache: the folder for files on disk that all arms share.
        announce: receives what is being done, before each step that takes long.
        open_workers: opens the executor of other processes; None trains in this one.

    Raises:
        InputError: model, data or settings can't be used.
    """
    request = _resolve_auto_dtype(request)
    splits, loaded, encoded, targets = _load_sources(request, cache.parent, announce)
    held_out = request.settings.compute_max_eval_examples(len(splits.examples["train"]))
    settings = request.settings.model_copy(update={"max_eval_examples": held_out})
    classes = len(splits.summary.classes or ()) if encoded.is_classification else None
    notes: list[str] = []
    planned = plan_loaded(loaded, encoded, classes, settings, notes.append)
    if planned is None:
        targets = None  # without a plan the ranks are checked on the model
    else:
        settings = settings.model_copy(update={"ranks": planned.ranks})  # the ranks that fit
    steps = settings.count_training_steps(len(encoded.splits["train"]))
    announce("checking the base model on a few examples")
    runtime = build_runtime(loaded, encoded, settings, steps, cache, targets)
    reason = runtime.targets.untruncatable_reason
    if reason is not None and settings.goal != "training-rank":
        raise SettingsError(
            f"goal {settings.goal!r} needs adapters that can be truncated ({reason}); give goal 'training-rank'"
        )
    space = build_space(settings, steps, encoded.summary.loss_kind, loaded.model.num_parameters())
    return LoadedSelection(
        request=request,
        runtime=runtime,
        settings=settings,
        steps=steps,
        started=_build_start_record(request, runtime, splits.fingerprint),
        planned=planned,
        notes=tuple(notes),
        open_workers=open_workers,
        strategy=make_strategy(settings.strategy, replace(space, can_truncate=reason is None)),
    )


def prepare_run(
    request: SelectionRequest,
    folder: RunFolder,
    journal: Sequence[JournalRecord],
    *,
    open_workers: OpenWorkers | None = None,
    announce: Notice = lambda _: None,
) -> LoadedSelection:
    """Prepare a run that may have begun in `folder`, with the settings with which it began; see `rightrank.runs.selection.Prepare`.

    Args:
        open_workers: opens the executor of other processes; None trains in this one.
        announce: receives what is being done, before each step that takes long.
    """
    first = journal[0] if journal else None
    request = _pin_data(request, first.data_name if isinstance(first, RunStarted) else None)
    if isinstance(first, RunStarted):
        settings = request.settings
        if "dtype" not in settings.model_fields_set:  # the type that `auto` selected at the beginning
            settings = settings.model_copy(update={"dtype": first.select_settings.dtype})
        request = replace(request, settings=settings, original_settings=first.settings)
    return prepare_selection(request, folder.cache, announce, open_workers)


def _pin_data(request: SelectionRequest, recorded: str | None) -> SelectionRequest:
    """Return the request with the revision of a data set on the hub, that of the recorded name if the run has begun."""
    if not isinstance(request.data, str | Path):
        return request
    return replace(request, data=pin_revision(str(request.data), request.settings.data_config, recorded))


def _resolve_auto_dtype(request: SelectionRequest) -> SelectionRequest:
    """Return the request with the type that `auto` selects on this device; a model in memory keeps its own."""
    settings = request.settings
    if isinstance(request.model, str):
        dtype = resolve_dtype(settings.dtype, settings.device)
    else:
        model_dtype = str(getattr(request.model, "dtype", "")).removeprefix("torch.")
        dtype = (
            model_dtype if settings.dtype == "auto" and model_dtype in DTYPES else resolve_dtype(settings.dtype, "cpu")
        )
    return replace(request, settings=settings.model_copy(update={"dtype": dtype}))


def _load_sources(
    request: SelectionRequest, folder: Path, announce: Notice
) -> tuple[DataSplits, LoadedModel, EncodedData, Targets | None]:
    """Load data and base, and find the targets of a model that is given by name."""
    settings = request.settings
    require_metric_functions(settings)
    if isinstance(request.model, str) and request.tokenizer is not None:
        raise SettingsError("tokenizer: a model that is given by name has its own tokenizer; leave tokenizer out")
    announce(f"reading {request.data_name}")
    data = Path(request.data) if isinstance(request.data, str) else request.data
    splits = load_data(data, settings, folder)
    if splits.summary.classes is not None and hasattr(request.model, "config"):
        labels = align_labels(request.model.config, splits.summary.classes)
        splits = replace(splits, summary=splits.summary.model_copy(update={"classes": labels}))
    _require_metrics_fit(settings, splits.form)
    targets = _find_targets(request.model, splits, settings) if isinstance(request.model, str) else None
    announce(f"loading {request.model_name}")
    if isinstance(request.model, str):
        loaded = load_base(request.model, settings, splits.summary.classes)
    else:
        loaded = adopt_model(request.model, request.tokenizer, settings.device, splits.summary.classes)
    return splits, loaded, encode_splits(splits, loaded, settings, folder), targets


def _find_targets(model: str, splits: DataSplits, settings: SelectSettings) -> Targets:
    """Find the targets from the modules that the configuration builds, so that errors come before any weight is read."""
    classification = splits.form == "classification"
    trusted, count = settings.trust_remote_code, len(splits.summary.classes or ()) if classification else None
    skeleton = build_meta_model(load_model_config(model, trusted, classification), trusted, count)
    has_given_ranks = "ranks" in settings.model_fields_set  # the plan leaves out default ranks that a matrix can't have
    return find_targets(
        skeleton, settings if has_given_ranks else settings.model_copy(update={"ranks": ()}), classification
    )


def _require_metrics_fit(settings: SelectSettings, form: DataForm) -> None:
    """Refuse metrics that can't be computed on data of this form."""
    for spec in settings.metric_specs:
        for kind, needed, columns in METRIC_DATA_FORMS:
            if spec.kind == kind and form != needed:
                raise SettingsError(
                    f"metric {spec.name!r} needs {columns}, but the data has the form {form!r}: give metric 'loss'"
                )
        if form == "text" and not spec.is_eval_metric:
            raise SettingsError(
                f"metric {spec.name!r} needs text that the model generates for a prompt, but the data has the form {form!r}: "
                "give `prompt` and `completion`, or metric 'loss'"
            )


def _build_start_record(request: SelectionRequest, runtime: Runtime, data_fingerprint: str) -> RunStarted:
    settings, loaded, encoded = runtime.settings, runtime.loaded, runtime.data
    values = {"model": request.model_name, "data": request.data_name, **settings.model_dump(mode="json")}
    identity = {
        "settings": select_identity_settings(values, request.original_settings or {}),
        "model": loaded.fingerprint,
        "data": data_fingerprint,
        "steps": runtime.steps,
    }
    return RunStarted.build(
        "selection",
        values,
        identity,
        environment=describe_environment(str(loaded.device)),
        data=encoded.summary,
        evaluation_examples=[example.example_id for example in encoded.splits["validation"]],
        metric=settings.metric_name,
        higher_is_better=settings.is_higher_better(settings.metric_name),
        points_metric=settings.points_metric if settings.points_metric != settings.metric_name else None,
    )
