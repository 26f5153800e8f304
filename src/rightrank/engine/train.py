"""Training one arm from its seed to its result, with checkpoints on the way.

Everything is a function of the settings, the arm and the step number: a training that was interrupted and goes on
from a checkpoint ends with the same values as one that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import set_peft_model_state_dict
from transformers import get_scheduler

from rightrank.engine.adapter import trainable_parameters, trainable_state
from rightrank.engine.bench import Bench, Scores
from rightrank.engine.memory import PeakMemory
from rightrank.engine.truncate import truncated_adapter
from rightrank.errors import InterruptedRun
from rightrank.io.adapters import save_adapter
from rightrank.io.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from rightrank.records import Arm, EvalPoint, Preparing, StepDone, Trial, TrialDiverged, TrialFinished
from rightrank.settings import SelectSettings

DIVERGENCE_WINDOW = 8  # steps over which the training loss is averaged before it is called diverged

ShouldStop = Callable[[], bool]


@dataclass(frozen=True, slots=True)
class TrialFolders:
    """Where a trial leaves things: a checkpoint while it runs, its adapter when it has finished; and its parent's."""

    checkpoint: Path
    adapter: Path
    continue_from: Path | None = None  # the checkpoint of the trial that this one goes on from
    truncate_from: Path | None = None  # the adapter of the trial that this one is cut from


@dataclass(frozen=True, slots=True)
class Watcher:
    """Who looks on: told of each step, asked whether to stop."""

    on_step: Callable[[StepDone], None] = lambda _: None
    on_prepare: Callable[[Preparing], None] = lambda _: None
    should_stop: ShouldStop = lambda: False


class _Diverged(Exception):  # noqa: N818 - an outcome, turned into a record by run_trial
    def __init__(self, step: int, reason: str) -> None:
        super().__init__(reason)
        self.step = step
        self.reason = reason


@dataclass(slots=True)
class _Progress:
    """What a training has so far; all of it goes into a checkpoint."""

    step: int = 0
    train_losses: list[float] = field(default_factory=list)  # nats a label, one for each step
    points: list[EvalPoint] = field(default_factory=list)
    train_seconds: float = 0.0
    train_tokens: int = 0
    eval_seconds: float = 0.0


def run_trial(
    bench: Bench, trial: Trial, base_loss: float | None, folders: TrialFolders, watcher: Watcher
) -> TrialFinished | TrialDiverged:
    """Train (or, for rank 0, only evaluate) a trial and save its adapter.

    `base_loss` is the base's held-out loss, against which divergence is judged; None only for the base itself.

    Raises:
        InterruptedRun: the watcher asked to stop; a checkpoint was written.
    """
    with PeakMemory(bench.loaded.device) as memory, bench.arm(trial.arm) as peft_model:
        if trial.arm.rank == 0:
            progress = _Progress()
            scores = _timed_evaluation(bench, progress)
            return _finished(trial, bench, progress, scores, 0, memory.peak_bytes())
        training = _Training(bench, trial, peft_model, base_loss, folders, watcher)
        try:
            scores = training.run()
        except _Diverged as diverged:
            folders.checkpoint.unlink(missing_ok=True)
            return TrialDiverged(
                trial_id=trial.trial_id, **trial.arm.model_dump(), step=diverged.step, reason=diverged.reason
            )
        if trial.arm.stop_at is None:
            save_adapter(peft_model, folders.adapter, bench.loaded.name)
            folders.checkpoint.unlink(missing_ok=True)
        else:
            training.save()  # another trial may go on from here
        count = sum(parameter.numel() for parameter in trainable_parameters(peft_model))
        return _finished(trial, bench, training.progress, scores, count, memory.peak_bytes())


