"""The training of one arm, from its seed to its result, with checkpoints; `loop.py` runs several at a time.

Everything is a function of the settings, the arm and the step number, so a training that resumes from a checkpoint ends
with the same values as an uninterrupted one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, set_peft_model_state_dict

from rightrank.decision.table import best_point
from rightrank.models.adapter_files import save_adapter
from rightrank.models.truncation import load_moments, truncated_tensors
from rightrank.schema.events import Listener, StepDone
from rightrank.schema.settings import LOOK_ITEMS
from rightrank.schema.trials import EvalPoint, Trial, TrialDiverged, TrialFailed, TrialFinished
from rightrank.train.batches import Batch
from rightrank.train.evaluation import Measured, Scores
from rightrank.train.metrics import measure
from rightrank.train.multi_lora import ArmBatch, MultiLora
from rightrank.train.optimizer import ArmOptimizer, Progress, learning_rate_schedule, load_checkpoint, save_checkpoint
from rightrank.train.runtime import Runtime

CHECKPOINT_SHARE = 0.015  # the largest share of the time that writing checkpoints may take
DIVERGENCE_FACTOR = 2.0  # a training whose loss is above this times the base's has diverged
DIVERGENCE_WINDOW = 8  # steps over which the training loss is averaged before it is compared with the base's


@dataclass(frozen=True, slots=True)
class TrialFolders:
    checkpoint: Path  # file, while the trial runs
    adapter: Path  # folder, when it has finished
    continue_from: Path | None = None  # the checkpoint of the trial that this one resumes
    truncate_from: Path | None = None  # the adapter folder of the trial that this one truncates
    moments: Path | None = None  # file of the moments of that adapter (`covariances.py`)
    answers: Path | None = None  # file for the model's answers to the held-out examples, if a metric needs them


def adapter_name(trial: Trial) -> str:
    return f"arm_{trial.trial_id}"


@dataclass(eq=False)
class ArmTraining:
    """One arm's optimizer, progress and checkpoint; the passes over the base are shared.

    A training is over when it is done, or when `ended` says how it ended without a result.
    """

    _runtime: Runtime
    trial: Trial
    _multi_lora: MultiLora
    _base_loss: float | None
    folders: TrialFolders
    _listener: Listener

    def __post_init__(self) -> None:
        runtime, multi_lora, arm = self._runtime, self._multi_lora, self.trial.arm
        self.adapter = adapter_name(self.trial)
        self._settings = runtime.settings
        self._truncation: Literal["svd", "kfac"] | None = None
        config = runtime.config(arm)
        truncated = self._truncated(config)
        plan = runtime.batch_plan(arm.seed, arm.steps) if arm.steps else []  # a truncation is not trained
        named = multi_lora.add(self.adapter, arm, config)
        schedule = learning_rate_schedule(runtime.settings, arm.steps, arm.anneal_from, arm.stop_at)
        self._last_step = arm.end
        self.optimizer = ArmOptimizer(runtime, named, arm.learning_rate, plan, schedule)
        points = runtime.settings.eval_points
        self._evaluate_at = {max(1, round(arm.steps * number / points)) for number in range(1, points + 1)}
        self._saved = time.perf_counter()
        self._save_seconds = 0.0  # that writing the last checkpoint took
        self.pass_ranks = [arm.rank]  # of the adapters in the fullest pass so far, its own first
        self._scores: Scores | None = None  # of the last evaluation
        self._measured: tuple[int, Measured] | None = None  # the step, and the metrics after it
        self.ended: TrialDiverged | TrialFailed | None = None
        checkpoint = self._checkpoint()
        if checkpoint is not None:
            self.optimizer.restore(*checkpoint)
        elif truncated:
            set_peft_model_state_dict(multi_lora.peft_model, truncated, adapter_name=self.adapter)

    def _truncated(self, config: LoraConfig) -> dict[str, torch.Tensor]:
        """The tensors of a truncation, whose ranks go into `config`; none for an arm that starts from its first draw."""
        folders, arm = self.folders, self.trial.arm
        if folders.truncate_from is None:
            return {}
        moments = {} if folders.moments is None else load_moments(folders.moments)
        self._truncation = "kfac" if moments else "svd"
        return truncated_tensors(folders.truncate_from, arm.rank, config, moments)

    def _checkpoint(self) -> tuple[Mapping[str, torch.Tensor], Mapping[str, Any]] | None:
        """This trial's checkpoint, else that of the trial that it resumes; None: from step 0.

        A missing checkpoint of the resumed trial costs its steps again and changes no result.
        """
        folders = self.folders
        sources = ((folders.checkpoint, self.trial.trial_id), (folders.continue_from, self.trial.arm.continue_from))
        stored = (
            (tensors, state)
            for path, trial_id in sources
            if path is not None
            for tensors, state in filter(None, [load_checkpoint(path)])
            if state.get("trial_id") == trial_id
        )
        return next(stored, None)

    @property
    def progress(self) -> Progress:
        return self.optimizer.progress

    @property
    def is_done(self) -> bool:
        return self.progress.step >= self._last_step

    @property
    def wants_evaluation(self) -> bool:
        return self.ended is None and (self.is_done or self.progress.step in self._evaluate_at)

    @property
    def is_looked_at(self) -> bool:
        """Whether its next evaluation is a look, of the first `LOOK_ITEMS` examples: only the end of a whole training scores all."""
        return self.trial.arm.stop_at is not None or not self.is_done

    def arm_batch(self, batch: Batch, number: int) -> ArmBatch:
        """What this arm adds to the pass over micro-batch `number` of the step."""
        per_step = self._settings.gradient_accumulation_steps
        dropout_seed = (self.trial.arm.seed * 1_000_003 + self.progress.step) * per_step + number
        return ArmBatch(self.adapter, batch, 1 / self.optimizer.labels, dropout_seed)

    def end_step(self, seconds: float) -> None:
        """Report the step, or end a training whose loss is not finite or above `DIVERGENCE_FACTOR` times the base's."""
        progress = self.progress
        progress.train_seconds += seconds
        recent = progress.train_losses[-DIVERGENCE_WINDOW:]
        if not math.isfinite(recent[-1]):
            self._diverge(f"training loss is {recent[-1]}")
        elif len(recent) == DIVERGENCE_WINDOW:
            self._compare_with_base(sum(recent) / len(recent), "training")
        if self.ended is None:
            self._listener.on_event(
                StepDone(
                    trial_id=self.trial.trial_id,
                    step=progress.step,
                    steps=self.trial.arm.steps,
                    loss=recent[-1],
                    seconds=progress.train_seconds + progress.eval_seconds,
                )
            )

    def take_scores(self, scores: Scores, seconds: float) -> None:
        """Keep a held-out evaluation, or end a training whose loss is above `DIVERGENCE_FACTOR` times the base's."""
        progress = self.progress
        progress.eval_seconds += seconds
        self._scores = scores
        look = scores.first(LOOK_ITEMS)
        self._compare_with_base(look.loss, "held-out")
        # Not where it stops early: all have the same points.
        if self.ended is None and progress.step in self._evaluate_at:
            recent = progress.train_losses[progress.points[-1].step if progress.points else 0 :]
            value, train_value = self._point_value(look), sum(recent) / len(recent)
            progress.points.append(EvalPoint(step=progress.step, value=value, train_value=train_value))
            arm = self.trial.arm
            keeps_best = self._settings.checkpoint == "best" and arm.anneal_from is None
            if keeps_best and self._best_point().step == progress.step:
                self.optimizer.best = self.optimizer.parameters()

    def _best_point(self) -> EvalPoint:
        """The evaluation with the best value, the earliest of equal ones."""
        return best_point(self.progress.points, self._settings.is_higher_better(self._settings.points_metric))

    def _compare_with_base(self, loss: float, which: str) -> None:
        base = self._base_loss
        if base is not None and not loss <= DIVERGENCE_FACTOR * base:
            self._diverge(f"{which} loss {loss:.3f} is above {DIVERGENCE_FACTOR:g} × the base's {base:.3f}")

    def _diverge(self, reason: str) -> None:
        self.ended = TrialDiverged(**self.trial.fields, step=self.progress.step, reason=reason)

    def _point_value(self, scores: Scores) -> float:
        """The value of an evaluation point: the deciding metric if it is measured at points, otherwise the loss."""
        name = self._settings.points_metric
        if name in scores.metrics:
            return scores.metrics[name]
        self._measured = (self.progress.step, self._measure())
        self._measured[1].require([name])
        return self._measured[1].values[name]

    def _measure(self) -> Measured:
        """The metrics of answers and tasks under this arm alone, measured at most once per step."""
        if self._measured is not None and self._measured[0] == self.progress.step:
            return self._measured[1]
        begun = time.perf_counter()
        with self._multi_lora.alone(self.adapter):
            measured = measure(self._runtime, "selection", self.folders.answers)
        seconds = time.perf_counter() - begun
        self.progress.eval_seconds += seconds
        self.progress.answer_seconds = seconds
        return measured

    def finish(self, peak_bytes: int) -> TrialFinished:
        """Measure the end metrics, save the adapter, remove it from the base, and return the record.

        The checkpoint stays until the caller has stored the record.

        Raises:
            MetricError: the deciding metric gave no score; the adapter is still on the base.
        """
        arm, measured = self.trial.arm, Measured()
        scores = self._evaluate() if self._scores is None else self._scores  # None: resumed at its last step
        kept = self._take_best() if arm.is_direct and self.optimizer.best else None
        if arm.stop_at is None:
            scores = scores if kept is None else self._evaluate()
            measured = self._measure()
            measured.require([self._settings.metric_name])
            save_adapter(self._multi_lora.peft_model, self.folders.adapter, self._runtime.loaded.name, self.adapter)
        elif arm.anneal_from is None:
            self.save()  # another trial may resume from here
        self._multi_lora.remove(self.adapter)
        record = finished(self.trial, self._settings.metric_name, scores, measured, self.progress)
        return record.model_copy(
            update={
                "trainable_parameters": sum(parameter.numel() for parameter in self.optimizer.named.values()),
                "peak_bytes": peak_bytes,
                "adapters_per_pass": len(self.pass_ranks),
                "pass_ranks": self.pass_ranks,
                "truncation": self._truncation,
            }
            | ({} if kept is None else {"kept_step": kept.step, "train_value": kept.train_value})
        )

    def _take_best(self) -> EvalPoint | None:
        """Put the parameters of the best checkpoint in place; None where that is the last one."""
        best = self._best_point()
        if best.step == self.progress.step:
            return None
        self.optimizer.put(self.optimizer.best)
        self._measured = None
        return best

    def _evaluate(self) -> Scores:
        begun = time.perf_counter()
        scores = evaluate_looks(self._runtime, self._multi_lora, [self.adapter], self.is_looked_at)[0]
        self.progress.eval_seconds += time.perf_counter() - begun
        return scores

    @property
    def is_checkpoint_due(self) -> bool:
        """True after `checkpoint_seconds`, or later where writing would take more than `CHECKPOINT_SHARE` of the time."""
        waited = time.perf_counter() - self._saved
        return waited > max(self._settings.checkpoint_seconds, self._save_seconds / CHECKPOINT_SHARE)

    def save(self) -> None:
        begun = time.perf_counter()
        state = {"trial_id": self.trial.trial_id, **self.progress.model_dump()}
        save_checkpoint(self.folders.checkpoint, self.optimizer.tensors(), state)
        self._saved = time.perf_counter()
        self._save_seconds = self._saved - begun


