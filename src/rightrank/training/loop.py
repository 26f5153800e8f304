"""The training loop: trains trials with up to `adapters_per_pass` adapters on one base, with one shared pass per step.

When an arm finishes, diverges or stops early, it leaves the base and the next one joins. When a pass runs out of memory, half
of the arms write a checkpoint and wait while the others continue; results do not change. An arm that runs out of memory
alone ends as `out_of_memory`. The checkpoint of a finished trial is deleted when the caller requests the next outcome,
because the caller has stored the finished trial only then.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch

from rightrank.schema.errors import InterruptedRun, MetricError
from rightrank.schema.events import Listener
from rightrank.schema.trials import Trial, TrialFailed, TrialFinished, TrialOutcome, TrialStarted
from rightrank.training.adapter_runtime import attach_adapter, ensure_moments
from rightrank.training.answers import measure_metrics
from rightrank.training.batches import Batch
from rightrank.training.device import catch_memory_errors, free_memory, read_peak_bytes, reset_peak_memory
from rightrank.training.evaluation import Progress, build_finished_trial
from rightrank.training.multi_lora import MultiLora
from rightrank.training.optimizer import MeanName, take_step
from rightrank.training.runtime import Runtime
from rightrank.training.trial import (
    ArmTraining,
    TrialFolders,
    evaluate_adapters,
    format_adapter_name,
)

FolderFactory = Callable[[Trial], TrialFolders]


def run_trial(
    runtime: Runtime, trial: Trial, base_loss: float | None, folders: TrialFolders, listener: Listener
) -> TrialOutcome:
    """Train one trial alone, or evaluate the base for rank 0; see `train_trials`."""
    return next(train_trials(runtime, [trial], base_loss, lambda _: folders, listener))


def train_trials(
    runtime: Runtime,
    trials: Sequence[Trial],
    base_loss: float | None,
    folders: FolderFactory,
    listener: Listener,
    adapters_per_pass: int = 1,
) -> Iterator[TrialOutcome]:
    """Train trials and yield their outcomes in the order in which they end. The adapter of a finished trial is saved first.

    Closing the iterator early writes a checkpoint of every running arm.

    Args:
        trials: the trials to train; rank 0 evaluates the base, with the other modules of the training that it truncates.
        base_loss: the base's held-out loss, which decides whether a training diverged; None only for the base itself.
        adapters_per_pass: the largest number of adapters in one pass.

    Raises:
        InterruptedRun: the listener asked to stop; checkpoints were written.
        MetricError: the deciding metric gave no score.
    """
    for trial in trials:
        if trial.arm.rank == 0:
            listener.on_event(TrialStarted(**trial.fields))
            trial_folders = folders(trial)
            with attach_adapter(runtime, trial_folders.truncate_from, is_zero=True):
                yield _evaluate_base(runtime, trial, trial_folders)
    training_trials = [trial for trial in trials if trial.arm.rank > 0]
    for trial in training_trials:
        trial_folders = folders(trial)
        if trial_folders.truncate_from is not None and trial_folders.moments is not None:
            for notice in ensure_moments(runtime, trial.arm, trial_folders.truncate_from, trial_folders.moments):
                listener.send_notice(notice)
    if training_trials:
        with (
            MultiLora(runtime.model, runtime.settings) as multi_lora,
            runtime.use_gradient_checkpointing(),
        ):
            yield from _TrainingLoop(runtime, multi_lora, base_loss, folders, listener, adapters_per_pass).run(
                training_trials
            )


def _evaluate_base(runtime: Runtime, trial: Trial, folders: TrialFolders) -> TrialFinished:
    """Evaluate the base (rank 0), with a trained head if one is attached. A metric that fails here would fail for every arm, so the error is raised.

    Raises:
        MetricError: a metric failed.
    """
    start_time = time.perf_counter()
    reset_peak_memory(runtime.loaded.device)
    scores = runtime.evaluate("validation")
    scored_time = time.perf_counter()
    metric_results = measure_metrics(runtime, "validation", folders.answers)
    metric_results.require_values(list(metric_results.failures))
    end_time = time.perf_counter()
    progress = Progress(eval_seconds=end_time - start_time, answer_seconds=end_time - scored_time)
    record = build_finished_trial(trial, runtime.settings.metric_name, scores, metric_results, progress)
    return record.model_copy(update={"peak_bytes": read_peak_bytes(runtime.loaded.device)})


@dataclass(slots=True)
class _TrainingLoop:
    """The running arms and the waiting trials."""

    _runtime: Runtime
    _multi_lora: MultiLora
    _base_loss: float | None
    _folders: FolderFactory
    _listener: Listener
    _limit: int  # the largest number of adapters in a pass
    _waiting: deque[Trial] = field(default_factory=deque)
    _running: list[ArmTraining] = field(default_factory=list)
    _started: set[str] = field(default_factory=set)

    def run(self, trials: Sequence[Trial]) -> Iterator[TrialOutcome]:
        seeds = list(dict.fromkeys(trial.arm.seed for trial in trials))
        # Arms of one seed share batches, so they need no additional padding in one pass.
        self._waiting.extend(sorted(trials, key=lambda trial: seeds.index(trial.arm.seed)))
        try:
            while self._waiting or self._running:
                previous_count = len(self._running)
                yield from self._start_waiting()
                if len(self._running) > previous_count:
                    reset_peak_memory(self._runtime.loaded.device)
                yield from self._remove_ended()  # arms that resumed at their last step
                if self._running:
                    self._step()
                    yield from self._remove_ended()
                self._save_due_checkpoints()
        except GeneratorExit:  # the caller closed the iterator
            self._save_all()
            raise

    def _start_waiting(self) -> Iterator[TrialOutcome]:
        """Start arms up to the limit; yield the outcomes of arms that do not fit in memory even alone."""
        while self._waiting and len(self._running) < self._limit:
            trial = self._waiting.popleft()
            if trial.trial_id not in self._started:
                self._listener.on_event(TrialStarted(**trial.fields))
                self._started.add(trial.trial_id)
            folders = self._folders(trial)
            with catch_memory_errors() as reasons:
                training = ArmTraining(self._runtime, trial, self._multi_lora, self._base_loss, folders, self._listener)
                self._running.append(training)
            if reasons:
                self._multi_lora.remove(format_adapter_name(trial))
                free_memory(self._runtime.loaded.device)
                if self._running:
                    self._waiting.appendleft(trial)
                    self._reduce_limit(len(self._running), len(self._running) + 1)
                else:
                    yield self._build_memory_failure(trial, *reasons)
        self._running.sort(
            key=lambda training: training.trial.arm.rank
        )  # adjacent arms of one rank share a matrix product
        for training in self._running:
            if len(self._running) > len(training.pass_ranks):  # the fullest pass of this arm so far
                other_ranks = [neighbour.trial.arm.rank for neighbour in self._running if neighbour is not training]
                training.pass_ranks = [training.trial.arm.rank, *other_ranks]

    def _step(self) -> None:
        """Take one step of every running arm. If memory runs out, continue with fewer arms."""
        with catch_memory_errors() as reasons:
            self._step_all()
        if not reasons:
            return
        free_memory(self._runtime.loaded.device)
        first, num_running = self._running[0], len(self._running)
        if num_running > 1:
            for training in reversed(self._running[num_running // 2 :]):
                training.save()
                self._multi_lora.remove(training.adapter)
                self._waiting.appendleft(training.trial)
            del self._running[num_running // 2 :]
            self._reduce_limit(num_running // 2, num_running)
        else:
            first.failure = self._build_memory_failure(first.trial, *reasons)

    def _step_all(self) -> None:
        """Take one step of every running arm in shared passes and run the evaluations that are due. Arms share the time evenly."""

        def run_pass(batches: Sequence[Batch], number: int) -> list[torch.Tensor]:
            pairs = zip(self._running, batches, strict=True)
            arm_batches = [training.make_arm_batch(batch, number) for training, batch in pairs]
            return self._runtime.accumulate_gradients(self._multi_lora, arm_batches)

        start_time = time.perf_counter()
        take_step([training.optimizer for training in self._running], run_pass)
        seconds = (time.perf_counter() - start_time) / len(self._running)
        for training in self._running:
            training.record_step(seconds)
        due_trainings = [training for training in self._running if training.is_evaluation_due]
        for is_subset in (True, False):
            if trainings := [training for training in due_trainings if training.uses_eval_subset is is_subset]:
                self._evaluate(trainings)

    def _evaluate(self, trainings: Sequence[ArmTraining]) -> None:
        """Evaluate all trainings in one pass.

        If memory runs out, evaluate each half in its own pass. A single training that does not fit ends.
        """
        adapters = [training.adapter for training in trainings]
        start_time = time.perf_counter()
        with catch_memory_errors() as reasons:
            all_scores = evaluate_adapters(self._runtime, self._multi_lora, adapters, trainings[0].uses_eval_subset)
        if not reasons:
            seconds = (time.perf_counter() - start_time) / len(trainings)
            for training, scores in zip(trainings, all_scores, strict=True):
                training.record_scores(scores, seconds)
            names = list(dict.fromkeys(name for training in trainings for name in training.list_due_means()))
            for name in names:
                self._evaluate_means([training for training in trainings if name in training.list_due_means()], name)
        elif len(trainings) > 1:
            half = len(trainings) // 2
            self._evaluate(trainings[:half])
            self._evaluate(trainings[half:])
        else:
            trainings[0].failure = self._build_memory_failure(trainings[0].trial, *reasons)

    def _evaluate_means(self, trainings: Sequence[ArmTraining], name: MeanName) -> None:
        """Evaluate a mean of the factors on the first examples, in one pass that fits as the one before did."""
        adapters = [training.adapter for training in trainings]
        start_time = time.perf_counter()
        with ExitStack() as stack:
            for training in trainings:
                stack.enter_context(training.optimizer.use_mean(name))
            all_scores = evaluate_adapters(self._runtime, self._multi_lora, adapters, True)
            seconds = (time.perf_counter() - start_time) / len(trainings)
            for training, scores in zip(trainings, all_scores, strict=True):
                training.record_mean_scores(name, scores, seconds)

    def _build_memory_failure(self, trial: Trial, reason: str) -> TrialFailed:
        device = self._runtime.loaded.device
        reason = f"{trial.arm.format_label()} ran out of memory on {device}: {reason}"
        return TrialFailed(**trial.fields, error="out_of_memory", reason=reason)

    def _reduce_limit(self, limit: int, attempted: int) -> None:
        self._limit = limit
        device = self._runtime.loaded.device
        self._listener.send_notice(
            f"{attempted} adapters per pass ran out of memory on {device}: continuing with {limit}"
        )

    def _remove_ended(self) -> Iterator[TrialOutcome]:
        """Remove the arms that have ended and yield their outcomes, failures first."""
        for training in [training for training in self._running if training.failure is not None]:
            self._running.remove(training)
            self._multi_lora.remove(training.adapter)
            assert training.failure is not None
            yield training.failure
            training.folders.checkpoint.unlink(missing_ok=True)
        for training in [training for training in self._running if training.is_done]:
            try:
                outcome = training.finish(read_peak_bytes(self._runtime.loaded.device))
            except MetricError:  # save what has been trained
                self._save_all()
                raise
            self._running.remove(training)
            yield outcome
            if training.trial.arm.stop_at is None:  # another trial may resume from one that stopped early
                training.folders.checkpoint.unlink(missing_ok=True)

    def _save_all(self) -> None:
        for training in self._running:
            training.save()

    def _save_due_checkpoints(self) -> None:
        """Write the checkpoints that are due. If the listener asks to stop, write all checkpoints and raise."""
        if self._running and self._listener.should_stop():
            self._save_all()
            first, num_others = self._running[0], len(self._running) - 1
            suffix = f" and {num_others} more" if num_others else ""
            step = f"step {first.progress.step} of {first.trial.arm.steps}"
            raise InterruptedRun(f"stopped at {step} of {first.trial.arm.format_label()}{suffix}")
        for training in self._running:
            if training.is_checkpoint_due:
                training.save()
