"""A selection whose base and data are loaded in this process, and the executor that trains here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rightrank.decision.records import Records
from rightrank.runs.executor import Executor, PreparedSelection
from rightrank.runs.folder import RunFolder
from rightrank.runs.plugins import MemoryPlan, collect_mapping
from rightrank.runs.values import SelectionInputs
from rightrank.schema.events import Listener, TestEvaluated
from rightrank.schema.trials import SplitName, Trial, TrialFinished, TrialOutcome
from rightrank.train.evaluation import MetricResults, Scores
from rightrank.train.loop import train_trials
from rightrank.train.metrics import measure_metrics
from rightrank.train.pace import choose_adapters_per_pass
from rightrank.train.runtime import Runtime, attach_adapter
from rightrank.train.trial import TrialFolders


@dataclass(frozen=True, kw_only=True)
class LoadedSelection(PreparedSelection):
    """A prepared selection whose base and data are loaded."""

    request: SelectionInputs  # with the settings with which the run began
    runtime: Runtime
    planned: MemoryPlan | None  # None: the memory of this architecture can't be planned
    top_origin: str  # why the highest rank was chosen, in words

    @property
    def base_identity(self) -> bytes:
        return self.runtime.loaded.identity.to_json()

    @contextmanager
    def open_executor(self, folder: RunFolder, listener: Listener, records: Records) -> Iterator[Executor]:
        """Open the executor of this process, or the one that the settings name."""
        if self.settings.executor == "local":
            yield LocalExecutor(self.runtime, folder, listener, self.planned)
            return
        with collect_mapping(lambda plugin: plugin.executors)[self.settings.executor](
            self, folder, listener
        ) as executor:
            yield executor

    def predict_peak_bytes(self, ranks: Sequence[int]) -> int | None:
        return None if self.planned is None else self.planned.predict_peak_bytes(ranks)

    def score_trial(self, trial: TrialFinished, adapter: Path | None) -> TrialFinished:
        scores, measured = self._evaluate_adapter("validation", adapter)
        values = scores.metrics | measured.values
        value = values.get(trial.value_metric or self.started.metric, scores.loss)
        changes = {"value": value, "metrics": values, "failed_metrics": measured.failures}
        return trial.model_copy(update=scores.to_record_fields(measured) | changes)

    def evaluate_test_split(self, trial: TrialFinished, adapter: Path | None) -> TestEvaluated | None:
        if not self.runtime.data.splits["test"]:
            return None
        scores, measured = self._evaluate_adapter("test", adapter)
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

    def _evaluate_adapter(self, split: SplitName, adapter: Path | None) -> tuple[Scores, MetricResults]:
        with attach_adapter(self.runtime, adapter):
            return self.runtime.evaluate(split), measure_metrics(self.runtime, split)


@dataclass(slots=True)
class LocalExecutor:
    """The executor of a single process. Errors other than running out of memory propagate with their traceback."""

    _runtime: Runtime
    _folder: RunFolder
    _listener: Listener
    _planned: MemoryPlan | None = None
    _is_prepared: bool = False

    def run(self, trials: Sequence[Trial], base_loss: float | None) -> Iterator[TrialOutcome]:
        base = [trial for trial in trials if trial.arm.rank == 0]
        trained = [trial for trial in trials if trial.arm.rank > 0]
        yield from train_trials(self._runtime, base, base_loss, self._get_trial_folders, self._listener)
        if not trained:
            return
        if not self._is_prepared:
            self._runtime.prepare(self._listener.on_event, self._listener.should_stop)
            self._is_prepared = True
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
