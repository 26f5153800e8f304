"""The training loop: trains trials with up to `adapters_per_pass` adapters on one base, each step in one pass.

An arm that finishes, diverges or stops early leaves the base, and the next one joins. When a pass runs out of memory, half
of the arms write a checkpoint and wait while the others continue; results do not change. An arm that runs out of memory
alone is retried once from its last step, then ends as `out_of_memory`. The checkpoint of a finished trial is deleted when
the caller asks for the next outcome, because only then has the caller stored this one.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from rightrank.schema.errors import InterruptedRun, MetricError, first_line
from rightrank.schema.events import Listener, Notice
from rightrank.schema.trials import Trial, TrialFailed, TrialFinished, TrialOutcome, TrialStarted
from rightrank.train.adapter import TrialFolders
from rightrank.train.covariances import ensure_moments
from rightrank.train.device import PeakMemory, free_memory, is_recoverable_oom
from rightrank.train.evaluation import Scores
from rightrank.train.generation import measure
from rightrank.train.multi_lora import MultiLora
from rightrank.train.runtime import Runtime
from rightrank.train.trial import ArmTraining, Diverged, Evaluation, Progress, adapter_name, finished

Ended = dict[str, TrialOutcome]  # outcomes of trials that ended without a result, by trial id


def step_all(runtime: Runtime, multi_lora: MultiLora, trainings: Sequence[ArmTraining]) -> Ended:
    """One optimizer step of every training, with one pass over the base per micro-batch.

    The trainings share the wall time evenly. Returns the outcomes of those that end in the step without a result.
    """
    begun = time.perf_counter()
    batches = [training.micro_batches() for training in trainings]
    for micro in zip(*batches, strict=True):
        arm_batches = [training.arm_batch(batch) for training, batch in zip(trainings, micro, strict=True)]
        for training, losses in zip(trainings, runtime.accumulate_gradients(multi_lora, arm_batches), strict=True):
            training.add_losses(float(losses.sum()))
    for training in trainings:
        training.update()
    ended: Ended = {}
    seconds = (time.perf_counter() - begun) / len(trainings)
    for training in trainings:
        try:
            training.end_step(seconds)
        except Diverged as reason:
            ended[training.trial.trial_id] = reason.outcome()
    due = [t for t in trainings if t.wants_evaluation and t.trial.trial_id not in ended]
    return ended | (evaluate_all(runtime, multi_lora, due) if due else {})


def evaluate_all(
    runtime: Runtime, multi_lora: MultiLora, trainings: Sequence[ArmTraining], retry: bool = True
) -> Ended:
    """Held-out scores of every training; returns the outcomes of those that end without a result.

    On running out of memory each half is evaluated in its own pass, and a single training is retried once.
    """
    begun = time.perf_counter()
    try:
        all_scores = runtime.evaluate_adapters("selection", multi_lora, [training.adapter for training in trainings])
    except (RuntimeError, MemoryError) as error:
        if not is_recoverable_oom(error):
            raise
        reason = first_line(error)
    else:
        return _take_scores(trainings, all_scores, (time.perf_counter() - begun) / len(trainings))
    # Outside the `except` block, whose traceback keeps the tensors of the failed pass.
    if len(trainings) > 1:
        half = len(trainings) // 2
        return evaluate_all(runtime, multi_lora, trainings[:half]) | evaluate_all(runtime, multi_lora, trainings[half:])
    if retry:
        free_memory(runtime.loaded.device)
        return evaluate_all(runtime, multi_lora, trainings, retry=False)
    trial = trainings[0].trial
    return {trial.trial_id: out_of_memory(trial, runtime, reason)}


def _take_scores(trainings: Sequence[ArmTraining], all_scores: Sequence[Scores], seconds: float) -> Ended:
    ended: Ended = {}
    for training, scores in zip(trainings, all_scores, strict=True):
        try:
            training.take_scores(scores, seconds)
        except Diverged as reason:
            ended[training.trial.trial_id] = reason.outcome()
    return ended


def out_of_memory(trial: Trial, runtime: Runtime, reason: str) -> TrialFailed:
    return TrialFailed(
        **trial.fields,
        error="out_of_memory",
        reason=f"{trial.arm.label()} ran out of memory on {runtime.loaded.device}: {reason}",
    )


Folders = Callable[[Trial], TrialFolders]


def run_trial(
    runtime: Runtime, trial: Trial, base_loss: float | None, folders: TrialFolders, listener: Listener
) -> TrialOutcome:
    """Train one trial alone, or evaluate the base for rank 0; see `train_trials`."""
    return next(train_trials(runtime, [trial], base_loss, lambda _: folders, listener))


def train_trials(
    runtime: Runtime,
    trials: Sequence[Trial],
    base_loss: float | None,
    folders: Folders,
    listener: Listener,
    adapters_per_pass: int = 1,
) -> Iterator[TrialOutcome]:
    """Yield outcomes in the order in which the trials end, after saving the adapter of each finished one.

    Closing the iterator early writes a checkpoint of every running arm.

    Args:
        trials: the trials to train; rank 0 evaluates the base.
        base_loss: the base's held-out loss, by which divergence is judged; None only for the base itself.
        adapters_per_pass: the largest number of adapters in one pass.

    Raises:
        InterruptedRun: the listener asked to stop; checkpoints were written.
        MetricError: the deciding metric gave no score.
    """
    for trial in trials:
        if trial.arm.rank == 0:
            listener.on_event(started(trial))
            yield evaluate_base(runtime, trial, folders(trial))
    trained = [trial for trial in trials if trial.arm.rank > 0]
    for trial in trained:
        found = folders(trial)
        if found.truncate_from is not None and found.moments is not None:
            for notice in ensure_moments(runtime, trial.arm, found.truncate_from, found.moments):
                listener.on_event(Notice(text=notice))
    if trained:
        with MultiLora(runtime.model, runtime.settings) as multi_lora, runtime.recomputing():
            yield from _TrainingLoop(runtime, multi_lora, base_loss, folders, listener, adapters_per_pass).run(trained)


def evaluate_base(runtime: Runtime, trial: Trial, folders: TrialFolders) -> TrialFinished:
    """Rank 0: the base itself. A metric that fails here would fail for every arm, so the error is raised.

    Raises:
        MetricError: a metric failed.
    """
    memory, begun = PeakMemory(runtime.loaded.device), time.perf_counter()
    scores = runtime.evaluate("selection")
    evaluated = time.perf_counter()
    measured = measure(runtime, "selection", folders.answers)
    measured.require(list(measured.failed))
    ended = time.perf_counter()
    progress = Progress(eval_seconds=ended - begun, answer_seconds=ended - evaluated)
    return finished(trial, runtime, progress, Evaluation(scores, measured), 0, memory.peak_bytes(), [0])


class _TrainingLoop:
    """The running arms and the waiting trials."""

    def __init__(
        self,
        runtime: Runtime,
        multi_lora: MultiLora,
        base_loss: float | None,
        folders: Folders,
        listener: Listener,
        adapters_per_pass: int,
    ) -> None:
        self._runtime = runtime
        self._device = runtime.loaded.device
        self._multi_lora = multi_lora
        self._base_loss = base_loss
        self._folders = folders
        self._listener = listener
        self._limit = adapters_per_pass
        self._waiting: deque[Trial] = deque()
        self._running: list[ArmTraining] = []
        self._started: set[str] = set()
        self._retried: set[str] = set()  # ids of trials that ran out of memory alone once

    def run(self, trials: Sequence[Trial]) -> Iterator[TrialOutcome]:
        self._waiting.extend(by_seed(trials))
        memory = PeakMemory(self._device)
        try:
            while self._waiting or self._running:
                before = len(self._running)
                yield from self._start_waiting()
                if len(self._running) > before:
                    memory.restart()
                yield from self._finish_done(memory)  # arms resumed at their last step
                if self._running:
                    yield from self._step()
                    yield from self._finish_done(memory)
                self._checkpoint_due()
        except GeneratorExit:  # the caller closed the iterator
            self._save_all()
            raise

    def _start_waiting(self) -> Iterator[TrialOutcome]:
        """Add arms up to the limit; yield the outcomes of those that do not fit in memory even alone."""
        while self._waiting and len(self._running) < self._limit:
            trial = self._waiting.popleft()
            if trial.trial_id not in self._started:
                self._listener.on_event(started(trial))
                self._started.add(trial.trial_id)
            try:
                self._running.append(self._add(trial))
            except (RuntimeError, MemoryError) as error:
                if not is_recoverable_oom(error):
                    raise
                reason = first_line(error)
                self._multi_lora.remove(adapter_name(trial))
                free_memory(self._device)
                if self._running:
                    self._waiting.appendleft(trial)
                    self._reduce_limit(len(self._running), len(self._running) + 1)
                elif self._may_retry(trial):
                    self._waiting.appendleft(trial)
                else:
                    yield out_of_memory(trial, self._runtime, reason)
        self._running.sort(key=lambda training: training.trial.arm.rank)  # neighbours of one rank share a product
        for training in self._running:
            training.note_pass([other.trial.arm.rank for other in self._running if other is not training])

    def _add(self, trial: Trial) -> ArmTraining:
        return ArmTraining(
            self._runtime, trial, self._multi_lora, self._base_loss, self._folders(trial), self._listener
        )

    def _step(self) -> Iterator[TrialOutcome]:
        """One step of every running arm; yield the outcomes of those that end in it without a result."""
        try:
            ended = step_all(self._runtime, self._multi_lora, self._running)
        except (RuntimeError, MemoryError) as error:
            if not is_recoverable_oom(error):
                raise
            reason = first_line(error)
        else:
            yield from self._end(ended)
            return
        free_memory(self._device)
        trial = self._running[0].trial
        if len(self._running) > 1:
            self._halve()
        elif self._may_retry(trial):
            self._running.pop().pause()
            self._waiting.appendleft(trial)
        else:
            yield from self._end({trial.trial_id: out_of_memory(trial, self._runtime, reason)})

    def _may_retry(self, trial: Trial) -> bool:
        """True once per trial: another process may have filled the memory for a moment."""
        if trial.trial_id in self._retried:
            return False
        self._retried.add(trial.trial_id)
        self._listener.on_event(Notice(text=f"{trial.arm.label()} ran out of memory on {self._device}: retrying once"))
        return True

    def _end(self, ended: Ended) -> Iterator[TrialOutcome]:
        for training in [training for training in self._running if training.trial.trial_id in ended]:
            self._running.remove(training)
            training.remove_adapter()
            yield ended[training.trial.trial_id]
            training.delete_checkpoint()

    def _halve(self) -> None:
        before = len(self._running)
        for training in reversed(self._running[before // 2 :]):
            training.pause()
            self._waiting.appendleft(training.trial)
        del self._running[before // 2 :]
        self._reduce_limit(before // 2, before)

    def _reduce_limit(self, limit: int, tried: int) -> None:
        self._limit = limit
        self._listener.on_event(
            Notice(text=f"{tried} adapters per pass ran out of memory on {self._device}: continuing with {limit}")
        )

    def _finish_done(self, memory: PeakMemory) -> Iterator[TrialFinished]:
        for training in [training for training in self._running if training.is_done]:
            try:
                outcome = training.finish(memory.peak_bytes())
            except MetricError:  # keep what has been trained
                self._save_all()
                raise
            self._running.remove(training)
            yield outcome
            if training.trial.arm.stop_at is None:  # another trial may resume from one that stopped early
                training.delete_checkpoint()

    def _save_all(self) -> None:
        for training in self._running:
            training.save()

    def _checkpoint_due(self) -> None:
        """Write the checkpoints that are due; when asked to stop, write all and raise."""
        stopping = bool(self._running) and self._listener.should_stop()
        for training in self._running:
            if stopping or training.is_checkpoint_due:
                training.save()
        if stopping:
            first = self._running[0]
            others = f" and {len(self._running) - 1} more" if len(self._running) > 1 else ""
            raise InterruptedRun(
                f"stopped at step {first.progress.step} of {first.trial.arm.steps} of {first.trial.arm.label()}{others}"
            )


def by_seed(trials: Sequence[Trial]) -> list[Trial]:
    """The trials grouped by seed, in the given order: arms of one seed share batches, and so need no padding together."""
    seeds = list(dict.fromkeys(trial.arm.seed for trial in trials))
    return sorted(trials, key=lambda trial: seeds.index(trial.arm.seed))


def started(trial: Trial) -> TrialStarted:
    return TrialStarted(**trial.fields)
