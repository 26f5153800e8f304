"""Our training on preference pairs is that of TRL's `DPOTrainer`: same batches, same first A, step by step."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.kinds.checks import with_first_values
from transformers import AutoModelForCausalLM, AutoTokenizer

from rightrank.engine.arm_training import TrialFolders
from rightrank.engine.targets import lora_config
from rightrank.engine.training_loop import train_trials
from rightrank.io.data import load_data
from rightrank.records import Arm, StepDone, Trial, TrialFinished
from rightrank.records.observer import Observer
from tests.helpers import make_runtime
from tests.tiny import small_settings, write_jsonl, write_pairs

trl: Any = pytest.importorskip("trl", reason="trl is not installed")
pytestmark = [pytest.mark.trains, pytest.mark.filterwarnings("ignore")]  # warnings of TRL and of what it imports

ARM = Arm(rank=4, learning_rate=1e-2, lora_alpha=32.0, seed=3, steps=8)
OTHER = ARM.model_copy(update={"rank": 2, "learning_rate": 3e-2})
BOUND = 2e-5


def rows_of(path: Path, form: str) -> Path:
    """The pairs of `write_pairs`, also as conversations or with an implicit prompt."""
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


def ours(runtime: Any, folder: Path, arms: list[Arm]) -> tuple[list[float], TrialFinished]:
    """Losses of the first arm's steps, and its outcome; all arms in one pass."""
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
        Observer(on_event=note),
        len(arms),
    )
    found = {outcome.trial_id: outcome for outcome in outcomes}["t0"]
    assert isinstance(found, TrialFinished)
    return losses, found


def theirs(runtime: Any, model_folder: Path, data: Path, folder: Path) -> tuple[list[float], float]:
    """Losses of TRL's steps over our batches in our order, and its held-out loss."""
    from datasets import Dataset

    settings = runtime.settings
    splits = load_data(data, settings)
    content = {one.item_id: dict(one.content) for split in ("train", "selection") for one in splits.examples[split]}
    order = [runtime.examples("train")[index] for batch in runtime.batch_plan(ARM.seed) for index in batch]
    losses: list[float] = []

    class Recording(trl.DPOTrainer):  # type: ignore[misc] # untyped here
        def compute_loss(self, *arguments: Any, **named: Any) -> Any:
            found = super().compute_loss(*arguments, **named)
            if self.model.training:
                losses.append(float(found.detach()))
            return found

    trainer = Recording(
        AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32),
        args=trl.DPOConfig(
            output_dir=str(folder),
            beta=settings.beta,
            max_length=settings.seq_len,
            learning_rate=ARM.learning_rate,
            max_steps=ARM.steps,
            per_device_train_batch_size=settings.batch_size,
            per_device_eval_batch_size=settings.eval_items,
            train_sampling_strategy="sequential",
            lr_scheduler_type="linear",
            warmup_steps=math.ceil(settings.warmup_ratio * ARM.steps),
            max_grad_norm=settings.max_grad_norm,
            gradient_checkpointing=False,
            disable_dropout=True,
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([content[example.item_id] for example in order]),
        eval_dataset=Dataset.from_list([content[example.item_id] for example in runtime.examples("selection")]),
        processing_class=AutoTokenizer.from_pretrained(model_folder),
        peft_config=lora_config(settings, ARM, False, runtime.targets.names),
    )
    with_first_values(runtime, ARM, trainer.model)
    trainer.train()
    return losses, trainer.evaluate()["eval_loss"]


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
    data = rows_of(tmp_path / "pairs.jsonl", form)
    runtime = make_runtime(model_folder, data, small_settings(**changes), tmp_path / "cache")
    their_losses, their_held_out = theirs(runtime, model_folder, data, tmp_path / "trl")
    for arms in ([ARM], [ARM, OTHER]):
        losses, finished = ours(runtime, tmp_path / f"ours-{len(arms)}", arms)
        assert losses == pytest.approx(their_losses, abs=BOUND)
        assert finished.metrics["loss"] == pytest.approx(their_held_out, abs=BOUND)
    assert abs(losses[-1] - losses[0]) > 0.01
