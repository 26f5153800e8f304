"""The looks of a training with a `Trainer`: held-out scores along the way, the collapse guard, the best checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from transformers import TrainerCallback

from rightrank.decision.collapse import best_point, should_stop_early
from rightrank.records import EvalPoint, TrialTask


class Looks(TrainerCallback):
    """Score the validation examples before the first step and at evenly spaced steps, and report each look to the task.

    The callback keeps the adapter of the best look, and ends a training that has collapsed for two looks (`should_stop_early`).
    """

    def __init__(
        self, task: TrialTask, score: Callable[[Any], list[float]], looks: int, higher_is_better: bool
    ) -> None:
        self.points: list[EvalPoint] = []
        self._task = task
        self._score = score  # of the model: the metric that decides, for each validation example
        self._looks = looks
        self._higher_is_better = higher_is_better
        self._best: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._look(model, 0)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        step, steps = state.global_step, state.max_steps
        due = {max(1, round(steps * number / self._looks)) for number in range(1, self._looks + 1)}
        if step not in due:
            return
        self._look(model, step)
        drop = self._task.collapse_drop
        if drop is not None and should_stop_early(self.points, drop, self._higher_is_better):
            control.should_training_stop = True

    def restore_best(self, model: Any) -> None:
        """Load the adapter of the best look into the model."""
        if self._best:
            set_peft_model_state_dict(model, self._best)

    def _look(self, model: Any, step: int) -> None:
        scores = self._score(model)
        value = sum(scores) / len(scores)
        self._task.report(step, value, scores)
        self.points.append(EvalPoint(step=step, value=value, item_scores=scores))
        if best_point(self.points, self._higher_is_better).step == step:
            state = get_peft_model_state_dict(model)
            self._best = {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}
