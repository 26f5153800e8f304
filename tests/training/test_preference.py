"""The loss of preference pairs is that of DPO on every fast path, and training equals TRL's `DPOTrainer` step by step."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from rightrank.schema.errors import InterruptedRun
from rightrank.schema.events import Event, StepDone
from rightrank.schema.trials import Arm, Trial, TrialFinished
from rightrank.training.loop import TrialFolders, train_trials
from tests.adapters.kind_checks import copy_initial_values, train_plain_loop
from tests.helpers import attach_fresh_adapter, make_runtime, run_trial, train_ours
from tests.tiny import build_small_settings, write_jsonl, write_pairs
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
    settings = build_small_settings(checkpoint="last", beta=0.3, **changes)
    runtime = make_runtime(model_folder, pair_file, settings, tmp_path / "cache")
    assert (runtime.evaluator.fast_paths.prefix is not None) == ("layers_to_transform" in changes)
    assert runtime.evaluator.fast_paths.sequence_packing
    finished, ours, _ = train_ours(runtime, ARM, tmp_path)

    def compute_loss(model: Any, batch: Any) -> torch.Tensor:
        with torch.no_grad(), model.disable_adapter():
            reference = log_probabilities(model, batch)
        return compute_dpo_loss(model, batch, reference, 0.3).mean()

    with attach_fresh_adapter(runtime, ARM) as model:
        plain = train_plain_loop(runtime, ARM, model, compute_loss)
        held_out = runtime.evaluator.make_batch("validation", range(len(runtime.data.splits["validation"])))
        with torch.no_grad():
            losses = compute_dpo_loss(model, held_out, held_out.reference.float(), 0.3)
    assert ours == pytest.approx(plain, abs=2e-5)
    assert ours[0] == pytest.approx(LN2, abs=1e-6)
    assert finished.example_losses == pytest.approx(losses.tolist(), abs=2e-5)
    assert finished.metrics["reward_accuracy"] == pytest.approx(float((losses < LN2).float().mean()), abs=0.1)


def test_a_resumed_training_has_the_same_bits(model_folder: Path, pair_file: Path, tmp_path: Path) -> None:
    """Compute the reference again in another process, in the same batches."""
    settings = build_small_settings(checkpoint="last", layers_to_transform=(2,), seeds=(3,))
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


TRL_ARM = Arm(rank=4, learning_rate=1e-2, lora_alpha=32.0, seed=3, steps=8)
OTHER = TRL_ARM.model_copy(update={"rank": 2, "learning_rate": 3e-2})
BOUND = 2e-5


def write_rows(path: Path, form: str) -> Path:
    """Write the pairs of `write_pairs`, optionally as conversations or with an implicit prompt."""
    rows = [json.loads(line) for line in write_pairs(path).read_text(encoding="utf-8").splitlines()]
    if form == "messages":
        rows = [
            {"prompt": [{"role": "user", "content": row["prompt"]}]}
            | {name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")}
            for row in rows
        ]
    if form == "implicit":
        rows = [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in rows]
    return write_jsonl(path, rows)


def train_in_one_pass(runtime: Any, folder: Path, arms: list[Arm]) -> tuple[list[float], TrialFinished]:
    """Train all arms in one pass; return the step losses of the first arm, and its outcome."""
    losses: list[float] = []

    def note(event: Any) -> None:
        if isinstance(event, StepDone) and event.trial_id == "t0":
            losses.append(event.loss)

    trials = [Trial(trial_id=f"t{number}", arm=arm) for number, arm in enumerate(arms)]
    outcomes = train_trials(
        runtime,
        trials,
        None,
        lambda trial: TrialFolders(folder / f"{trial.trial_id}.safetensors", folder / trial.trial_id),
        Watch(on_event=note),
        len(arms),
    )
    first_outcome = {outcome.trial_id: outcome for outcome in outcomes}["t0"]
    assert isinstance(first_outcome, TrialFinished)
    return losses, first_outcome


def train_with_trl(runtime: Any, model_folder: Path, data: Path, folder: Path) -> tuple[list[float], float]:
    """Train with TRL over the same batches in the same order; return its step losses and its held-out loss."""
    from tests.training.trl_trainer import make_trainer

    trainer = make_trainer(runtime, TRL_ARM, model_folder, data, folder)
    copy_initial_values(runtime, TRL_ARM, trainer.model)
    trainer.train()
    return list(trainer.losses), trainer.evaluate()["eval_loss"]


@pytest.mark.trains
@pytest.mark.skipif(find_spec("trl") is None, reason="trl is not installed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("form", "changes"),
    [
        ("strings", {}),
        ("messages", {"layers_to_transform": (2,), "beta": 0.3, "seq_len": 64}),
        ("implicit", {"seq_len": 16}),
    ],
    ids=["strings", "messages-prefix", "implicit-truncated"],
)
def test_each_step_has_the_loss_of_trl(model_folder: Path, tmp_path: Path, form: str, changes: dict[str, Any]) -> None:
    data = write_rows(tmp_path / "pairs.jsonl", form)
    runtime = make_runtime(model_folder, data, build_small_settings(checkpoint="last", **changes), tmp_path / "cache")
    their_losses, their_held_out = train_with_trl(runtime, model_folder, data, tmp_path / "trl")
    for arms in ([TRL_ARM], [TRL_ARM, OTHER]):
        losses, finished = train_in_one_pass(runtime, tmp_path / f"ours-{len(arms)}", arms)
        assert losses == pytest.approx(their_losses, abs=BOUND)
        assert finished.metrics["loss"] == pytest.approx(their_held_out, abs=BOUND)
    assert abs(losses[-1] - losses[0]) > 0.01