class _Training:
    """The loop of one arm."""

    def __init__(
        self,
        bench: Bench,
        trial: Trial,
        peft_model: Any,
        base_loss: float | None,
        folders: TrialFolders,
        watcher: Watcher,
    ) -> None:
        self._bench = bench
        self._trial = trial
        self._peft_model = peft_model
        self._base_loss = base_loss
        self._folders = folders
        self._watcher = watcher
        self._settings = bench.settings
        self._parameters = trainable_parameters(peft_model)
        self._optimizer = make_optimizer(self._parameters, trial.arm.learning_rate, bench.settings)
        self._rate_factor = rate_schedule(bench.settings, trial.arm.steps)
        self._plan = training_batches(bench, trial.arm)
        self._last_step = trial.arm.steps if trial.arm.stop_at is None else trial.arm.stop_at
        self._evaluate_at = evaluation_steps(trial.arm.steps, bench.settings.eval_points)
        self.progress = _Progress()

    def run(self) -> Scores:
        """All steps that are left; the scores of the last evaluation."""
        self._start()
        progress, steps = self.progress, self._last_step
        saved = time.perf_counter()
        scores: Scores | None = None
        while progress.step < steps:
            begun = time.perf_counter()
            loss = self._step(self._plan[progress.step])
            progress.step += 1
            progress.train_losses.append(loss)
            progress.train_seconds += time.perf_counter() - begun
            self._judge(loss)
            if progress.step in self._evaluate_at or progress.step == steps:
                scores = self._evaluate()
            self._report(loss)
            stopping = progress.step < steps and self._watcher.should_stop()
            if stopping or time.perf_counter() - saved > self._settings.checkpoint_seconds:
                self.save()
                saved = time.perf_counter()
            if stopping:
                raise InterruptedRun(f"stopped at step {progress.step} of {steps} of {self._trial.arm.label()}")
        return scores if scores is not None else _timed_evaluation(self._bench, progress)

    def _step(self, indices: list[int]) -> float:
        """One optimizer step over the micro-batches of `indices`; the mean loss, nats a label."""
        settings = self._settings
        micro_batches = [
            self._bench.batch("train", indices[start : start + settings.batch_size])
            for start in range(0, len(indices), settings.batch_size)
        ]
        classification = self._bench.data.is_classification
        labels = sum(
            len(batch.indices) if classification else int((batch.labels[:, 1:] != -100).sum())
            for batch in micro_batches
        )
        rate = self._trial.arm.learning_rate * self._rate_factor(self.progress.step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(self._trial.arm.seed * 1_000_003 + self.progress.step)  # of adapter dropout
        loss_sum = 0.0
        for batch in micro_batches:
            result = self._bench.losses("train", batch, 1 / labels)
            torch.autograd.backward(result.total)
            loss_sum += float(result.item_losses.sum())
            self.progress.train_tokens += batch.tokens
        if settings.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(self._parameters, settings.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss_sum / labels

    def _judge(self, loss: float) -> None:
        """End a training that can only get worse."""
        if not math.isfinite(loss):
            raise _Diverged(self.progress.step, f"training loss is {loss}")
        recent = self.progress.train_losses[-DIVERGENCE_WINDOW:]
        self._compare_with_base(sum(recent) / len(recent), "training", len(recent) == DIVERGENCE_WINDOW)

    def _compare_with_base(self, loss: float, which: str, enough: bool = True) -> None:
        limit = math.inf if self._base_loss is None else self._settings.divergence_factor * self._base_loss
        if enough and not loss <= limit:
            raise _Diverged(
                self.progress.step,
                f"{which} loss {loss:.3f} is above {self._settings.divergence_factor:g} × the base's {self._base_loss:.3f}",
            )

    def _evaluate(self) -> Scores:
        progress = self.progress
        scores = _timed_evaluation(self._bench, progress)
        self._compare_with_base(scores.loss, "held-out")
        since = progress.points[-1].step if progress.points else 0
        recent = progress.train_losses[since:]
        value = scores.metrics[self._settings.metric]
        if progress.step in self._evaluate_at:  # not where a rate is stopped early: points are the same for every arm
            progress.points.append(EvalPoint(step=progress.step, value=value, train_value=sum(recent) / len(recent)))
        return scores

    def _report(self, loss: float) -> None:
        progress = self.progress
        self._watcher.on_step(
            StepDone(
                trial_id=self._trial.trial_id,
                step=progress.step,
                steps=self._trial.arm.steps,
                loss=loss,
                seconds=progress.train_seconds + progress.eval_seconds,
            )
        )

    def save(self) -> None:
        progress = self.progress
        tensors = {f"parameter.{name}": value for name, value in trainable_state(self._peft_model).items()}
        for index, parameter in enumerate(self._parameters):
            for key, value in self._optimizer.state[parameter].items():
                tensors[f"optimizer.{index}.{key}"] = torch.as_tensor(value)
        state = {
            "trial_id": self._trial.trial_id,
            "step": progress.step,
            "train_losses": progress.train_losses,
            "points": [point.model_dump() for point in progress.points],
            "train_seconds": progress.train_seconds,
            "train_tokens": progress.train_tokens,
            "eval_seconds": progress.eval_seconds,
        }
        save_checkpoint(self._folders.checkpoint, Checkpoint(tensors, state))

    def _start(self) -> None:
        """From a checkpoint of this very trial if there is one; else from its parent; else from the first draw.

        A parent's checkpoint that is lost costs its steps again and changes no result.
        """
        arm, folders = self._trial.arm, self._folders
        if self._resume(folders.checkpoint, self._trial.trial_id):
            return
        if folders.continue_from is not None and arm.continue_from is not None:
            self._resume(folders.continue_from, arm.continue_from)
        if folders.truncate_from is not None:
            tensors = truncated_adapter(folders.truncate_from, arm, self._settings)
            set_peft_model_state_dict(self._peft_model, tensors)

    def _resume(self, checkpoint: Path, trial_id: str) -> bool:
        """Go on from a checkpoint, if it is there and of that trial."""
        found = load_checkpoint(checkpoint)
        if found is None or found.state.get("trial_id") != trial_id:
            return False
        with torch.no_grad():
            for name, value in trainable_state(self._peft_model).items():
                value.copy_(found.tensors[f"parameter.{name}"])
        for index, parameter in enumerate(self._parameters):
            self._optimizer.state[parameter] = _optimizer_state(found.tensors, index, parameter)
        state = found.state
        self.progress = _Progress(
            step=state["step"],
            train_losses=state["train_losses"],
            points=[EvalPoint.model_validate(point) for point in state["points"]],
            train_seconds=state["train_seconds"],
            train_tokens=state["train_tokens"],
            eval_seconds=state["eval_seconds"],
        )
        return True


def training_batches(bench: Bench, arm: Arm) -> list[list[int]]:
    """The batches of an arm's steps; recovery after a cut takes those that follow a whole training's."""
    if arm.truncate_from is None:
        return bench.batch_plan(arm.seed)[: arm.steps]
    return bench.batch_plan(arm.seed, bench.steps + arm.steps)[bench.steps :]


def make_optimizer(parameters: list[torch.nn.Parameter], rate: float, settings: SelectSettings) -> torch.optim.AdamW:
    """AdamW over the adapter, fused where the device has it."""
    return torch.optim.AdamW(
        parameters,
        lr=rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
        fused=parameters[0].device.type in ("cpu", "cuda"),
    )


def rate_schedule(settings: SelectSettings, steps: int) -> Callable[[int], float]:
    """transformers' schedule as a pure function of the step: the factor on the learning rate."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    warmup = math.ceil(settings.warmup_ratio * steps)
    name = "constant_with_warmup" if settings.lr_scheduler_type == "constant" else settings.lr_scheduler_type
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    factor: Callable[[int], float] = scheduler.lr_lambdas[0]
    return factor


def evaluation_steps(steps: int, points: int) -> set[int]:
    """The steps after which to evaluate: `points` of them, evenly spaced, the last step always."""
    return {max(1, round(steps * number / points)) for number in range(1, points + 1)}


def _timed_evaluation(bench: Bench, progress: _Progress) -> Scores:
    begun = time.perf_counter()
    scores = bench.evaluate("selection")
    progress.eval_seconds += time.perf_counter() - begun
    return scores


def _optimizer_state(
    tensors: Mapping[str, torch.Tensor], index: int, parameter: torch.Tensor
) -> dict[str, torch.Tensor]:
    prefix = f"optimizer.{index}."
    state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    return {key: value if value.dim() == 0 else value.to(parameter.device) for key, value in state.items()}


def _finished(
    trial: Trial, bench: Bench, progress: _Progress, scores: Scores, parameters: int, peak_bytes: int
) -> TrialFinished:
    return TrialFinished(
        trial_id=trial.trial_id,
        **trial.arm.model_dump(),
        value=scores.metrics[bench.settings.metric],
        metrics=scores.metrics,
        item_losses=scores.losses,
        item_tokens=scores.tokens,
        item_correct=scores.correct,
        train_value=progress.points[-1].train_value if progress.points else None,
        points=progress.points,
        trainable_parameters=parameters,
        train_seconds=progress.train_seconds,
        train_tokens=progress.train_tokens,
        eval_seconds=progress.eval_seconds,
        peak_bytes=peak_bytes,
    )
