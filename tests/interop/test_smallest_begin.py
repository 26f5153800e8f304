"""The begin of a training with `SmallestAdapter`: what is refused before the first step, and that rows are read without a trace."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from rightrank import SmallestAdapter
from rightrank.interop.end_run import measure_again
from rightrank.schema.errors import DataError, InputError, ModelError, SettingsError
from tests.interop.trainings import Listed, OneShot, Rows, peft_model

pytestmark = pytest.mark.trains


def trainer_of(
    model: Any, folder: Path, out: Path, train: Any, held_out: Any, *callbacks: Any, **changes: Any
) -> Trainer:
    settings: dict[str, Any] = {"max_steps": 4, "learning_rate": 1e-2, "save_strategy": "no", "seed": 0}
    settings |= {"report_to": [], "disable_tqdm": True, "use_cpu": True, "per_device_train_batch_size": 8}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Trainer(
        model,
        TrainingArguments(output_dir=str(out), **settings | changes),
        DataCollatorForSeq2Seq(tokenizer, padding=True),
        train,
        held_out,
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )


def refused(trainer: Trainer, error: type[InputError]) -> str:
    with pytest.raises(error) as raised:
        trainer.train()
    assert trainer.state.global_step == 0
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("changes", "given", "error", "words"),
    [
        ({"target_modules": ["embed_tokens", "q_proj"]}, {}, ModelError, "embed_tokens.*linear layers"),
        ({"init_lora_weights": "pissa"}, {}, ModelError, "pissa.*changes the base"),
        ({"init_lora_weights": "olora"}, {}, ModelError, "olora.*changes the base"),
        ({}, {"ranks": [64]}, SettingsError, "rank 64 cannot be reached"),
        ({}, {"ranks": [0, 2]}, SettingsError, "rank 0 is not allowed"),
        ({}, {"ranks": 32}, SettingsError, "rank 32 cannot be reached"),
        ({}, {"margin": float("nan")}, SettingsError, "margin"),
        ({}, {"margin": "1%"}, SettingsError, "margin"),
        ({}, {"margin": -1}, SettingsError, "margin"),
        ({}, {"max_examples": 1}, SettingsError, "max_examples 1: give a whole number from 2"),
    ],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word")
def test_a_wrong_value_is_refused(
    changes: dict[str, Any],
    given: dict[str, Any],
    error: type[InputError],
    words: str,
    model_folder: Path,
    rows: Rows,
    tmp_path: Path,
) -> None:
    callback = SmallestAdapter(Listed(rows[140:]), **given)
    model = peft_model(model_folder, **changes)
    message = refused(trainer_of(model, model_folder, tmp_path, Listed(rows[:40]), None, callback), error)
    assert re.search(words, message)


def without_labels(rows: Rows) -> Rows:
    return [row | {"labels": [-100] * len(row["labels"])} for row in rows]


@pytest.mark.parametrize(
    ("held_out", "words"),
    [
        (lambda rows: Listed(without_labels(rows[140:])), "fewer than two held-out rows have a label"),
        (lambda rows: Listed([*without_labels(rows[140:160]), rows[160]]), "fewer than two held-out rows have a label"),
        (lambda rows: [(row["input_ids"], row["labels"]) for row in rows[140:]], "a row is a tuple"),
        (lambda rows: [row["input_ids"] for row in rows[140:]], "a row is a list"),
    ],
)
def test_rows_without_a_loss_are_refused(
    held_out: Callable[[Rows], Any], words: str, model_folder: Path, rows: Rows, tmp_path: Path
) -> None:
    callback = SmallestAdapter(held_out(rows))
    trainer = trainer_of(peft_model(model_folder), model_folder, tmp_path, Listed(rows[:40]), None, callback)
    assert words in refused(trainer, DataError)


def test_an_adapter_active_beside_the_trained_one_is_refused(model_folder: Path, rows: Rows, tmp_path: Path) -> None:
    model = peft_model(model_folder)
    model.add_adapter("frozen", LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["frozen", "default"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("default" in name)
    trainer = trainer_of(model, model_folder, tmp_path, Listed(rows[:40]), None, SmallestAdapter(Listed(rows[140:])))
    assert "the adapters default, frozen are active together" in refused(trainer, ModelError)


@pytest.mark.parametrize("way", ["set_scale", "scale_layer", "config"])
def test_a_scale_that_peft_does_not_save_is_refused(way: str, model_folder: Path, rows: Rows, tmp_path: Path) -> None:
    model = peft_model(model_folder)
    for module in model.modules():
        if way != "config" and hasattr(module, way):
            module.set_scale("default", 0.5) if way == "set_scale" else module.scale_layer(0.5)
    if way == "config":
        model.peft_config["default"].lora_alpha = 16
    trainer = trainer_of(model, model_folder, tmp_path, Listed(rows[:40]), None, SmallestAdapter(Listed(rows[140:])))
    assert "the saved adapter is another one" in refused(trainer, ModelError)


GLOBAL = np.random.default_rng(0)


class Drawing(Listed):
    """Rows that lose a token at random, by every generator that there is."""

    def __init__(self, rows: Rows) -> None:
        super().__init__(rows)
        self.own, self.transforms = np.random.default_rng(0), [torch.Generator().manual_seed(0), random.Random(0)]

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        draws = [torch.rand(1).item(), np.random.rand(), random.random(), self.own.random(), GLOBAL.random()]
        draws += [torch.rand(1, generator=self.transforms[0]).item(), self.transforms[1].random()]
        row = self.rows[index]
        length = len(row["labels"]) - round(sum(draws)) % 4
        return {name: values[:length] for name, values in row.items()}


def test_reading_rows_changes_no_random_state(model_folder: Path, rows: Rows, tmp_path: Path) -> None:
    """Data sets that draw random numbers train the same to the bit."""
    weights = []
    for number, callbacks in enumerate(([], [SmallestAdapter(Drawing(rows[140:]))])):
        GLOBAL.bit_generator.state = np.random.default_rng(0).bit_generator.state
        model = peft_model(model_folder)
        train, held_out = Drawing(rows[:140]), Drawing(rows[140:])
        trainer = trainer_of(
            model,
            model_folder,
            tmp_path / str(number),
            train,
            held_out,
            *callbacks,
            eval_strategy="steps",
            eval_steps=2,
        )
        trainer.train()
        weights.append(dict(model.named_parameters()))
    assert callbacks[0].result is not None
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_an_iterable_that_is_read_once_loses_no_row(
    model_folder: Path, rows: Rows, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of the training set; the held-out rows that are given to the callback alone are its own."""
    left, weights = [], []
    for number, callbacks in enumerate(([], [SmallestAdapter(iter(rows[140:]), margin=0.1, max_examples=40)])):
        model, train = peft_model(model_folder), OneShot(rows[:140])
        trainer_of(model, model_folder, tmp_path / str(number), train, None, *callbacks).train()
        left.append(list(train.left))
        weights.append(dict(model.named_parameters()))
    assert left[0] == left[1] != []
    assert "of an iterable the first 40 rows are scored; shuffle one" in caplog.text
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert callbacks[0].result is not None
    assert "truncated by singular values" in callbacks[0].result.notes[0]