def evaluate_looks(runtime: Runtime, multi_lora: MultiLora, adapters: Sequence[str], are_looks: bool) -> list[Scores]:
    """Scores of the validation split under each adapter: of its first `LOOK_ITEMS` examples, or of all."""
    if not are_looks:
        return runtime.evaluate_adapters("selection", multi_lora, adapters)
    looked_at = range(min(LOOK_ITEMS, len(runtime.data.splits["selection"])))
    scored = runtime.evaluate_adapters("selection", multi_lora, adapters, looked_at)
    return [scores.first(LOOK_ITEMS) for scores in scored]


def finished(trial: Trial, metric: str, scores: Scores, measured: Measured, progress: Progress) -> TrialFinished:
    """The record of a trial as of the base, which trains nothing; where `metric` was not measured, its value is the loss."""
    metrics = scores.metrics | measured.values
    return TrialFinished(
        **trial.fields,
        value=metrics.get(metric, scores.loss),
        value_metric=None if metric in metrics else "loss",
        metrics=metrics,
        **scores.fields(measured),
        failed_metrics=measured.failed,
        train_value=progress.points[-1].train_value if progress.points else None,
        trainable_parameters=0,
        peak_bytes=0,
        pass_ranks=[0],
        **progress.model_dump(exclude={"step"}),
    )
