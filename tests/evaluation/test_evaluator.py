"""An evaluator gives the losses of transformers' and TRL's trainers, with an adapter or without one, and knows no training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from rightrank.bases.base_models import load_base
from rightrank.data.splits import load_data
from rightrank.evaluation.attached_adapters import attach_adapter
from rightrank.evaluation.evaluator import Evaluator, build_evaluator
from rightrank.evaluation.tokens import encode_splits
from tests.tiny import build_small_settings, generate_sentences, write_jsonl

pytestmark = [pytest.mark.trains, pytest.mark.filterwarnings("ignore")]
EVERYTHING = 10_000  # rows in a batch: a trainer's loss is the mean over the tokens of a batch


def make_evaluator(model: Path, data: Path, cache: Path | None = None, **options: Any) -> Evaluator:
    settings = build_small_settings(**options)
    splits = load_data(data, settings)
    loaded = load_base(str(model), settings, splits.summary.classes)
    modules = [name for name, _ in loaded.model.named_modules() if "layers.2" in name]
    return build_evaluator(
        loaded, encode_splits(splits, loaded, settings), settings, adapted_modules=modules, cache_folder=cache
    )


def save_random_adapter(model: Any, folder: Path) -> Path:
    """Save an adapter of the last block whose B is not zero."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], layers_to_transform=[2])
    torch.manual_seed(1)
    peft_model = get_peft_model(model, config)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    peft_model.save_pretrained(folder)
    return folder


def list_validation_rows(evaluator: Evaluator) -> list[dict[str, Any]]:
    """Return the encoded validation examples in the columns of a trainer."""
    store = evaluator.data.splits["validation"]
    return [
        {"input_ids": list(store[index].input_ids), "labels": list(store[index].labels)} for index in range(len(store))
    ]


def evaluate_with_trainer(model: Any, rows: list[dict[str, Any]], collator: Any, folder: Path, **options: Any) -> Any:
    arguments = TrainingArguments(
        str(folder), per_device_eval_batch_size=EVERYTHING, use_cpu=True, report_to=[], disable_tqdm=True
    )
    return Trainer(model, arguments, eval_dataset=rows, data_collator=collator, **options).evaluate()


def pad_rows(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad ids and labels on the right, as every trainer of causal models does."""
    longest = max(len(row["input_ids"]) for row in rows)
    padded = {"input_ids": 1, "labels": -100}
    batch = {
        name: torch.tensor([list(row[name]) + [value] * (longest - len(row[name])) for row in rows])
        for name, value in padded.items()
    }
    return batch | {"attention_mask": (batch["input_ids"] != 1).long()}


@pytest.mark.parametrize("has_prefix", [False, True])
def test_a_language_model_has_the_loss_of_the_trainer_with_and_without_an_adapter(
    model_folder: Path, completion_file: Path, tmp_path: Path, has_prefix: bool
) -> None:
    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)

    adapter = save_random_adapter(load(), tmp_path / "adapter")
    evaluator = make_evaluator(model_folder, completion_file, tmp_path / "cache" if has_prefix else None)
    assert (evaluator.fast_paths.prefix is not None) is has_prefix
    rows = list_validation_rows(evaluator)
    base = evaluator.evaluate("validation")
    with attach_adapter(evaluator, adapter):
        adapted = evaluator.evaluate("validation")
    theirs = evaluate_with_trainer(load(), rows, pad_rows, tmp_path)["eval_loss"]
    assert base.loss == pytest.approx(theirs, rel=1e-5)
    adapted_model = PeftModel.from_pretrained(load(), adapter)
    theirs = evaluate_with_trainer(adapted_model, rows, pad_rows, tmp_path)["eval_loss"]
    assert adapted.loss == pytest.approx(theirs, rel=1e-5)
    assert abs(adapted.loss - base.loss) > 0.01
    assert evaluator.evaluate("validation") == base  # the adapter left nothing behind


def test_a_language_model_has_the_loss_of_sft(model_folder: Path, tmp_path: Path) -> None:
    """TRL tokenizes the same texts itself."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    texts = generate_sentences(120, seed=7)
    data = write_jsonl(tmp_path / "data.jsonl", [{"text": text} for text in texts])
    evaluator = make_evaluator(model_folder, data)
    held_out = [{"text": example.content["text"]} for example in evaluator.data.texts["validation"]]
    arguments = trl.SFTConfig(
        str(tmp_path), per_device_eval_batch_size=EVERYTHING, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True
    )
    trainer = trl.SFTTrainer(
        AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(held_out),
        eval_dataset=datasets.Dataset.from_list(held_out),
        processing_class=AutoTokenizer.from_pretrained(model_folder),
    )
    assert evaluator.evaluate("validation").loss == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)


def test_a_classifier_has_the_loss_and_the_accuracy_of_the_trainer(
    model_folder: Path, class_file: Path, tmp_path: Path
) -> None:
    evaluator = make_evaluator(model_folder, class_file)
    folder = tmp_path / "classifier"
    evaluator.model.save_pretrained(folder)  # with the head that was drawn
    scores = evaluator.evaluate("validation")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    rows = [{"input_ids": row["input_ids"], "label": row["labels"][0]} for row in list_validation_rows(evaluator)]
    theirs = evaluate_with_trainer(
        AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32),
        rows,
        DataCollatorWithPadding(tokenizer),
        tmp_path,
        compute_metrics=lambda found: {"accuracy": (found.predictions.argmax(-1) == found.label_ids).mean()},
    )
    assert scores.loss == pytest.approx(theirs["eval_loss"], rel=1e-5)
    assert scores.metrics["accuracy"] == pytest.approx(theirs["eval_accuracy"])


def test_some_examples_have_the_scores_that_they_have_among_all(model_folder: Path, completion_file: Path) -> None:
    evaluator = make_evaluator(model_folder, completion_file)
    scores = evaluator.evaluate("validation")
    some = evaluator.evaluate("validation", [3, 1])
    assert [some.losses[index] for index in (1, 3)] == pytest.approx([scores.losses[index] for index in (1, 3)])
    assert sum(map(bool, some.tokens)) == 2