def test_held_out_rows_of_the_trainer_that_are_read_once_are_refused(
    model_folder: Path, rows: Rows, tmp_path: Path
) -> None:
    held_out = OneShot(rows[140:])
    for callback in (SmallestAdapter(), SmallestAdapter(held_out)):
        trainer = trainer_of(peft_model(model_folder), model_folder, tmp_path, Listed(rows[:40]), held_out, callback)
        assert "no held-out rows that can be read twice" in refused(trainer, DataError)
    assert len(list(held_out.left)) == len(rows[140:])


def images(count: int) -> list[dict[str, Any]]:
    """Random images whose label says which half is brighter; the middle of each, which `str` shows not, differs alone."""
    draw = torch.Generator().manual_seed(0)
    rows = []
    for number in range(count):
        pixels = torch.zeros(3, 32, 32)
        pixels[:, 8:24, 8:24] = torch.rand(3, 16, 16, generator=draw)
        pixels[:, 8:24, 8:16] += number % 2
        rows.append({"pixel_values": pixels, "labels": number % 2})
    return rows


def test_the_end_of_a_training_on_images(model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Rows are told apart by all of their bytes, and the adapter's accuracy is that of a plain pass by PEFT."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    base, rows = transformers.ViTForImageClassification(config), images(160)
    base.save_pretrained(tmp_path / "base")
    base = transformers.ViTForImageClassification.from_pretrained(tmp_path / "base")
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", modules_to_save=["classifier"])
    model: Any = get_peft_model(base, lora)
    callback = SmallestAdapter(rows[80:], metric="accuracy", margin=0.05)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=30, learning_rate=1e-2, per_device_train_batch_size=8, save_strategy="no",
        report_to=[], disable_tqdm=True, use_cpu=True, remove_unused_columns=False,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows[:80], callbacks=[callback]).train()
    assert "are in the training set" not in caplog.text
    assert callback.result is not None
    assert callback.result.examples == 80
    pixels = torch.stack([row["pixel_values"] for row in rows[80:]])
    labels = torch.tensor([row["labels"] for row in rows[80:]])
    with torch.no_grad():
        assert callback.result.top.value == pytest.approx(
            float((model.eval()(pixels).logits.argmax(-1) == labels).float().mean())
        )
    assert "are in the training set" in shared(rows, model, arguments, caplog)


