"""Test the beginning of a training with `SmallestAdapter`: problems raise before the first step, and reading rows has no side effects."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

from rightrank import SmallestAdapter
from rightrank.schema.errors import DataError, InputError, ModelError, SettingsError
from tests.trainers.trainings import OneTimeRows, RowList, Rows, make_peft_model, make_trainer, run_training

pytestmark = pytest.mark.trains


def refuse(trainer: Trainer, words: str, error: type[InputError] = DataError) -> None:
    """Require that the training is refused in one line before its first step."""
    with pytest.raises(error, match=words) as raised:
        trainer.train()
    assert trainer.state.global_step == 0
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "arguments", "error", "words"),
    [
        ({"target_modules": ["embed_tokens", "q_proj"]}, {}, ModelError, "embed_tokens.*linear layers"),
        ({"use_dora": True}, {}, ModelError, "only LoRA of linear layers"),
        ({"r": 1}, {}, SettingsError, "its rank is 1"),
        ({"init_lora_weights": "pissa"}, {}, ModelError, "pissa.*changes the base"),
        ({"init_lora_weights": "OLoRA"}, {}, ModelError, "OLoRA.*changes the base"),
        ({}, {"ranks": [64]}, SettingsError, "rank 64 cannot be reached"),
        ({}, {"ranks": [0, 2]}, SettingsError, "rank 0 is not allowed"),
        ({}, {"ranks": 32}, SettingsError, "rank 32 cannot be reached"),
        ({}, {"margin": float("nan")}, SettingsError, "margin"),
        ({}, {"margin": "much"}, SettingsError, "margin"),
        ({}, {"margin": -1}, SettingsError, "margin"),
        ({}, {"metric": "accuracy"}, SettingsError, "accuracy is defined only for classifiers"),
        ({}, {"metric": "rouge"}, SettingsError, "allowed are loss and accuracy"),
    ],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word")
def test_a_wrong_value_is_refused(
    changes: dict[str, Any],
    arguments: dict[str, Any],
    error: type[InputError],
    words: str,
    model_folder: Path,
    rows: Rows,
    tmp_path: Path,
) -> None:
    model = make_peft_model(model_folder, **changes)
    refuse(make_trainer(model_folder, rows, tmp_path, partial(SmallestAdapter, **arguments), model=model), words, error)


def remove_labels(rows: Rows) -> Rows:
    return [row | {"labels": [-100] * len(row["labels"])} for row in rows]


@pytest.mark.parametrize(
    ("held_out", "words"),
    [
        (lambda _: None, "SmallestAdapter a list of a few hundred rows"),
        (lambda rows: iter(rows[140:]), "SmallestAdapter a list of a few hundred rows"),
        (lambda _: [{"text": "a"}] * 40, "does not accept the held-out rows"),
        (lambda rows: {"one": rows[140:], "two": rows[140:]}, r"has 2 data sets \(one, two\)"),
        (lambda rows: rows[:16], "the held-out rows are in the training set"),
        (lambda rows: RowList(remove_labels(rows[140:])), "fewer than two held-out rows have a label"),
        (lambda rows: RowList([*remove_labels(rows[140:160]), rows[160]]), "fewer than two held-out rows have a label"),
        (lambda rows: [(row["input_ids"], row["labels"]) for row in rows[140:]], "a row is a tuple"),
        (lambda rows: [row["input_ids"] for row in rows[140:]], "a row is a list"),
    ],
)
def test_rows_that_cannot_be_scored_are_refused(
    held_out: Callable[[Rows], Any], words: str, model_folder: Path, rows: Rows, tmp_path: Path
) -> None:
    trainer = make_trainer(model_folder, rows, tmp_path, SmallestAdapter)
    trainer.eval_dataset = held_out(rows)
    refuse(trainer, words)


def test_the_callback_of_another_trainer_is_refused(model_folder: Path, rows: Rows, tmp_path: Path) -> None:
    """Refuse rows in place of the trainer, and the callback of another trainer."""
    trainer = make_trainer(model_folder, rows, tmp_path)
    with pytest.raises(
        SettingsError, match=r"first argument is a RowList, .* trainer.add_callback\(SmallestAdapter\(trainer\)\)"
    ):
        SmallestAdapter(trainer.eval_dataset)  # type: ignore[arg-type]
    refuse(
        make_trainer(model_folder, rows, tmp_path, lambda _: SmallestAdapter(trainer)), "another trainer", SettingsError
    )


def test_an_adapter_active_beside_the_trained_one_is_refused(model_folder: Path, rows: Rows, tmp_path: Path) -> None:
    model = make_peft_model(model_folder)
    model.add_adapter("frozen", LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["frozen", "default"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("default" in name)
    trainer = make_trainer(model_folder, rows, tmp_path, SmallestAdapter, model=model)
    refuse(trainer, "the adapters default, frozen are active at the same time", ModelError)


def test_a_model_that_deepspeed_has_partitioned_is_refused(model_folder: Path, rows: Rows, tmp_path: Path) -> None:
    model = make_peft_model(model_folder)
    next(model.parameters()).ds_id = 0
    trainer = make_trainer(model_folder, rows, tmp_path, SmallestAdapter, model=model)
    refuse(trainer, "ZeRO-3 .* use rightrank resize --data after the training", ModelError)


@pytest.mark.parametrize("change", ["merged", "four values", "rounded", "other prefix", "nothing"])
def test_a_base_that_was_changed_in_memory_is_refused(
    change: str, model_folder: Path, rows: Rows, tmp_path: Path
) -> None:
    """Merge another adapter, and change four values of one matrix. A base that was rounded when it was loaded is the same."""
    base: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    if change == "merged":
        base = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
        base = base.merge_and_unload()
    elif change == "rounded":
        base = base.bfloat16().float()
    elif change == "four values":
        with torch.no_grad():
            base.get_submodule("model.layers.1.mlp.up_proj").weight[3, 4:8] += 1e-3
    elif change == "other prefix":
        base.model.save_pretrained(tmp_path / "base")
        base.config.name_or_path = base.model.config.name_or_path = str(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear"))
    trainer = make_trainer(model_folder, rows, tmp_path, SmallestAdapter, model=model, max_steps=1)
    if change in ("merged", "four values"):
        weight = r"q_proj\.weight" if change == "merged" else r"layers\.1\.mlp\.up_proj\.weight"
        refuse(
            trainer, rf"has other weights \(.*{weight}\) than {model_folder}, which its adapter would name", ModelError
        )
        return
    trainer.train()
    assert trainer.callback_handler.callbacks[0].result is not None  # type: ignore[attr-defined]


@pytest.mark.parametrize("scaling", ["set_scale", "scale_layer", "config"])
def test_a_scale_that_peft_does_not_save_is_refused(
    scaling: str, model_folder: Path, rows: Rows, tmp_path: Path
) -> None:
    model = make_peft_model(model_folder)
    for module in model.modules():
        if scaling != "config" and hasattr(module, scaling):
            module.set_scale("default", 0.5) if scaling == "set_scale" else module.scale_layer(0.5)
    if scaling == "config":
        model.peft_config["default"].lora_alpha = 16
    trainer = make_trainer(model_folder, rows, tmp_path, SmallestAdapter, model=model)
    refuse(trainer, "the saved adapter would differ", ModelError)


class RandomRows(RowList):
    """Rows that lose random tokens, drawn from every kind of generator, one of which is created at first use."""

    def __init__(self, rows: Rows) -> None:
        super().__init__(rows)
        self.own, self.torch_generator, self.python = (
            np.random.default_rng(0),
            torch.Generator().manual_seed(0),
            random.Random(0),
        )
        self.lazy: Any = None

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        self.lazy = self.lazy or np.random.default_rng(3)
        draws = [torch.rand(1).item(), np.random.rand(), random.random(), self.own.random(), self.lazy.random()]
        draws += [torch.rand(1, generator=self.torch_generator).item(), self.python.random()]
        row = self.rows[index]
        length = len(row["labels"]) - round(sum(draws)) % 4
        return {name: values[:length] for name, values in row.items()}


class RandomCollator:
    """A collator that masks labels with a generator that it creates at first use, as those of transformers do."""

    def __init__(self, folder: Path) -> None:
        self.collate = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(folder), padding=True)
        self.generator: Any = None

    def __call__(self, rows: list[Any]) -> Any:
        self.generator = self.generator or torch.Generator().manual_seed(5)
        batch = self.collate(rows)
        batch["labels"][torch.rand(batch["labels"].shape, generator=self.generator) < 0.2] = -100
        return batch


@pytest.mark.filterwarnings("ignore")  # Lightning's
@pytest.mark.parametrize("program", ["transformers", "lightning"])
def test_reading_rows_changes_no_random_state(program: str, model_folder: Path, rows: Rows, tmp_path: Path) -> None:
    """Train on data sets and a collator that draw random numbers, and compare bit by bit."""
    weights = []
    for is_measured in (False, True):
        collator, out = RandomCollator(model_folder), tmp_path / str(is_measured)
        train, held_out = RandomRows(rows[:140]), RandomRows(rows[140:])
        if program == "transformers":
            callbacks = [SmallestAdapter] * is_measured
            changes = {"eval_strategy": "steps", "eval_steps": 2}
            trainer = make_trainer(model_folder, rows, out, *callbacks, train=train, held_out=held_out, **changes)
            trainer.data_collator = collator
            trainer.train()
            model: Any = trainer.model
        else:
            pytest.importorskip("lightning")
            from tests.trainers import with_lightning

            model, order = make_peft_model(model_folder), torch.Generator().manual_seed(1)
            loader = torch.utils.data.DataLoader(train, 8, shuffle=True, collate_fn=collator, generator=order)
            held_out_loader = torch.utils.data.DataLoader(held_out, 8, collate_fn=collator)
            callback = with_lightning.SmallestAdapter(held_out_loader) if is_measured else None
            torch.manual_seed(7)
            np.random.seed(7)
            random.seed(7)
            with_lightning.fit_model(model, callback, loader, out)
        weights.append(dict(model.named_parameters()))
        assert (out / "rightrank" / "adapter").is_dir() == is_measured
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


class Stream(torch.utils.data.IterableDataset[Any]):
    """Rows without access by index but with a known length."""

    def __init__(self, rows: Rows) -> None:
        self.left = OneTimeRows(rows).left

    def __iter__(self) -> Iterator[Any]:
        return self.left

    def __len__(self) -> int:
        return 140


@pytest.mark.parametrize("kind", ["one shot", "length", "datasets"])
def test_a_stream_loses_no_row(
    kind: str, model_folder: Path, rows: Rows, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Never read streams, not even those of `datasets`, which restart and would be downloaded. A note says so."""
    drawn: list[int] = []

    def generate() -> Iterator[Any]:
        for number, row in enumerate(rows[:140]):
            drawn.append(number)
            yield row

    remaining, weights = [], []
    for number, callbacks in enumerate(([], [SmallestAdapter])):
        drawn.clear()
        train: Any = {"one shot": OneTimeRows, "length": Stream}.get(kind, OneTimeRows)(rows[:140])
        if kind == "datasets":
            train = pytest.importorskip("datasets").IterableDataset.from_generator(generate)
        trainer = make_trainer(model_folder, rows, tmp_path / str(number), *callbacks, train=train)
        trainer.train()
        remaining.append(list(drawn) if kind == "datasets" else list(train.left))
        weights.append(dict(trainer.model.named_parameters()))  # type: ignore[union-attr]
    assert remaining[0] == remaining[1] != []
    assert "a stream and is not read; held-out rows were not looked for in it" in caplog.text
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    result = trainer.callback_handler.callbacks[0].result
    assert any("truncated by singular values" in note for note in result.answer.notes)
    assert any("were not looked for" in note for note in result.answer.notes)


