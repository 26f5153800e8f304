"""`Squeeze`: a training of others that is cut to a lower rank on its way."""

from __future__ import annotations

import logging
import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from rightrank import Squeeze
from rightrank.interop.squeeze import STUDY, squeeze
from rightrank.schema.errors import DataError, ModelError, SettingsError
from tests.interop.trainings import Listed, OneShot, Rows, peft_model
from tests.tiny import write_pairs

pytestmark = pytest.mark.trains

STEPS = 12
ARCHIVE = Path(__file__).parents[2] / "docs" / "explanation" / "science.md"


def test_the_figures_of_the_study_are_those_of_the_archive() -> None:
    figures = re.findall(r"\d+ of \d+|[-+]\d+% to [-+]\d+%", STUDY)
    assert len(figures) == 2
    row = next(line for line in ARCHIVE.read_text(encoding="utf-8").splitlines() if "cut inside its training" in line)
    assert all(figure in row for figure in figures), figures


def trainer_of(model: Any, folder: Path, rows: Rows, out: Path, callbacks: Sequence[Any], **changes: Any) -> Trainer:
    settings: dict[str, Any] = {"max_steps": STEPS, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "seed": 0}
    settings |= {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True}
    arguments = TrainingArguments(output_dir=str(out), **settings | changes)
    collator = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(folder), padding=True)
    return Trainer(model, arguments, collator, Listed(rows[:140]), Listed(rows[140:]), callbacks=list(callbacks))


def loss_of(model: Any, rows: Rows) -> float:
    model.eval()
    with torch.no_grad():
        return sum(float(model(**{key: torch.tensor([value]) for key, value in row.items()}).loss) for row in rows)


def loaded(folder: Path, adapter: Path, **options: Any) -> Any:
    return PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), adapter, **options
    )


