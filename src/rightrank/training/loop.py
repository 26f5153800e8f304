"""The training loop: trains trials with up to `adapters_per_pass` adapters on one base, with one shared pass per step.

Everything is a function of the settings, the arm and the step number, so a training that resumes from a checkpoint ends
with the same values as an uninterrupted one.

When an arm finishes, diverges or stops early, it leaves the base and the next one joins. When a pass runs out of memory, half
of the arms write a checkpoint and wait while the others continue; results do not change. An arm that runs out of memory
alone ends as `out_of_memory`. The checkpoint of a finished trial is deleted when the caller requests the next outcome,
because the caller has stored the finished trial only then.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, set_peft_model_state_dict

from rightrank.adapters.resize import truncate_tensors
from rightrank.adapters.truncation import load_moments
from rightrank.bases.safetensors_files import BFLOAT16
from rightrank.evaluation.answers import measure_metrics
from rightrank.evaluation.attached_adapters import attach_adapter
from rightrank.evaluation.batches import Batch
from rightrank.evaluation.device import catch_memory_errors, free_memory, read_peak_bytes, reset_peak_memory
from rightrank.evaluation.peft_models import save_adapter
from rightrank.evaluation.scores import MetricResults, Scores
from rightrank.schema.errors import InterruptedRun, MetricError
from rightrank.schema.events import Listener, StepDone
from rightrank.schema.settings import EVAL_SUBSET_SIZE
from rightrank.schema.trials import (
    EvalPoint,
    Trial,
    TrialDiverged,
    TrialFailed,
    TrialFinished,
    TrialOutcome,
    TrialStarted,
)
from rightrank.training.moments import ensure_moments
from rightrank.training.multi_lora import ArmBatch, MultiLora, Routing
from rightrank.training.optimizer import (
    ArmOptimizer,
    MeanName,
    count_warmup_steps,
    load_checkpoint,
    make_schedule,
    save_checkpoint,
    take_step,
)
from rightrank.training.progress import TrainingProgress, build_finished_trial
from rightrank.training.runtime import Runtime

CHECKPOINT_SECONDS = 60.0  # between checkpoints of a running trial
MAX_CHECKPOINT_FRACTION = 0.015  # the largest fraction of the time for writing checkpoints
DIVERGENCE_FACTOR = 2.0  # a training with a loss above this multiple of the base's has diverged
QUARTER = 0.25  # of the steps taken, over which a mean of the factors ranks learning rates
DIVERGENCE_WINDOW = 8  # steps over which the training loss is averaged before it is compared with the base's


@dataclass(frozen=True, slots=True)
class TrialFolders:
    checkpoint: Path  # a file that exists while the trial runs
    adapter: Path  # the folder of the finished trial's adapter
    continue_from: Path | None = None  # the checkpoint of the trial that this one resumes
    truncate_from: Path | None = None  # the adapter folder of the trial that this one truncates
    moments: Path | None = None  # file with the moments of that adapter (`moments.py`)
    answers: Path | None = None  # file for the model's answers to the held-out examples, if a metric needs them


def format_adapter_name(trial: Trial) -> str:
    return f"arm_{trial.trial_id}"


@dataclass(eq=False)
class ArmTraining:
    """The optimizer, progress and checkpoint of one arm; the passes over the base are shared.

    A training is over when `is_done` is true, or when `failure` says how it ended without a result.
    """

    _runtime: Runtime
    trial: Trial
    _multi_lora: MultiLora
    _base_loss: float | None
    folders: TrialFolders
    _listener: Listener

    def __post_init__(self) -> None:
        runtime, multi_lora, arm = self._runtime, self._multi_lora, self.trial.arm
        self.adapter = format_adapter_name(self.trial)
        self._settings = runtime.settings
        self._truncation: Literal["svd", "kfac"] | None = None
        config = runtime.make_config(arm)
        truncated = self._load_truncation(config)
        plan = runtime.plan_batches(arm.seed, arm.steps) if arm.steps else []  # a truncation is not trained
        named = multi_lora.add(self.adapter, arm, config)
        schedule = make_schedule(runtime.settings, arm.steps)
        self._last_step = arm.end
        self.optimizer = ArmOptimizer(runtime, named, arm.learning_rate, plan, schedule, self._choose_mean_starts())
        points = runtime.settings.num_evaluations
        self._evaluate_at = {max(1, round(arm.steps * number / points)) for number in range(1, points + 1)}
        self._saved = time.perf_counter()
        self._save_seconds = 0.0  # duration of writing the last checkpoint
        self.adapters_per_pass = 1  # in the fullest pass so far
        self._scores: Scores | None = None  # scores of the last evaluation
        self._measured: tuple[int, MetricResults] | None = None  # a step, and the metrics after it
        self.failure: TrialDiverged | TrialFailed | None = None
        checkpoint = self._load_checkpoint()
        if checkpoint is not None:
            self.optimizer.restore(*checkpoint)
        elif truncated:
            set_peft_model_state_dict(multi_lora.peft_model, truncated, adapter_name=self.adapter)

    def _choose_mean_starts(self) -> dict[MeanName, int]:
        arm, starts = self.trial.arm, dict[MeanName, int]()
        if self._settings.checkpoint == "best":
            starts["warmup"] = count_warmup_steps(self._settings, arm.steps)
        if arm.is_searched:
            starts["quarter"] = arm.end - max(1, round(QUARTER * arm.end))
        return starts

    def _load_truncation(self, config: LoraConfig) -> dict[str, torch.Tensor]:
        """Return the tensors of a truncation and put its ranks into `config`; return none if the arm does not start from a truncation."""
        folders, arm = self.folders, self.trial.arm
        if folders.truncate_from is None:
            return {}
        moments = {} if folders.moments is None else load_moments(folders.moments)
        self._truncation = "kfac" if moments else "svd"
        tensors = truncate_tensors(folders.truncate_from, arm.rank, config, moments)
        return {
            key: torch.from_numpy(tensor["BF16"]).view(torch.bfloat16)
            if tensor.dtype == BFLOAT16
            else torch.from_numpy(tensor)
            for key, tensor in tensors.items()
        }

    def _load_checkpoint(self) -> tuple[Mapping[str, torch.Tensor], Mapping[str, Any]] | None:
        """Load this trial's checkpoint, or the checkpoint of the trial that it resumes; None starts from step 0.

        If the resumed trial's checkpoint is missing, its steps are trained again with the same result.
        """
        folders = self.folders
        sources = ((folders.checkpoint, self.trial.trial_id), (folders.continue_from, self.trial.arm.continue_from))
        for path, trial_id in sources:
            checkpoint = None if path is None else load_checkpoint(path)
            if checkpoint is not None and checkpoint[1].get("trial_id") == trial_id:
                return checkpoint
        return None

    @property
    def progress(self) -> TrainingProgress:
        return self.optimizer.progress

    @property
    def is_done(self) -> bool:
        return self.progress.step >= self._last_step

    @property
    def is_evaluation_due(self) -> bool:
        return self.failure is None and (self.is_done or self.progress.step in self._evaluate_at)

    @property
    def uses_eval_subset(self) -> bool:
        """Return whether the next evaluation scores only the first examples. Only the end of a full training scores all examples."""
        return self.trial.arm.stop_at is not None or not self.is_done

    def make_arm_batch(self, batch: Batch, number: int) -> ArmBatch:
        per_step = self._settings.gradient_accumulation_steps
        dropout_seed = (self.trial.arm.seed * 1_000_003 + self.progress.step) * per_step + number
        return ArmBatch(self.adapter, batch, 1 / self.optimizer.labels, dropout_seed)

    def record_step(self, seconds: float) -> None:
        """Report the step. End the training if its loss is not finite or above `DIVERGENCE_FACTOR` times the base's."""
        progress = self.progress
        progress.train_seconds += seconds
        recent = progress.train_losses[-DIVERGENCE_WINDOW:]
        if not math.isfinite(recent[-1]):
            self._diverge(f"training loss is {recent[-1]}")
        elif len(recent) == DIVERGENCE_WINDOW:
            self._compare_with_base(sum(recent) / len(recent), "training")
        if self.failure is None:
            self._listener.on_event(
                StepDone(
                    trial_id=self.trial.trial_id,
                    step=progress.step,
                    steps=self.trial.arm.steps,
                    loss=recent[-1],
                    seconds=progress.train_seconds + progress.eval_seconds,
                )
            )

    def record_scores(self, scores: Scores, seconds: float) -> None:
        """Store the scores of an evaluation. End the training if its loss is above `DIVERGENCE_FACTOR` times the base's."""
        progress = self.progress
        progress.eval_seconds += seconds
        self._scores = scores
        subset_scores = scores.take_first(EVAL_SUBSET_SIZE)
        self._compare_with_base(subset_scores.loss, "held-out")
        # The step at which a training stops early adds no point, so that all trainings have the same points.
        if self.failure is None and progress.step in self._evaluate_at:
            recent = progress.train_losses[progress.points[-1].step if progress.points else 0 :]
            point = EvalPoint(
                step=progress.step,
                value=self._compute_point_value(subset_scores),
                mean_value=self._compute_mean_value(subset_scores),
                train_value=sum(recent) / len(recent),
            )
            progress.points.append(point)
            if self._settings.checkpoint == "best":
                best, is_mean = self._find_best()
                if best is point:
                    self.optimizer.keep_best("warmup" if is_mean else None)

    def _compute_mean_value(self, scores: Scores) -> float | None:
        """Return the value of the mean of the factors since the warm-up on the first examples; None if it is not kept or not due."""
        mean, metric = self.optimizer.means.get("warmup"), self._settings.points_metric
        # The first mean after the warm-up is the current factors. A metric that needs generated answers is not measured twice.
        if mean is None or self.progress.step <= mean.start + 1 or metric not in scores.metrics:
            return None
        with self.optimizer.use_mean("warmup"):
            return self._evaluate(is_subset=True).metrics[metric]

    def _find_best(self) -> tuple[EvalPoint, bool]:
        """Return the best evaluation, the earliest of equal ones, and whether it is that of the mean of the factors."""
        sign = -1.0 if self._settings.is_higher_better(self._settings.points_metric) else 1.0
        values = [(sign * point.value, point, False) for point in self.progress.points]
        values += [
            (sign * point.mean_value, point, True) for point in self.progress.points if point.mean_value is not None
        ]
        _, best, is_mean = min(values, key=lambda item: (item[0], item[1].step))
        return best, is_mean

    def _compare_with_base(self, loss: float, description: str) -> None:
        base = self._base_loss
        if base is not None and not loss <= DIVERGENCE_FACTOR * base:
            self._diverge(f"{description} loss {loss:.3f} is above {DIVERGENCE_FACTOR:g} × the base's {base:.3f}")

    def _diverge(self, reason: str) -> None:
        self.failure = TrialDiverged(**self.trial.fields, step=self.progress.step, reason=reason)

    def _compute_point_value(self, scores: Scores) -> float:
        """Return the value of an evaluation: the deciding metric if it is measured during training, otherwise the loss."""
        name = self._settings.points_metric
        if name in scores.metrics:
            return scores.metrics[name]
        self._measured = (self.progress.step, self._measure_metrics())
        self._measured[1].require_values([name])
        return self._measured[1].values[name]

    def _measure_metrics(self) -> MetricResults:
        """Measure the metrics of answers and tasks with this arm's adapter alone, at most once per step."""
        if self._measured is not None and self._measured[0] == self.progress.step:
            return self._measured[1]
        start_time = time.perf_counter()
        with self._multi_lora.use_routing(Routing((self.adapter,), (None,))):
            metric_results = measure_metrics(self._runtime.evaluator, "validation", self.folders.answers)
        self.progress.eval_seconds += time.perf_counter() - start_time
        return metric_results

    def finish(self, peak_bytes: int) -> TrialFinished:
        """Measure the final metrics, save the adapter, remove it from the base, and return the record.

        The checkpoint stays until the caller has stored the record.

        Raises:
            MetricError: the deciding metric gave no score; the adapter is still on the base.
        """
        arm, metric_results, mean_losses = self.trial.arm, MetricResults(), list[float]()
        # None: the trial resumed at its last step.
        scores = self._evaluate(self.uses_eval_subset) if self._scores is None else self._scores
        best_fields = self._restore_best() if arm.is_direct and self.optimizer.best else {}
        if arm.stop_at is None:
            scores = self._evaluate(is_subset=False) if best_fields else scores
            metric_results = self._measure_metrics()
            metric_results.require_values([self._settings.metric_name])
            save_adapter(self._multi_lora.peft_model, self.folders.adapter, self._runtime.loaded.name, self.adapter)
        else:
            if "quarter" in self.optimizer.means:
                with self.optimizer.use_mean("quarter"):
                    mean_losses = self._evaluate(is_subset=True).losses
            self.save()  # another trial may resume from here
        self._multi_lora.remove(self.adapter)
        record = build_finished_trial(self.trial, self._settings.metric_name, scores, metric_results, self.progress)
        return record.model_copy(
            update={
                "trainable_parameters": sum(
                    parameter.numel() for parameter in self.optimizer.named_parameters.values()
                ),
                "peak_bytes": peak_bytes,
                "adapters_per_pass": self.adapters_per_pass,
                "truncation": self._truncation,
                "mean_losses": mean_losses,
            }
            | best_fields
        )

    def _restore_best(self) -> dict[str, Any]:
        """Restore the parameters of the best evaluation and return the fields that name it; none if they are the last ones."""
        best, is_mean = self._find_best()
        if best.step == self.progress.step and not is_mean:
            return {}
        self.optimizer.set_parameters(self.optimizer.best)
        self._measured = None
        return {"checkpoint_step": best.step, "checkpoint_is_mean": is_mean, "train_value": best.train_value}

    def _evaluate(self, is_subset: bool) -> Scores:
        start_time = time.perf_counter()
        scores = evaluate_adapters(self._runtime, self._multi_lora, [self.adapter], is_subset)[0]
        self.progress.eval_seconds += time.perf_counter() - start_time
        return scores

    @property
    def is_checkpoint_due(self) -> bool:
        """Return whether to write a checkpoint now.

        This is the case after `CHECKPOINT_SECONDS`, or later if writing would take more than `MAX_CHECKPOINT_FRACTION` of the time.
        """
        waited = time.perf_counter() - self._saved
        return waited > max(CHECKPOINT_SECONDS, self._save_seconds / MAX_CHECKPOINT_FRACTION)

    def save(self) -> None:
        start_time = time.perf_counter()
        state = {"trial_id": self.trial.trial_id, **self.progress.model_dump()}
        save_checkpoint(self.folders.checkpoint, self.optimizer.collect_tensors(), state)
        self._saved = time.perf_counter()
        self._save_seconds = self._saved - start_time


