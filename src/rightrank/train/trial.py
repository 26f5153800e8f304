"""The training of one arm, from its seed to its result, with checkpoints; `training_loop.py` runs several at a time.

Everything is a function of the settings, the arm and the step number, so a training that resumes from a checkpoint ends
with the same values as an uninterrupted one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from peft import set_peft_model_state_dict

from rightrank.models.adapter_files import save_adapter
from rightrank.schema.events import Listener, StepDone
from rightrank.schema.trials import Arm, EvalPoint, Trial, TrialDiverged, TrialFinished
from rightrank.train.adapter import RunningMean, TrialFolders, truncate, truncation_method
from rightrank.train.batches import Batch
from rightrank.train.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from rightrank.train.distributed import process_index
from rightrank.train.evaluation import Scores
from rightrank.train.generation import Measured, measure
from rightrank.train.multi_lora import ArmBatch, MultiLora
from rightrank.train.optimizer import OptimizerSteps, arm_schedule, restore_state, state_tensors
from rightrank.train.runtime import Runtime

DIVERGENCE_FACTOR = 2.0  # a training whose loss is above this times the base's has diverged


class Diverged(Exception):  # noqa: N818 - an outcome, turned into a record
    """The training diverged. It ends, and the other arms of the pass continue."""

    def __init__(self, trial: Trial, step: int, reason: str) -> None:
        super().__init__(reason)
        self.trial = trial
        self.step = step
        self.reason = reason

    def outcome(self) -> TrialDiverged:
        return TrialDiverged(**self.trial.fields, step=self.step, reason=self.reason)


@dataclass(slots=True)
class Progress:
    """What a checkpoint stores beside tensors."""

    step: int = 0
    train_losses: list[float] = field(default_factory=list)  # nats per label, one per step
    points: list[EvalPoint] = field(default_factory=list)
    train_seconds: float = 0.0
    train_tokens: int = 0
    eval_seconds: float = 0.0
    answer_seconds: float = 0.0  # part of eval_seconds: the metrics at the end

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Progress:
        found = {one.name: state[one.name] for one in fields(cls) if one.name in state}
        return cls(**found | {"points": [EvalPoint.model_validate(point) for point in state["points"]]})

    def state(self) -> dict[str, Any]:
        found = {one.name: getattr(self, one.name) for one in fields(self)}
        return found | {"points": [point.model_dump() for point in self.points]}


@dataclass(frozen=True, slots=True)
class Evaluation:
    scores: Scores
    measured: Measured | None  # None: the trial stopped early and is judged by its loss
    averaged_loss: float | None = None  # held-out, of the running mean of the parameters; early looks

    def value(self, metric: str) -> tuple[float, str | None]:
        """`(value, None)` of the metric, or `(loss, "loss")` if it was not measured."""
        values = self.values()
        return (values[metric], None) if metric in values else (self.scores.loss, "loss")

    def values(self) -> dict[str, float]:
        return self.scores.metrics | (self.measured.values if self.measured else {})


def finished(
    trial: Trial,
    runtime: Runtime,
    progress: Progress,
    evaluation: Evaluation,
    parameters: int,
    peak_bytes: int,
    pass_ranks: Sequence[int],
) -> TrialFinished:
    """The record of a trial; `pass_ranks` are the ranks of the arms in its fullest pass, its own first."""
    scores, measured = evaluation.scores, evaluation.measured or Measured()
    value, value_metric = evaluation.value(runtime.settings.metric_name)
    return TrialFinished(
        **trial.fields,
        value=value,
        value_metric=value_metric,
        metrics=evaluation.values(),
        **scores.fields | {"item_metrics": scores.item_metrics | measured.items},
        failed_metrics=measured.failed,
        averaged_loss=evaluation.averaged_loss,
        train_value=progress.points[-1].train_value if progress.points else None,
        points=progress.points,
        trainable_parameters=parameters,
        train_seconds=progress.train_seconds,
        train_tokens=progress.train_tokens,
        eval_seconds=progress.eval_seconds,
        answer_seconds=progress.answer_seconds,
        peak_bytes=peak_bytes,
        adapters_per_pass=len(pass_ranks),
        pass_ranks=list(pass_ranks),
        train_losses=progress.train_losses,
    )


CHECKPOINT_SHARE = 0.015  # the largest share of the time that writing checkpoints may take
DIVERGENCE_WINDOW = 8  # steps over which the training loss is averaged before it is compared with the base's


def adapter_name(trial: Trial) -> str:
    return f"arm_{trial.trial_id}"


class ArmTraining:
    """One arm's optimizer, schedule, batches, progress and checkpoint; the passes over the base are shared.

    A step is `micro_batches`, then `arm_batch` and `add_losses` for each, then `update` and `end_step`.
    """

    def __init__(
        self,
        runtime: Runtime,
        trial: Trial,
        multi_lora: MultiLora,
        base_loss: float | None,
        folders: TrialFolders,
        listener: Listener,
    ) -> None:
        self._runtime = runtime
        self.trial = trial
        self.adapter = adapter_name(trial)
        self._multi_lora = multi_lora
        self._base_loss = base_loss
        self._folders = folders
        self._listener = listener
        self._settings = runtime.settings
        config = runtime.arm_targets.config(trial.arm)
        self._truncated = truncate(folders, trial.arm, runtime.settings.scaling, config)
        self._named = multi_lora.add(self.adapter, trial.arm, config, runtime.first_rows(trial.arm))
        self._parameters = list(self._named.values())
        self._steps = OptimizerSteps(
            runtime,
            self._named,
            trial.arm.learning_rate,
            training_batches(runtime, trial.arm),
            arm_schedule(runtime.settings, trial.arm),
        )
        self._last_step = trial.arm.steps if trial.arm.stop_at is None else trial.arm.stop_at
        self._evaluate_at = evaluation_steps(trial.arm.steps, runtime.settings.eval_points)
        self._saved = time.perf_counter()
        self._save_seconds = 0.0  # that writing the last checkpoint took
        self.pass_ranks = [trial.arm.rank]  # of the adapters in the fullest pass so far, its own first
        self._loss_sum = 0.0  # of the current step
        self._micro_batch = 0
        self._scores: Scores | None = None  # of the last evaluation
        self._measured: tuple[int, Measured] | None = None  # the step, and the metrics after it
        self.progress = Progress()
        is_look = trial.arm.stop_at is not None and trial.arm.continue_from is None  # later stages compare no means
        self._mean = RunningMean(self._named, self._last_step // 2) if is_look else None
        self._start()

    def note_pass(self, others: Sequence[int]) -> None:
        """Record the ranks of the adapters beside this one in the pass, if it is the fullest so far."""
        if len(others) >= len(self.pass_ranks):
            self.pass_ranks = [self.trial.arm.rank, *others]

    @property
    def is_done(self) -> bool:
        return self.progress.step >= self._last_step

    @property
    def wants_evaluation(self) -> bool:
        return self.progress.step in self._evaluate_at or self.progress.step == self._last_step

    def micro_batches(self) -> list[Batch]:
        """Begin a step; its batches."""
        self._loss_sum, self._micro_batch = 0.0, 0
        return self._steps.begin(self.progress.step)

    def arm_batch(self, batch: Batch) -> ArmBatch:
        """What this arm adds to the pass over its next micro-batch."""
        per_step = self._settings.gradient_accumulation_steps
        dropout_seed = (self.trial.arm.seed * 1_000_003 + self.progress.step) * per_step + self._micro_batch
        self._micro_batch += 1
        return ArmBatch(self.adapter, batch, 1 / self._steps.labels, dropout_seed)

    def add_losses(self, loss_sum: float) -> None:
        self._loss_sum += loss_sum

    def update(self) -> None:
        self.progress.train_losses.append(self._steps.update(self._loss_sum))
        self.progress.step += 1
        if self._mean is not None:
            self._mean.add(self.progress.step)
        self.progress.train_tokens += self._steps.tokens

    def end_step(self, seconds: float) -> None:
        """Report the step and check that the training has not diverged.

        Raises:
            Diverged: the loss is not finite, or above `DIVERGENCE_FACTOR` times the base's.
        """
        progress = self.progress
        progress.train_seconds += seconds
        loss = progress.train_losses[-1]
        if not math.isfinite(loss):
            raise Diverged(self.trial, progress.step, f"training loss is {loss}")
        recent = progress.train_losses[-DIVERGENCE_WINDOW:]
        self._compare_with_base(sum(recent) / len(recent), "training", len(recent) == DIVERGENCE_WINDOW)
        self._listener.on_event(
            StepDone(
                trial_id=self.trial.trial_id,
                step=progress.step,
                steps=self.trial.arm.steps,
                loss=loss,
                seconds=progress.train_seconds + progress.eval_seconds,
            )
        )

    def take_scores(self, scores: Scores, seconds: float) -> None:
        """Keep a held-out evaluation.

        Raises:
            Diverged: the held-out loss is above `DIVERGENCE_FACTOR` times the base's.
        """
        progress = self.progress
        progress.eval_seconds += seconds
        self._scores = scores
        self._compare_with_base(scores.loss, "held-out")
        since = progress.points[-1].step if progress.points else 0
        recent = progress.train_losses[since:]
        value = self._point_value(scores)
        if progress.step in self._evaluate_at:  # early stopping adds no point: every arm has the same
            progress.points.append(EvalPoint(step=progress.step, value=value, train_value=sum(recent) / len(recent)))

    def _point_value(self, scores: Scores) -> float:
        """The value of an evaluation point: the deciding metric if it is measured at points, otherwise the loss."""
        name = self._settings.points_metric
        if name in scores.metrics or self.progress.step not in self._evaluate_at:
            return scores.metrics.get(name, scores.loss)
        self._measured = (self.progress.step, self._measure())
        self._measured[1].require([name])
        return self._measured[1].values[name]

    def _measure(self) -> Measured:
        """The metrics of answers and tasks under this arm alone, measured at most once per step."""
        if self._measured is not None and self._measured[0] == self.progress.step:
            return self._measured[1]
        begun = time.perf_counter()
        with self._multi_lora.alone(self.adapter):
            measured = measure(self._runtime, "selection", self._folders.answers)
        seconds = time.perf_counter() - begun
        self.progress.eval_seconds += seconds
        self.progress.answer_seconds = seconds
        return measured

    def finish(self, peak_bytes: int) -> TrialFinished:
        """Measure the end metrics, save the adapter, remove it from the base, and return the record.

        The checkpoint stays until the caller has stored the record (`delete_checkpoint`).

        Raises:
            MetricError: the deciding metric gave no score; the adapter is still on the base.
        """
        if self._scores is None:  # resumed from a checkpoint of its last step
            begun = time.perf_counter()
            self._scores = self._runtime.evaluate_adapters("selection", self._multi_lora, [self.adapter])[0]
            self.progress.eval_seconds += time.perf_counter() - begun
        measured: Measured | None = None
        averaged = self._averaged_loss()
        if self.trial.arm.stop_at is None:
            measured = self._measure()
            measured.require([self._settings.metric_name])
            if process_index() == 0:
                save_adapter(
                    self._multi_lora.peft_model, self._folders.adapter, self._runtime.loaded.name, self.adapter
                )
            self._multi_lora.remove(self.adapter)
        elif self.trial.arm.is_annealed:
            self._multi_lora.remove(self.adapter)  # nobody resumes from it
        else:
            self.pause()  # another trial may resume from here
        count = sum(parameter.numel() for parameter in self._parameters)
        found = Evaluation(self._scores, measured, averaged)
        record = finished(self.trial, self._runtime, self.progress, found, count, peak_bytes, self.pass_ranks)
        return record.model_copy(update={"truncation": truncation_method(self._folders)})

    def _averaged_loss(self) -> float | None:
        """Held-out loss of the running mean of the parameters; None without one."""
        if self._mean is None or self._mean.is_empty:
            return None
        begun = time.perf_counter()
        with self._mean.applied():
            scores = self._runtime.evaluate_adapters("selection", self._multi_lora, [self.adapter])[0]
        self.progress.eval_seconds += time.perf_counter() - begun
        return scores.loss

    def delete_checkpoint(self) -> None:
        """Call once the trial's outcome is stored."""
        if process_index() == 0:
            self._folders.checkpoint.unlink(missing_ok=True)

    def remove_adapter(self) -> None:
        self._multi_lora.remove(self.adapter)

    def pause(self) -> None:
        """Write a checkpoint and remove the adapter from the base, to be resumed later."""
        self.save()
        self._multi_lora.remove(self.adapter)

    @property
    def is_checkpoint_due(self) -> bool:
        """True after `checkpoint_seconds`, or later where writing would take more than `CHECKPOINT_SHARE` of the time."""
        waited = time.perf_counter() - self._saved
        return waited > max(self._settings.checkpoint_seconds, self._save_seconds / CHECKPOINT_SHARE)

    def _compare_with_base(self, loss: float, which: str, enough: bool = True) -> None:
        limit = math.inf if self._base_loss is None else DIVERGENCE_FACTOR * self._base_loss
        if enough and not loss <= limit:
            raise Diverged(
                self.trial,
                self.progress.step,
                f"{which} loss {loss:.3f} is above {DIVERGENCE_FACTOR:g} × the base's {self._base_loss:.3f}",
            )

    def save(self) -> None:
        """Write the checkpoint, in process 0 alone: every process holds the same state."""
        begun = time.perf_counter()
        if process_index() == 0:
            save_checkpoint(self._folders.checkpoint, self._checkpoint())
        self._saved = time.perf_counter()
        self._save_seconds = self._saved - begun

    def _checkpoint(self) -> Checkpoint:
        tensors = {f"parameter.{name}": value.detach() for name, value in self._named.items()}
        for index, parameter in enumerate(self._parameters):
            tensors |= state_tensors(self._steps.optimizer, index, parameter)
        if self._mean is not None:
            tensors |= self._mean.tensors()
        return Checkpoint(tensors, {"trial_id": self.trial.trial_id, **self.progress.state()})

    def _start(self) -> None:
        """Start from this trial's checkpoint, else from the trial that it resumes or truncates, else from step 0.

        A missing checkpoint of the resumed trial costs its steps again and changes no result.
        """
        arm, folders = self.trial.arm, self._folders
        truncated, self._truncated = self._truncated, {}
        if self._resume(folders.checkpoint, self.trial.trial_id):
            return
        if folders.continue_from is not None and arm.continue_from is not None:
            self._resume(folders.continue_from, arm.continue_from)
        if truncated:
            set_peft_model_state_dict(self._multi_lora.peft_model, truncated, adapter_name=self.adapter)

    def _resume(self, checkpoint: Path, trial_id: str) -> bool:
        """Restore a checkpoint; False if there is none, or one of another trial."""
        found = load_checkpoint(checkpoint)
        if found is None or found.state.get("trial_id") != trial_id:
            return False
        with torch.no_grad():
            for name, value in self._named.items():
                value.copy_(found.tensors[f"parameter.{name}"])
        for index, parameter in enumerate(self._parameters):
            restore_state(self._steps.optimizer, found.tensors, index, parameter)
        if self._mean is not None and trial_id == self.trial.trial_id:
            self._mean.restore(found.tensors)
        self.progress = Progress.of(found.state)
        return True


def training_batches(runtime: Runtime, arm: Arm) -> list[list[int]]:
    """The batches of an arm's steps; recovery after a truncation takes those that follow a whole training's."""
    if arm.truncate_from is None:
        return runtime.batch_plan(arm.seed)[: arm.steps]
    return runtime.batch_plan(arm.seed, runtime.steps + arm.steps)[runtime.steps :]


def evaluation_steps(steps: int, points: int) -> set[int]:
    """The steps after which to evaluate: `points` of them, evenly spaced, the last step included."""
    return {max(1, round(steps * number / points)) for number in range(1, points + 1)}