class Losses(TrainerCallback):
    """The rank that trains, and the learning rate, at every step."""

    def __init__(self) -> None:
        self.ranks: list[int] = []

    def on_step_begin(self, *_: Any, model: Any, **__: Any) -> None:
        self.ranks.append(max(one.shape[0] for name, one in model.named_parameters() if "lora_A" in name))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_accumulation_steps": 2, "activation_checkpointing": True},
        {"bf16": True},
        {"optim": "sgd", "learning_rate": 0.1},
        {"optim": "adafactor"},
    ],
    ids=["plain", "accumulation-checkpointing", "bf16", "sgd", "adafactor"],
)
def test_the_training_goes_on_at_the_rank(
    model_folder: Path, rows: Rows, tmp_path: Path, changes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Each step of it, in every way in which the trainer steps; what it saves loads in PEFT and gives the same losses."""
    seen, callback, model = Losses(), Squeeze(rank=3, at=0.5), peft_model(model_folder)
    trainer = trainer_of(model, model_folder, rows, tmp_path, [callback, seen], logging_steps=1, **changes)
    with caplog.at_level(logging.WARNING, "rightrank"):
        trainer.train()
    assert seen.ranks[:6] == [16] * 6
    assert max(seen.ranks[6:]) <= 8  # shared out over the modules up to what a server reserves
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS
    assert sum(losses[-3:]) < sum(losses[:3])
    assert callback.cut is not None
    assert (callback.cut.from_rank, callback.cut.rank) == (16, 3)
    trainer.save_model(str(tmp_path / "saved"))
    assert loss_of(loaded(model_folder, tmp_path / "saved"), rows[140:150]) == pytest.approx(
        loss_of(model, rows[140:150]), rel=2e-3 if "bf16" in changes else 1e-5
    )
    assert f"rank 16 to step 6, then rank 3 to step {STEPS}. In a study" in caplog.text
    assert callback.cut.parameters == sum(one.numel() for one in model.parameters() if one.requires_grad)


def test_an_orthogonal_start_does_not_forbid_an_odd_rank(model_folder: Path, rows: Rows, tmp_path: Path) -> None:
    model = peft_model(model_folder, init_lora_weights="orthogonal")
    trainer = trainer_of(model, model_folder, rows, tmp_path, [Squeeze(rank=3)])
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert loss_of(loaded(model_folder, tmp_path / "saved"), rows[140:145]) == pytest.approx(
        loss_of(model, rows[140:145]), rel=1e-5
    )


def test_the_steps_before_the_cut_are_those_of_a_training_without_it(
    model_folder: Path, rows: Rows, tmp_path: Path
) -> None:
    """To the bit; and the optimizer's state is that of the steps after the cut."""
    logs = []
    for callbacks in ([], [Squeeze(rank=3)]):
        trainer = trainer_of(peft_model(model_folder), model_folder, rows, tmp_path, callbacks, logging_steps=1)
        trainer.train()
        logs.append([(one["loss"], one["learning_rate"]) for one in trainer.state.log_history if "loss" in one])
    assert logs[0][:6] == logs[1][:6]
    assert [rate for _, rate in logs[0]] == [rate for _, rate in logs[1]]
    assert logs[0][8:] != logs[1][8:]
    states = list(trainer.optimizer.state.values())
    assert {float(state["step"]) for state in states} == {float(STEPS - 6)}
    assert all(state["exp_avg"].shape == one.shape for one, state in trainer.optimizer.state.items())


def test_a_training_resumed_after_the_cut_ends_the_same(model_folder: Path, rows: Rows, tmp_path: Path) -> None:
    """To the byte, from a checkpoint before the cut, at it, and after it."""
    options = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 4}
    trainer_of(peft_model(model_folder), model_folder, rows, tmp_path / "whole", [Squeeze(rank=3)], **options).train()
    end = tmp_path / "whole" / f"checkpoint-{STEPS}" / "adapter_model.safetensors"
    for step in (3, 6, 9):
        start = tmp_path / f"from-{step}" / f"checkpoint-{step}"
        shutil.copytree(tmp_path / "whole" / start.name, start)
        model = peft_model(model_folder) if step < 6 else loaded(model_folder, start, is_trainable=True)
        trainer_of(model, model_folder, rows, start.parent, [Squeeze(rank=3)], **options).train(str(start))
        again = start.parent / f"checkpoint-{STEPS}" / "adapter_model.safetensors"
        assert again.read_bytes() == end.read_bytes(), step


def test_a_training_resumed_after_the_cut_at_the_first_rank_is_one_line(
    model_folder: Path, rows: Rows, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"save_strategy": "steps", "save_steps": 9}
    with caplog.at_level(logging.WARNING, "rightrank"):
        trainer_of(peft_model(model_folder), model_folder, rows, tmp_path, [Squeeze(rank=3)], **options).train()
    way = "give the trainer the model PeftModel.from_pretrained(base, "
    assert f"to resume from a checkpoint after this step: {way}checkpoint, is_trainable=True)" in caplog.text
    checkpoint = str(tmp_path / "checkpoint-9")
    trainer = trainer_of(peft_model(model_folder), model_folder, rows, tmp_path, [Squeeze(rank=3)], **options)
    with pytest.raises(ModelError, match="another rank than the model") as caught:
        trainer.train(checkpoint)
    assert f"{way}{checkpoint!r}, is_trainable=True)" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_model_loads_adapters_as_before_once_the_training_has_begun(
    model_folder: Path, rows: Rows, tmp_path: Path
) -> None:
    model = peft_model(model_folder)
    trainer_of(model, model_folder, rows, tmp_path, [Squeeze(rank=3)]).train()
    assert "load_adapter" not in vars(model)


def test_the_best_model_is_one_after_the_cut(model_folder: Path, rows: Rows, tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3}
    options |= {
        "load_best_model_at_end": True,
        "save_total_limit": 1,
        "metric_for_best_model": "loss",
        "greater_is_better": True,
    }
    model = peft_model(model_folder)  # the largest loss is the first, before the cut
    trainer = trainer_of(model, model_folder, rows, tmp_path, [Squeeze(rank=3)], **options)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None
    assert int(best.rpartition("-")[2]) >= 6
    assert loss_of(loaded(model_folder, Path(best)), rows[140:144]) == pytest.approx(
        loss_of(model, rows[140:144]), rel=1e-5
    )


