"""The loss of preference pairs is that of DPO on every fast path, with the base as the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from rightrank.schema.errors import InterruptedRun
from rightrank.schema.events import Event, StepDone
from rightrank.schema.trials import Arm, Trial, TrialFinished
from rightrank.train.loop import run_trial
from rightrank.train.trial import TrialFolders
from tests.helpers import attach_fresh_adapter, make_runtime
from tests.tiny import build_small_settings, write_pairs
from tests.train.trials import train_ours
from tests.watch import Watch

ARM = Arm(rank=4, learning_rate=1e-2, lora_alpha=32.0, seed=3, steps=8)
LN2 = 0.6931471805599453


@pytest.fixture(scope="module")
def pair_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl")


def compute_dpo_loss(model: Any, batch: Any, reference: torch.Tensor, beta: float) -> torch.Tensor:
    """Compute the loss [b] by the formula, from all logits of the padded batch."""
    return -F.logsigmoid(beta * (log_probabilities(model, batch) - reference).view(-1, 2).diff(dim=1)[:, 0] * -1)


def log_probabilities(model: Any, batch: Any) -> torch.Tensor:
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1].log_softmax(-1)
    labels = batch.labels[:, 1:]
    chosen = logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return (chosen * (labels != -100)).sum(1)


@pytest.mark.parametrize(
    "changes",
    [{}, {"layers_to_transform": (2,)}, {"gradient_checkpointing": True}, {"seq_len": 12}],
    ids=["all-linear", "prefix", "checkpointing", "truncated"],
)
def test_a_training_is_a_plain_loop_over_the_formula(
    model_folder: Path, pair_file: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    settings = build_small_settings(beta=0.3, **changes)
    runtime = make_runtime(model_folder, pair_file, settings, tmp_path / "cache")
    assert (runtime.fast_paths.prefix is not None) == ("layers_to_transform" in changes)
    assert runtime.fast_paths.sequence_packing
    finished, ours, _ = train_ours(runtime, ARM, tmp_path)

    plain: list[float] = []
    with attach_fresh_adapter(runtime, ARM) as model:
        named = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(named, lr=ARM.learning_rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: compute_schedule_factor(step))
        for indices in runtime.plan_batches(ARM.seed):
            batch = runtime.make_batch("train", indices)
            with torch.no_grad(), model.disable_adapter():
                reference = log_probabilities(model, batch)
            loss = compute_dpo_loss(model, batch, reference, 0.3).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(named, settings.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            plain.append(float(loss.detach()))
        held_out = runtime.make_batch("validation", range(len(runtime.data.splits["validation"])))
        with torch.no_grad():
            losses = compute_dpo_loss(model, held_out, held_out.reference.float(), 0.3)
    assert ours == pytest.approx(plain, abs=2e-5)
    assert ours[0] == pytest.approx(LN2, abs=1e-6)
    assert finished.example_losses == pytest.approx(losses.tolist(), abs=2e-5)
    assert finished.metrics["reward_accuracy"] == pytest.approx(float((losses < LN2).float().mean()), abs=0.1)


def compute_schedule_factor(step: int) -> float:
    """Return the factor of a linear decay with a warm-up of 5% of 8 steps, as in transformers."""
    return step if step < 1 else (8 - step) / 7


def test_a_resumed_training_has_the_same_bits(model_folder: Path, pair_file: Path, tmp_path: Path) -> None:
    """Compute the reference again in another process, in the same batches."""
    settings = build_small_settings(layers_to_transform=(2,), seeds=(3,))
    uninterrupted, _, _ = train_ours(
        make_runtime(model_folder, pair_file, settings, tmp_path / "a"), ARM, tmp_path / "whole"
    )
    folders = TrialFolders(tmp_path / "checkpoint.safetensors", tmp_path / "adapter")
    steps: list[int] = []

    def note(event: Event) -> None:
        if isinstance(event, StepDone):
            steps.append(event.step)

    for stop in (4, 100):
        runtime = make_runtime(model_folder, pair_file, settings, tmp_path / f"b{stop}")
        observer = Watch(on_event=note, should_stop=lambda stop=stop: len(steps) == stop)
        try:
            outcome = run_trial(runtime, Trial(trial_id="t", arm=ARM), None, folders, observer)
        except InterruptedRun:
            assert stop == 4
    assert steps == list(range(1, 9))
    assert isinstance(outcome, TrialFinished)
    assert outcome.train_losses == uninterrupted.train_losses
    assert outcome.example_losses == uninterrupted.example_losses