def test_a_stream_of_held_out_rows_is_refused(model_folder: Path, rows: Rows, tmp_path: Path) -> None:
    """Refuse a stream, because a random sample would require reading all of it."""
    held_out = Stream(rows[140:])
    for arguments in ({}, {"eval_dataset": held_out}):
        callback = partial(SmallestAdapter, **arguments)
        refuse(make_trainer(model_folder, rows, tmp_path, callback, held_out=held_out), "a list of a few hundred rows")
    assert len(list(held_out.left)) == len(rows[140:])


def make_images(count: int) -> list[dict[str, Any]]:
    """Make random images that differ only in the middle, which `str` omits. The label says which half is brighter."""
    draw = torch.Generator().manual_seed(0)
    rows = []
    for number in range(count):
        pixels = torch.zeros(3, 32, 32)
        pixels[:, 8:24, 8:24] = torch.rand(3, 16, 16, generator=draw)
        pixels[:, 8:24, 8:16] += number % 2
        rows.append({"pixel_values": pixels, "labels": number % 2})
    return rows


def test_the_end_of_a_training_on_images(model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Distinguish rows by all their bytes, and compare the accuracy with a plain pass by PEFT."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    base, rows = transformers.ViTForImageClassification(config), make_images(160)
    base.save_pretrained(tmp_path / "base")
    base = transformers.ViTForImageClassification.from_pretrained(tmp_path / "base")
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", modules_to_save=["classifier"])
    model: Any = get_peft_model(base, lora)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=30, learning_rate=1e-2, per_device_train_batch_size=8, save_strategy="no",
        report_to=[], disable_tqdm=True, use_cpu=True, remove_unused_columns=False,
    )  # fmt: skip
    trainer: Any = Trainer(model, arguments, train_dataset=rows[:80], eval_dataset=rows[80:])  # type: ignore[arg-type]
    callback = SmallestAdapter(trainer, metric="accuracy", margin=0.05)
    trainer.add_callback(callback)
    trainer.train()
    assert "are also in the training set" not in caplog.text
    assert callback.result is not None
    assert len(callback.result.trained_scores.losses) == 80
    pixels = torch.stack([row["pixel_values"] for row in rows[80:]])
    labels = torch.tensor([row["labels"] for row in rows[80:]])
    with torch.no_grad():
        assert callback.result.answer.candidates[0].value == pytest.approx(
            float((model.eval()(pixels).logits.argmax(-1) == labels).float().mean())
        )
    callback.eval_dataset, arguments.max_steps = rows[70:120], 1
    trainer.train()
    assert "are also in the training set" in caplog.text


