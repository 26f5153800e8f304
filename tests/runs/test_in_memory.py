"""Test models, tokenizers and data sets that are already in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rightrank import preflight, select_rank
from rightrank.schema.errors import ModelError, SettingsError
from tests.tiny import build_small_settings


def load_model(folder: Path, classes: int | None = None) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if classes is None:
        return AutoModelForCausalLM.from_pretrained(folder), tokenizer
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=classes), tokenizer


def test_objects_in_memory_give_the_same_run_as_folders(
    model_folder: Path, completion_file: Path, tmp_path: Path
) -> None:
    from datasets import load_dataset

    settings = build_small_settings(max_steps=3, num_evaluations=1)
    model, tokenizer = load_model(model_folder)
    rows = load_dataset("json", data_files=str(completion_file), split="train", cache_dir=str(tmp_path / "cache"))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    mine = select_rank(model, rows, tmp_path / "mine", tokenizer=tokenizer, settings=settings)
    base_settings = build_small_settings(num_evaluations=1)  # without the keyword, 8 steps
    by_name = select_rank(str(model_folder), completion_file, tmp_path / "named", settings=base_settings, max_steps=3)
    assert [e.value for e in mine.decision.ranks] == [e.value for e in by_name.decision.ranks]
    assert all((model.state_dict()[name] == value).all() for name, value in weights.items())
    assert set(model.state_dict()) == set(weights)
    assert "objects in memory" in mine.report.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("argument", "error", "message"),
    [
        ("no tokenizer", ModelError, "it is in memory and has no tokenizer"),
        ("not a model", ModelError, "got a dict; give a transformers model"),
        ("named", SettingsError, "a model that is given by name has its own"),
        ("wrong head", ModelError, "a head of 5 labels for data of 2 classes"),
    ],
)
def test_bad_objects_are_one_line(
    model_folder: Path,
    completion_file: Path,
    class_file: Path,
    tmp_path: Path,
    argument: str,
    error: type[Exception],
    message: str,
) -> None:
    model, tokenizer = load_model(model_folder, 5 if argument == "wrong head" else None)
    arguments: dict[str, Any] = {"model": model, "data": completion_file, "tokenizer": tokenizer}
    arguments |= {
        "no tokenizer": {"tokenizer": None},
        "not a model": {"model": {}},
        "named": {"model": str(model_folder)},
        "wrong head": {"data": class_file},
    }[argument]
    with pytest.raises(error, match=message):
        select_rank(out=tmp_path / "run", settings=build_small_settings(), **arguments)


@pytest.mark.parametrize(
    ("config_values", "message"),
    [
        ({"task_type": "SEQ_CLS"}, "task_type: got 'SEQ_CLS', and this is 'CAUSAL_LM'"),
        ({"task_type": "FEATURE_EXTRACTION"}, "task_type: got 'FEATURE_EXTRACTION', and this is 'CAUSAL_LM'"),
        ({"base_model_name_or_path": "org/other"}, "base_model_name_or_path: got 'org/other', but the model is"),
    ],
)
@pytest.mark.parametrize("by", ["config", "settings", "keyword", "in memory"])
def test_lora_config_must_agree_with_the_run(
    model_folder: Path, completion_file: Path, tmp_path: Path, config_values: dict[str, Any], message: str, by: str
) -> None:
    from peft import LoraConfig

    model, tokenizer = load_model(model_folder) if by == "in memory" else (str(model_folder), None)
    keywords: dict[str, Any] = {"peft_config": LoraConfig(**config_values), "settings": build_small_settings()}
    if by in ("settings", "keyword"):
        keywords = {"settings": build_small_settings(**config_values)} if by == "settings" else config_values
    with pytest.raises(ModelError, match=message):
        select_rank(model, completion_file, tmp_path / "run", tokenizer=tokenizer, **keywords)


def test_lora_config_of_a_classifier(model_folder: Path, class_file: Path) -> None:
    config_values = {"task_type": "SEQ_CLS", "base_model_name_or_path": f"elsewhere/{model_folder.name}"}
    assert preflight(str(model_folder), class_file, settings=build_small_settings(**config_values)).metric == "loss"
    with pytest.raises(ModelError, match="task_type: got 'CAUSAL_LM', and this is 'SEQ_CLS'"):
        preflight(str(model_folder), class_file, settings=build_small_settings(task_type="CAUSAL_LM"))
