"""Shortcuts that several test files share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper

from rightrank.bases.base_models import load_base
from rightrank.data.splits import load_data
from rightrank.evaluation.peft_models import ADAPTER, find_lora_modules
from rightrank.evaluation.tokens import encode_splits
from rightrank.schema.events import Event, Listener, StepDone
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import Arm, Trial, TrialFinished, TrialOutcome
from rightrank.training.loop import TrialFolders, train_trials
from rightrank.training.multi_lora import MultiLora
from rightrank.training.runtime import Runtime, build_runtime
from tests.watch import Watch


def make_runtime(model: Path, data: Path, settings: SelectSettings, cache: Path | None) -> Runtime:
    """Build the runtime that `select_rank` builds before the first trial."""
    splits = load_data(data, settings)
    loaded = load_base(str(model), settings, splits.summary.classes)
    encoded = encode_splits(splits, loaded, settings)
    return build_runtime(loaded, encoded, settings, settings.count_training_steps(len(encoded.splits["train"])), cache)


def run_trial(
    runtime: Any, trial: Trial, base_loss: float | None, folders: TrialFolders, listener: Listener
) -> TrialOutcome:
    """Train one trial alone."""
    return next(train_trials(runtime, [trial], base_loss, lambda _: folders, listener))


@contextmanager
def attach_fresh_adapter(runtime: Runtime, arm: Arm) -> Iterator[Any]:
    """Yield the PeftModel of a freshly initialised arm in training mode, with PEFT's own forward pass."""
    with MultiLora(runtime.model, runtime.settings) as multi_lora:
        multi_lora.add(ADAPTER, arm, runtime.make_config(arm))
        for module in multi_lora.peft_model.modules():
            if isinstance(module, LoraLayer | ModulesToSaveWrapper):
                del vars(module)["forward"]  # that of several adapters
        for module in find_lora_modules(multi_lora.peft_model).values():
            module.training = True  # which DoRA asks for before it drops anything out
            module.lora_dropout.train()
        with runtime.use_gradient_checkpointing():
            yield multi_lora.peft_model


def list_trainable_parameters(peft_model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in peft_model.named_parameters() if parameter.requires_grad}


def train_ours(runtime: Any, arm: Arm, tmp_path: Path) -> tuple[TrialFinished, list[float], Path]:
    losses: list[float] = []

    def note(event: Event) -> None:
        if isinstance(event, StepDone):
            losses.append(event.loss)

    folders = TrialFolders(tmp_path / "checkpoint.safetensors", tmp_path / "adapter")
    trial = Trial(trial_id="t", arm=arm)
    outcome = run_trial(runtime, trial, None, folders, Watch(on_event=note))
    assert isinstance(outcome, TrialFinished)
    return outcome, losses, folders.adapter