def test_the_rank_is_measured_at_the_cut(
    model_folder: Path, rows: Rows, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The smallest whose truncation holds; none where every one loses more than the margin."""
    loose, strict = Squeeze(margin=1.0), Squeeze(margin=1e-9)
    with caplog.at_level(logging.WARNING, "rightrank"):
        for callback in (loose, strict):
            model = peft_model(model_folder)
            trainer_of(model, model_folder, rows, tmp_path, [callback], learning_rate=3e-2).train()
    assert loose.cut is not None
    assert strict.cut is not None
    assert loose.cut.rank == 1
    assert loose.cut.measured is not None
    assert loose.cut.measured.answer.difference_high < 1.0
    assert (
        strict.cut.rank
        == strict.cut.from_rank
        == max(one.shape[0] for one in model.parameters() if one.requires_grad and one.shape[0] <= 16)
    )
    assert "no truncation holds, so the training continues at rank 16" in caplog.text


@pytest.mark.parametrize(
    ("options", "changes", "model_changes", "match"),
    [
        ({"rank": 16}, {}, {}, "from 1 to 15"),
        ({"rank": 0}, {}, {}, "from 1 to 15"),
        ({"rank": 2.5}, {}, {}, "from 1 to 15"),
        ({"rank": 3, "at": 1.0}, {}, {}, "between 0 and 1"),
        ({"rank": 3, "at": 0.01}, {}, {}, "between 0 and 1"),
        ({"rank": 3}, {"torch_compile": True}, {}, "torch_compile holds the adapter's first shapes"),
        ({"rank": 3}, {"optim": "galore_adamw_layerwise"}, {}, "layerwise"),
        ({"rank": 3}, {}, {"use_dora": True}, "only LoRA of linear layers"),
        ({"margin": -1.0}, {}, {}, "margin"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(
    model_folder: Path, rows: Rows, tmp_path: Path, options: Any, changes: Any, model_changes: Any, match: str
) -> None:
    trainer = trainer_of(peft_model(model_folder, **model_changes), model_folder, rows, tmp_path, [], **changes)
    callback = Squeeze(**options)
    state = trainer.state
    state.max_steps = STEPS
    with pytest.raises((ModelError, SettingsError), match=match):
        callback.on_train_begin(
            trainer.args, state, trainer.control, model=trainer.model, train_dataloader=trainer.get_train_dataloader()
        )


def test_a_loop_of_ones_own(model_folder: Path, rows: Rows) -> None:
    batches = [{key: torch.tensor([value]) for key, value in row.items()} for row in rows]
    model = peft_model(model_folder)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2, amsgrad=True)
    losses = []
    for number, batch in enumerate(batches[:40]):
        if number == 20:
            cut = squeeze(model, optimizer, batches[:140], rank=2)
        model.train()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert cut.parameters == sum(one.numel() for one in model.parameters() if one.requires_grad)
    assert all(map(math.isfinite, losses))
    states = list(optimizer.state.items())
    assert states
    assert all(part.shape == one.shape for one, state in states for part in state.values() if part.dim())
    with pytest.raises(DataError, match="give a rank, or held-out batches"):
        squeeze(model, optimizer, batches[:140])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_trainings_of_trl(model_folder: Path, completion_file: Path, tmp_path: Path, kind: str) -> None:
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    file = completion_file if kind == "SFT" else write_pairs(tmp_path / "pairs.jsonl")
    parts = datasets.load_dataset("json", data_files=str(file), split="train").train_test_split(40, seed=0)
    settings: dict[str, Any] = {
        "max_steps": 8,
        "learning_rate": 3e-3,
        "per_device_train_batch_size": 4,
        "max_length": 64,
    }
    settings |= {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True, "bf16": False}
    trainer = getattr(trl, f"{kind}Trainer")(
        AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32),
        args=getattr(trl, f"{kind}Config")(output_dir=str(tmp_path / "out"), **settings),
        train_dataset=parts["train"],
        eval_dataset=parts["test"],
        processing_class=AutoTokenizer.from_pretrained(model_folder),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )
    callback = Squeeze(margin=10.0)
    trainer.add_callback(callback)
    trainer.train()
    assert callback.cut is not None
    assert callback.cut.rank == 1
    assert trainer.model.peft_config["default"].r < 16
    trainer.save_model(str(tmp_path / "saved"))
    again = loaded(model_folder, tmp_path / "saved")
    kept = {name: one for name, one in trainer.model.named_parameters() if "lora_" in name}
    assert all(torch.equal(one, kept[name]) for name, one in again.named_parameters() if "lora_" in name)


@pytest.mark.filterwarnings("ignore")
def test_a_training_with_lightning(model_folder: Path, rows: Rows, tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    from tests.interop.with_lightning import Squeeze as LightningSqueeze
    from tests.interop.with_lightning import fitted

    model, collator = peft_model(model_folder), DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(model_folder))
    batches: Any = torch.utils.data.DataLoader(Listed(rows[:140]), 4, collate_fn=collator)
    callback = LightningSqueeze(rank=2)
    fitted(model, callback, batches, tmp_path)
    assert callback.cut is not None
    assert callback.cut.rank == 2
    assert model.peft_config["default"].r <= 8
    with pytest.raises(SettingsError, match="a rank or held-out batches"):
        fitted(peft_model(model_folder), LightningSqueeze(), batches, tmp_path)


def test_an_iterable_that_is_read_once_loses_no_row(
    model_folder: Path, rows: Rows, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A training that is cut reads the same rows as one that is not."""
    left = []
    for number, callbacks in enumerate(([], [Squeeze(rank=2)])):
        trainer = trainer_of(peft_model(model_folder), model_folder, rows, tmp_path / str(number), callbacks)
        trainer.train_dataset = train = OneShot(rows[:140])
        trainer.train()
        left.append(list(train.left))
    assert left[0] == left[1] != []
    assert "truncated by singular values" in caplog.text


class LazyCollator:
    """A collator that creates its generator at first use, and notes the labels of the batches that it makes."""

    def __init__(self, folder: Path) -> None:
        self.collate = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(folder))
        self.generator: torch.Generator | None = None
        self.labels: list[Any] = []

    def __call__(self, rows: list[Any]) -> Any:
        self.generator = self.generator or torch.Generator().manual_seed(3)
        batch = self.collate(rows)
        batch["labels"][torch.rand(batch["labels"].shape, generator=self.generator) < 0.2] = -100
        self.labels.append(batch["labels"])
        return batch


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["SmallestAdapter", "Squeeze", "loop"])
def test_a_collator_of_both_loaders_is_left_to_the_training(
    model_folder: Path, rows: Rows, tmp_path: Path, kind: str
) -> None:
    """Of Lightning's callbacks, and of a cut in a loop of one's own: the training has the same batches as without them."""
    pytest.importorskip("lightning")
    from tests.interop import with_lightning

    labels = []
    for is_alone in (True, False):
        collator, model = LazyCollator(model_folder), peft_model(model_folder)
        train, held_out = (
            torch.utils.data.DataLoader(Listed(part), 8, shuffle=True, collate_fn=collator)
            for part in (rows[:140], rows[140:])
        )
        torch.manual_seed(7)
        if kind == "loop":
            optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad])
            for number, _ in enumerate(train):
                if number == 8 and not is_alone:
                    squeeze(model, optimizer, train, held_out, margin=10.0)
        else:
            options = {"rank": None, "margin": 10.0} if kind == "Squeeze" else {"margin": 10.0}
            callback = None if is_alone else getattr(with_lightning, kind)(held_out, **options)
            with_lightning.fitted(model, callback, train, tmp_path / str(is_alone))
        labels.append(collator.labels)
    assert len(labels[0]) == len(labels[1]) > 10
    assert all(torch.equal(*pair) for pair in zip(*labels, strict=True))
