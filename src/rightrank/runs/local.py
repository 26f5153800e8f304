"""A selection whose base and data are loaded in this process: what is to be done, what scores adapters, and what trains them here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rightrank.decision.records import Records
from rightrank.runs.executor import Executor, Plan
from rightrank.runs.folder import RunFolder
from rightrank.runs.plugins import MemoryPlan, merged
from rightrank.runs.values import Request
from rightrank.schema.events import Listener, TestEvaluated
from rightrank.schema.trials import SplitName, Trial, TrialFinished, TrialOutcome
from rightrank.train.evaluation import Measured, Scores
from rightrank.train.loop import train_trials
from rightrank.train.metrics import measure
from rightrank.train.pace import adapters_per_pass_for
from rightrank.train.runtime import Runtime, adapter_attached
from rightrank.train.trial import TrialFolders


@dataclass(frozen=True, kw_only=True)
class Prepared(Plan):
    """What is to be done with a base and data that are loaded."""

    request: Request  # as it is resumed
    runtime: Runtime
    planned: MemoryPlan | None  # None: an architecture that can't be planned
    top_origin: str  # where the highest rank comes from, in words

    @property
    def base_identity(self) -> bytes:
        return self.runtime.loaded.identity.content()

    @contextmanager
    def workplace(self, folder: RunFolder, listener: Listener, records: Records) -> Iterator[Executor]:
        """This process, or the workers that the settings name."""
        if self.settings.executor == "local":
            yield LocalExecutor(self.runtime, folder, listener, self.planned)
            return
        with merged(lambda plugin: plugin.executors)[self.settings.executor](self, folder, listener) as executor:
            yield executor

    def peak_of(self, ranks: Sequence[int]) -> int | None:
        return None if self.planned is None else self.planned.peak_of(ranks)

    def scored(self, trial: TrialFinished, adapter: Path | None) -> TrialFinished:
        scores, measured = self._evaluated("selection", adapter)
        values = scores.metrics | measured.values
        value = values.get(trial.value_metric or self.started.metric, scores.loss)
        changes = {"value": value, "metrics": values, "failed_metrics": measured.failed}
        return trial.model_copy(update=scores.fields(measured) | changes)

    def tested(self, trial: TrialFinished, adapter: Path | None) -> TestEvaluated | None:
        if not self.runtime.data.splits["test"]:
            return None
        scores, measured = self._evaluated("test", adapter)
        metric = self.started.metric
        measured.require([metric])
        values = scores.metrics | measured.values
        return TestEvaluated(
            trial_id=trial.trial_id,
            rank=trial.rank,
            value=values.get(metric, scores.loss),
            metric=None if metric in values else "loss",
            metrics=values,
            **scores.fields(Measured()),
        )

    def _evaluated(self, split: SplitName, adapter: Path | None) -> tuple[Scores, Measured]:
        with adapter_attached(self.runtime, adapter):
            return self.runtime.evaluate(split), measure(self.runtime, split)


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
        yield from train_trials(self._runtime, base, base_loss, self._folders, self._listener)
        if not trained:
            return
        if not self._is_prepared:
            self._runtime.prepare(self._listener.on_event, self._listener.should_stop)
            self._is_prepared = True
        arms = [trial.arm for trial in trained]
        largest = self._planned.max_adapters_per_pass if self._planned else None
        size = adapters_per_pass_for(self._runtime, arms, self._listener.notice, largest)
        yield from train_trials(self._runtime, trained, base_loss, self._folders, self._listener, size)

    def _folders(self, trial: Trial) -> TrialFolders:
        arm, folder = trial.arm, self._folder
        parent = arm.truncate_from
        return TrialFolders(
            folder.checkpoint(trial.trial_id),
            folder.trial_adapter(trial.trial_id),
            None if arm.continue_from is None else folder.checkpoint(arm.continue_from),
            None if parent is None else folder.trial_adapter(parent),
            None if parent is None else folder.checkpoint(parent).with_suffix(".moments.safetensors"),
            folder.answers(trial.trial_id),
        )