def shared(
    rows: list[dict[str, Any]], model: Any, arguments: TrainingArguments, caplog: pytest.LogCaptureFixture
) -> str:
    Trainer(model, arguments, train_dataset=rows[:80], callbacks=[SmallestAdapter(rows[70:120])]).train()
    return caplog.text


def test_inputs_that_hold_tensors_and_are_none_are_refused(model_folder: Path, rows: Rows, tmp_path: Path) -> None:
    """As images of several sizes."""
    for beside in ([torch.zeros(2)], {"a": (torch.zeros(2),)}):
        callback = SmallestAdapter(Listed(rows[140:]), margin=0.1)
        trainer = trainer_of(
            peft_model(model_folder),
            model_folder,
            tmp_path,
            Listed(rows[:140]),
            Listed(rows[140:]),
            callback,
            max_steps=2,
        )
        collate = trainer.data_collator
        trainer.data_collator = lambda part, collate=collate, beside=beside: {**collate(part), "pixel_values": beside}
        assert "the batches have pixel_values as a" in refused(trainer, DataError)


class Sorted(Listed):
    """Rows in the order of their topics, which notes the numbers of the rows that are read."""

    def __init__(self, rows: Rows) -> None:
        super().__init__(rows)
        self.read: list[int] = []

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        self.read.append(index)
        return super().__getitem__(index)


def test_rows_are_taken_from_the_whole_of_a_data_set(
    model_folder: Path, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a sorted one would otherwise be of its first class."""
    monkeypatch.setattr("rightrank.interop.smallest.MOST", 20)
    monkeypatch.setattr("rightrank.interop.smallest.FEWEST", 10)
    held_out = Sorted(rows[140:])
    callback = SmallestAdapter(held_out, margin=0.1)
    trainer_of(
        peft_model(model_folder), model_folder, tmp_path, Listed(rows[:140]), Listed(rows[140:]), callback, max_steps=2,
    ).train()  # fmt: skip
    count = len(rows) - 140
    assert sorted(set(held_out.read)) == [number * count // 20 for number in range(20)]
    assert callback.result is not None
    scored = [
        sum(label != -100 for label in rows[140 + number * count // 20]["labels"][1:]) for number in range(0, 20, 2)
    ]
    assert callback.result.top.item_tokens == scored


def test_the_tokenizer_lies_beside_the_adapter(model_folder: Path, rows: Rows, tmp_path: Path) -> None:
    callback = SmallestAdapter(Listed(rows[140:]), margin=1.0, measure=False)
    trainer_of(peft_model(model_folder), model_folder, tmp_path, Listed(rows[:40]), None, callback).train()
    measure_again(tmp_path / "rightrank")
    for folder in [tmp_path / "rightrank" / "adapter", *(tmp_path / "rightrank" / "trials").iterdir()]:
        loaded = AutoTokenizer.from_pretrained(folder)
        assert loaded("a b") == AutoTokenizer.from_pretrained(model_folder)("a b")


@pytest.mark.parametrize(
    ("documents", "words"),
    [
        (
            None,
            r"no value in the column 'doc'; it has .*input_ids.*: give eval_dataset with the column, or leave group out",
        ),
        (1, "all held-out rows share a value of the column 'doc'"),
        (40, "no two held-out rows share a value of the column 'doc'"),
    ],
)
def test_a_column_that_groups_nothing_is_refused(
    documents: int | None, words: str, model_folder: Path, rows: Rows, tmp_path: Path
) -> None:
    held_out = [row | ({"doc": at % documents} if documents else {}) for at, row in enumerate(rows[100:140])]
    callback = SmallestAdapter(held_out, group="doc")
    trainer = trainer_of(peft_model(model_folder), model_folder, tmp_path, Listed(rows[:16]), None, callback)
    assert re.search(words, refused(trainer, DataError))