@pytest.mark.parametrize("order", ["alternating", "sorted", "shuffled"])
def test_the_scored_rows_are_a_random_sample(
    order: str, model_folder: Path, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sample from interleaved sources, consecutive sources, and shuffled rows."""
    monkeypatch.setattr("rightrank.trainers.smallest.MAX_SAMPLE_SIZE", 40)
    monkeypatch.setattr("rightrank.trainers.smallest.MIN_SAMPLE_SIZE", 20)
    easy = [{name: values[:-1] + values[-1:] * 40 for name, values in row.items()} for row in rows]
    mixed = [row for pair in zip(rows, easy, strict=True) for row in pair] if order == "alternating" else [*rows, *easy]
    if order == "shuffled":
        random.Random(0).shuffle(mixed)
    random.seed(1)
    np.random.seed(1)
    train = [{name: values[1:] for name, values in row.items()} for row in rows]
    callback = run_training(model_folder, rows, tmp_path, SmallestAdapter, train=train, held_out=mixed, max_steps=2)
    tokens = callback.result.trained_scores.tokens
    assert len(tokens) == 20
    assert 4 <= sum(count > 35 for count in tokens) <= 16  # beyond this in 1 of 400 random samples


def test_the_tokenizer_lies_beside_the_adapter(model_folder: Path, rows: Rows, tmp_path: Path) -> None:
    run_training(model_folder, rows, tmp_path, partial(SmallestAdapter, margin=1.0))
    loaded = AutoTokenizer.from_pretrained(tmp_path / "rightrank" / "adapter")
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
    held_out = [row | ({"doc": at % documents} if documents else {}) for at, row in enumerate(rows[140:180])]
    refuse(make_trainer(model_folder, rows, tmp_path, partial(SmallestAdapter, group="doc"), held_out=held_out), words)


IDS = torch.tensor([[1, 2]])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda _: {"query_input_ids": IDS, "passage_input_ids": IDS}, "evaluate=evaluate"),
        (lambda _: {"query": {"input_ids": IDS}, "passage": {"input_ids": IDS}}, "evaluate=evaluate"),
        (lambda _: {"input_ids": IDS, "labels": torch.tensor([0.5])}, "evaluate=evaluate"),
        (lambda _: {"input_ids": IDS, "labels": torch.tensor([1])}, "evaluate=evaluate"),
        (lambda _: {"labels": torch.tensor([1])}, "evaluate=evaluate"),
        (lambda batch: {**batch, "pixel_values": [torch.zeros(2)]}, "the batches have pixel_values as a list"),
        (lambda batch: {**batch, "pixel_values": {"a": (torch.zeros(2),)}}, "the batches have pixel_values as a dict"),
    ],
    ids=["contrastive", "nested", "scores", "classes", "no inputs", "several sizes", "nested tensors"],
)
def test_another_loss_is_refused_with_the_way(
    change: Callable[[Any], Any], words: str, model_folder: Path, rows: Rows, tmp_path: Path
) -> None:
    """Use contrastive losses, rerankers, and inputs such as images of several sizes. The error names `evaluate=`."""
    trainer = make_trainer(model_folder, rows, tmp_path, SmallestAdapter)
    collate = trainer.data_collator
    trainer.data_collator = lambda batch_rows: change(collate(batch_rows))
    refuse(trainer, words)


def test_a_reranker_is_refused_with_the_way(model_folder: Path, rows: Rows, tmp_path: Path) -> None:
    """Use a head with one output. It has no classes, and its cross-entropy would be 0 at every rank."""
    base = transformers.AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=1, pad_token_id=1)
    model: Any = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS"))
    labelled = [{"input_ids": row["input_ids"], "labels": number % 2} for number, row in enumerate(rows)]
    trainer = make_trainer(
        model_folder, rows, tmp_path, SmallestAdapter, model=model, train=labelled[:140], held_out=labelled[140:]
    )
    trainer.data_collator = transformers.DataCollatorWithPadding(AutoTokenizer.from_pretrained(model_folder))
    refuse(trainer, "evaluate=evaluate")
