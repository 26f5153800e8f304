"""`SmallestAdapter`: what the end of a training with transformers' `Trainer` gives, and that the model stays as it is."""

from __future__ import annotations

import copy
import json
import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from rightrank import SmallestAdapter
from rightrank.adapters.live import LiveAdapter, smallest_adapter
from rightrank.adapters.live_scores import HeldOut, PairLoss, batch_scores
from rightrank.schema.errors import DataError, ModelError
from rightrank.train.evaluation import Scores

pytestmark = pytest.mark.trains
Rows = list[dict[str, list[int]]]


class Listed(torch.utils.data.Dataset[dict[str, list[int]]]):
    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.rows[index]


@pytest.fixture
def rows(model_folder: Path, completion_file: Path) -> Rows:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    found = []
    for line in completion_file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt, answer = tokenizer(row["prompt"])["input_ids"], tokenizer(row["completion"])["input_ids"]
        found.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return found


def peft_model(folder: Path, **changes: Any) -> Any:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(**{"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "lora_dropout": 0.1} | changes)
    return get_peft_model(base, config)


def trained(folder: Path, rows: Rows, out: Path, callbacks: Sequence[Any], **changes: Any) -> tuple[Trainer, Any]:
    model = peft_model(folder)
    settings: dict[str, Any] = {"max_steps": 60, "learning_rate": 1e-2, "per_device_train_batch_size": 8, "seed": 0}
    settings |= {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True}
    arguments = TrainingArguments(output_dir=str(out), **settings | changes)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    collator = DataCollatorForSeq2Seq(tokenizer, padding=True)
    trainer = Trainer(model, arguments, collator, Listed(rows[:140]), Listed(rows[140:]), callbacks=list(callbacks))
    trainer.train()
    return trainer, model


def scored(model: Any, batches: Sequence[Any]) -> Scores:
    return HeldOut(model, batches, "default", PairLoss()).scores()


def losses_by_peft(folder: Path, adapter: Path, rows: Rows) -> list[float]:
    """Of each row: a plain forward pass with the adapter as PEFT loads it."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), adapter).eval()
    with torch.no_grad():
        return [
            float(model(**{key: torch.tensor([value]) for key, value in row.items()}).loss)
            * (sum(label != -100 for label in row["labels"][1:]))
            for row in rows
        ]


def test_the_end_of_a_training_has_the_smallest_adapter(
    model_folder: Path, rows: Rows, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = SmallestAdapter(Listed(rows[140:]), margin=0.1)
    with caplog.at_level(logging.WARNING, "rightrank"):
        trainer, model = trained(model_folder, rows, tmp_path / "out", [callback])
    assert callback.result is not None
    answer = callback.result.answer
    folder = tmp_path / "out" / "rightrank"
    document = json.loads((folder / "decision.json").read_text(encoding="utf-8"))
    assert document["handed_over"]["rank"] == answer.rank < 16
    assert document["adapter_sentence"] == answer.sentence
    assert answer.sentence in caplog.text
    assert trainer.state.log_history[-1]["rightrank/rank"] == answer.rank
    assert f"truncated from rank {answer.trained_rank}" in (folder / "adapter" / "README.md").read_text(
        encoding="utf-8"
    )
    model.save_pretrained(tmp_path / "trained")
    before = losses_by_peft(model_folder, tmp_path / "trained", rows[140:])
    after = losses_by_peft(model_folder, folder / "adapter", rows[140:])
    tokens = sum(sum(label != -100 for label in row["labels"][1:]) for row in rows[140:])
    assert (sum(after) - sum(before)) / tokens == pytest.approx(answer.difference, abs=1e-4)


def test_a_training_with_it_is_the_same_to_the_bit(model_folder: Path, rows: Rows, tmp_path: Path) -> None:
    _, alone = trained(model_folder, rows, tmp_path / "alone", [], max_steps=8)
    _, watched = trained(model_folder, rows, tmp_path / "watched", [SmallestAdapter(Listed(rows[140:]))], max_steps=8)
    other = dict(watched.named_parameters())
    assert all(torch.equal(value, other[name]) for name, value in alone.named_parameters())


def test_the_model_is_given_back_as_it_came(model_folder: Path, rows: Rows, tmp_path: Path) -> None:
    model = peft_model(model_folder)
    model.train()
    model.base_model.model.model.layers[0].eval()
    batches = [{key: torch.tensor([value]) for key, value in row.items()} for row in rows[:40]]
    batch_scores(model, batches[0]).losses.sum().backward()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    needs = [parameter.requires_grad for parameter in model.parameters()]
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    configs, active = copy.deepcopy(model.peft_config), copy.deepcopy(model.active_adapter)
    layers = [copy.copy(vars(module)) for module in model.modules()]
    smallest_adapter(LiveAdapter(model, batches[20:], batches[:20], margin=1.0), tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert {name for name, value in model.named_parameters() if value.grad is not None} == set(gradients)
    assert all(
        torch.equal(value.grad, gradients[name]) for name, value in model.named_parameters() if name in gradients
    )
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert [parameter.requires_grad for parameter in model.parameters()] == needs
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]
    assert {name: vars(one) for name, one in model.peft_config.items()} == {n: vars(one) for n, one in configs.items()}
    assert model.active_adapter == active
    assert [vars(module) for module in model.modules()] == layers  # nothing is replaced, added or taken away


def test_examples_packed_in_one_row_have_their_own_losses(model_folder: Path, rows: Rows) -> None:
    model = peft_model(model_folder).eval()
    alone = scored(model, [{key: torch.tensor([value]) for key, value in row.items()} for row in rows[:3]])
    joined = {key: torch.tensor([[token for row in rows[:3] for token in row[key]]]) for key in ("input_ids", "labels")}
    joined["position_ids"] = torch.tensor([[index for row in rows[:3] for index in range(len(row["labels"]))]])
    packed = scored(model, [joined])
    assert packed.tokens == alone.tokens
    assert packed.losses[0] == pytest.approx(alone.losses[0], abs=1e-4)  # the first sees nothing before it


@pytest.mark.parametrize(
    ("changes", "data", "error"),
    [
        ({"use_dora": True}, "rows", ModelError),
        ({"r": 1}, "rows", ModelError),
        ({}, None, DataError),
        ({}, "texts", DataError),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(
    changes: dict[str, Any], data: str | None, error: type[Exception], model_folder: Path, rows: Rows, tmp_path: Path
) -> None:
    held_out = {"rows": rows[140:], "texts": [{"text": "a"}] * 40, None: None}[data]
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
    collator = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(model_folder), padding=True)
    callback = SmallestAdapter(held_out)
    trainer = Trainer(peft_model(model_folder, **changes), arguments, collator, Listed(rows[:16]), callbacks=[callback])
    with pytest.raises(error):
        trainer.train()
    assert trainer.state.global_step == 0


def test_what_fails_at_the_end_is_one_line(
    model_folder: Path, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rightrank.interop.smallest.smallest_adapter", full)
    with caplog.at_level(logging.WARNING, "rightrank"):
        trainer, _ = trained(model_folder, rows, tmp_path, [SmallestAdapter(Listed(rows[140:]))], max_steps=2)
    assert trainer.state.global_step == 2
    assert [record.getMessage() for record in caplog.records if record.name == "rightrank"] == [
        "rightrank: no smaller adapter was looked for: [Errno 28] No space left on device"
    ]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_end_of_a_trl_training(model_folder: Path, completion_file: Path, tmp_path: Path) -> None:
    """`SFTTrainer` tokenizes the rows itself, and its loss returns no logits when labels are passed."""
    datasets = pytest.importorskip("datasets")
    trl = pytest.importorskip("trl")
    rows = datasets.load_dataset("json", data_files=str(completion_file), split="train").train_test_split(60, seed=0)
    settings = trl.SFTConfig(
        output_dir=str(tmp_path / "out"),
        max_steps=40,
        learning_rate=1e-2,
        per_device_train_batch_size=8,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
    )
    trainer = trl.SFTTrainer(
        AutoModelForCausalLM.from_pretrained(model_folder),
        args=settings,
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        processing_class=AutoTokenizer.from_pretrained(model_folder),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )
    callback = SmallestAdapter(trainer.eval_dataset, margin=0.1)
    trainer.add_callback(callback)
    trainer.train()
    assert callback.result is not None
    top = next(one for one in callback.result.answer.candidates if one.rank == 16)
    evaluated = trainer.evaluate()["eval_loss"]
    assert top.value == pytest.approx(evaluated, rel=0.02)  # the trainer averages batches, not tokens
    assert (tmp_path / "out" / "rightrank" / "adapter" / "adapter_config.json").exists()


def test_the_curve_over_steps(model_folder: Path, rows: Rows, tmp_path: Path) -> None:
    """A point for each evaluation, and the training stays the same to the bit."""
    watched = SmallestAdapter(Listed(rows[140:]), margin=0.1, every_evaluation=True)
    _, alone = trained(model_folder, rows, tmp_path / "alone", [], eval_strategy="steps", eval_steps=4, max_steps=8)
    changes = {"eval_strategy": "steps", "eval_steps": 4, "max_steps": 8}
    trainer, model = trained(model_folder, rows, tmp_path / "watched", [watched], **changes)
    assert [step for step, _ in watched.curve] == [4, 8]
    assert [entry["rightrank/rank"] for entry in trainer.state.log_history if "rightrank/rank" in entry][:2] == [
        rank for _, rank in watched.curve
    ]
    other = dict(model.named_parameters())
    assert all(torch.equal(value, other[name]) for name, value in alone.named_parameters())