def evaluate_adapters(
    runtime: Runtime, multi_lora: MultiLora, adapters: Sequence[str], is_subset: bool
) -> list[Scores]:
    """Score the validation split with each adapter: a subset of its first examples, or all of them."""
    if not is_subset:
        return runtime.evaluate_adapters("validation", multi_lora, adapters)
    subset = range(min(EVAL_SUBSET_SIZE, len(runtime.data.splits["validation"])))
    subset_scores = runtime.evaluate_adapters("validation", multi_lora, adapters, subset)
    return [scores.take_first(EVAL_SUBSET_SIZE) for scores in subset_scores]


FolderFactory = Callable[[Trial], TrialFolders]


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
            with attach_adapter(runtime.evaluator, trial_folders.truncate_from, is_zero=True):
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
    scores = runtime.evaluator.evaluate("validation")
    metric_results = measure_metrics(runtime.evaluator, "validation", folders.answers)
    metric_results.require_values(list(metric_results.failures))
    progress = TrainingProgress(eval_seconds=time.perf_counter() - start_time)
    record = build_finished_trial(trial, runtime.settings.metric_name, scores, metric_results, progress)
    return record.model_copy(update={"peak_bytes": read_peak_bytes(runtime.loaded.device)})


@dataclass(slots=True)
class _TrainingLoop:
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
            training.adapters_per_pass = max(training.adapters_per_pass, len(self._running))

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

        If memory runs out, evaluate each in a pass of its own. A single training that does not fit ends.
        """
        adapters = [training.adapter for training in trainings]
        start_time = time.perf_counter()
        with catch_memory_errors() as reasons:
            all_scores = evaluate_adapters(self._runtime, self._multi_lora, adapters, trainings[0].uses_eval_subset)
        if not reasons:
            seconds = (time.perf_counter() - start_time) / len(trainings)
            for training, scores in zip(trainings, all_scores, strict=True):
                training.record_scores(scores, seconds)
        elif len(trainings) > 1:
            for training in trainings:
                self._evaluate([training])
        else:
            trainings[0].failure = self._build_memory_failure(trainings[0].trial, *reasons)

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
