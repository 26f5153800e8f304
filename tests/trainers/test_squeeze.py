"""Test `Squeeze`, which cuts the adapter to a lower rank during the training."""

from __future__ import annotations

import logging
import math
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    TrainerCallback,
)

from rightrank import Squeeze
from rightrank.schema.errors import DataError, ModelError, SettingsError
from rightrank.trainers.squeeze import STUDY_RESULT, squeeze
from tests.tiny import write_pairs
from tests.trainers import trainings
from tests.trainers.trainings import OneTimeRows, RowList, Rows, make_batches, make_peft_model

pytestmark = pytest.mark.trains

STEPS, RANK_3 = 12, partial(Squeeze, rank=3)
ARCHIVE = Path(__file__).parents[2] / "benchmarks" / "README.md"


def test_the_figures_of_the_study_are_those_of_the_archive() -> None:
    figures = re.findall(r"\d+ of \d+|[-+]\d+% to [-+]\d+%", STUDY_RESULT)
    assert len(figures) == 2
    row = next(line for line in ARCHIVE.read_text(encoding="utf-8").splitlines() if "cut inside its training" in line)
    assert all(figure in row for figure in figures), figures


make_trainer = partial(trainings.make_trainer, max_steps=STEPS, per_device_train_batch_size=4)


def compute_loss(model: Any, rows: Rows) -> float:
    model.eval()
    with torch.no_grad():
        return sum(float(model(**{key: torch.tensor([value]) for key, value in row.items()}).loss) for row in rows)


def load_adapter(folder: Path, adapter: Path, **options: Any) -> Any:
    return PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), adapter, **options
    )


def find_cut(trainer: Any) -> Any:
    return next(callback.cut for callback in trainer.callback_handler.callbacks if isinstance(callback, Squeeze))


class StepRecorder(TrainerCallback):
    """A callback that records the rank and the learning rate of every step."""

    def __init__(self) -> None:
        self.ranks: list[int] = []

    def on_step_begin(self, *_: Any, model: Any, **__: Any) -> None:
        self.ranks.append(max(parameter.shape[0] for name, parameter in model.named_parameters() if "lora_A" in name))


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
    """Check each step under every option of the trainer. The saved adapter loads in PEFT and gives the same losses."""
    recorder, model = StepRecorder(), make_peft_model(model_folder)
    squeeze_callback = partial(Squeeze, rank=3, at=0.5)
    trainer = make_trainer(
        model_folder, rows, tmp_path, squeeze_callback, lambda _: recorder, model=model, logging_steps=1, **changes
    )
    with caplog.at_level(logging.WARNING, "rightrank"):
        trainer.train()
    assert recorder.ranks[:6] == [16] * 6
    assert max(recorder.ranks[6:]) <= 8  # shared out over the modules up to what a server reserves
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS
    assert sum(losses[-3:]) < sum(losses[:3])
    cut = find_cut(trainer)
    assert (cut.top_rank, cut.rank) == (16, 3)
    trainer.save_model(str(tmp_path / "saved"))
    assert compute_loss(load_adapter(model_folder, tmp_path / "saved"), rows[140:150]) == pytest.approx(
        compute_loss(model, rows[140:150]), rel=2e-3 if "bf16" in changes else 1e-5
    )
    assert f"rank 16 to step 6, then rank 3 to step {STEPS}. In a study" in caplog.text
    assert cut.num_parameters == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def test_an_orthogonal_start_does_not_forbid_an_odd_rank(model_folder: Path, rows: Rows, tmp_path: Path) -> None:
    model = make_peft_model(model_folder, init_lora_weights="orthogonal")
    trainer = make_trainer(model_folder, rows, tmp_path, RANK_3, model=model)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert compute_loss(load_adapter(model_folder, tmp_path / "saved"), rows[140:145]) == pytest.approx(
        compute_loss(model, rows[140:145]), rel=1e-5
    )


def test_the_steps_before_the_cut_are_those_of_a_training_without_it(
    model_folder: Path, rows: Rows, tmp_path: Path
) -> None:
    """Compare bit by bit, and require that the optimizer's state covers only the steps after the cut."""
    logs = []
    for callbacks in ([], [RANK_3]):
        trainer = make_trainer(model_folder, rows, tmp_path, *callbacks, logging_steps=1)
        trainer.train()
        logs.append(
            [
                (parameter["loss"], parameter["learning_rate"])
                for parameter in trainer.state.log_history
                if "loss" in parameter
            ]
        )
    assert logs[0][:6] == logs[1][:6]
    assert [rate for _, rate in logs[0]] == [rate for _, rate in logs[1]]
    assert logs[0][8:] != logs[1][8:]
    states = list(trainer.optimizer.state.values())
    assert {float(state["step"]) for state in states} == {float(STEPS - 6)}
    assert all(state["exp_avg"].shape == parameter.shape for parameter, state in trainer.optimizer.state.items())


def test_a_training_resumed_after_the_cut_ends_the_same(model_folder: Path, rows: Rows, tmp_path: Path) -> None:
    """Resume from checkpoints before, at and after the cut, and compare byte by byte."""
    options = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 4}
    make_trainer(model_folder, rows, tmp_path / "whole", RANK_3, **options).train()
    end = tmp_path / "whole" / f"checkpoint-{STEPS}" / "adapter_model.safetensors"
    for step in (3, 6, 9):
        start = tmp_path / f"from-{step}" / f"checkpoint-{step}"
        shutil.copytree(tmp_path / "whole" / start.name, start)
        model = make_peft_model(model_folder) if step < 6 else load_adapter(model_folder, start, is_trainable=True)
        make_trainer(model_folder, rows, start.parent, RANK_3, model=model, **options).train(str(start))
        again = start.parent / f"checkpoint-{STEPS}" / "adapter_model.safetensors"
        assert again.read_bytes() == end.read_bytes(), step


def test_a_training_resumed_after_the_cut_at_the_first_rank_is_one_line(
    model_folder: Path, rows: Rows, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"save_strategy": "steps", "save_steps": 9}
    with caplog.at_level(logging.WARNING, "rightrank"):
        first = make_trainer(model_folder, rows, tmp_path, RANK_3, **options)
        first.train()
    assert "load_adapter" not in vars(first.model)  # the model loads adapters as before
    advice = "give the trainer the model PeftModel.from_pretrained(base, "
    assert f"to resume from a checkpoint after this step: {advice}checkpoint, is_trainable=True)" in caplog.text
    checkpoint = str(tmp_path / "checkpoint-9")
    trainer = make_trainer(model_folder, rows, tmp_path, RANK_3, **options)
    with pytest.raises(ModelError, match="another rank than the model") as caught:
        trainer.train(checkpoint)
    assert f"{advice}{checkpoint!r}, is_trainable=True)" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_best_model_is_one_after_the_cut(model_folder: Path, rows: Rows, tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3}
    options |= {
        "load_best_model_at_end": True,
        "save_total_limit": 1,
        "metric_for_best_model": "loss",
        "greater_is_better": True,
    }
    model = make_peft_model(model_folder)  # the largest loss is the first, before the cut
    trainer = make_trainer(model_folder, rows, tmp_path, RANK_3, model=model, **options)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None
    assert int(best.rpartition("-")[2]) >= 6
    assert compute_loss(load_adapter(model_folder, Path(best)), rows[140:144]) == pytest.approx(
        compute_loss(model, rows[140:144]), rel=1e-5
    )


def test_the_rank_is_measured_at_the_cut(
    model_folder: Path, rows: Rows, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Cut to the smallest rank within the margin, or not at all if every truncation loses more."""
    cuts = []
    with caplog.at_level(logging.WARNING, "rightrank"):
        for margin in (1.0, 1e-9):
            trainer: Any = make_trainer(
                model_folder, rows, tmp_path, partial(Squeeze, margin=margin), learning_rate=3e-2
            )
            trainer.train()
            cuts.append(find_cut(trainer))
    loose, strict = cuts
    assert loose.rank == 1
    assert loose.measurement.answer.difference_high < 1.0
    shapes = [parameter.shape[0] for parameter in trainer.model.parameters() if parameter.requires_grad]
    assert strict.rank == strict.top_rank == max(size for size in shapes if size <= 16)
    assert "no truncation is within the margin, so the training continues at rank 16" in caplog.text


@pytest.mark.parametrize(
    ("options", "changes", "model_changes", "match"),
    [
        ({"rank": 16}, {}, {}, "from 1 to 15"),
        ({"rank": 0}, {}, {}, "from 1 to 15"),
        ({"rank": 2.5}, {}, {}, "from 1 to 15"),
        ({"rank": 3, "at": 1.0}, {}, {}, "between 0 and 1"),
        ({"rank": 3, "at": 0.01}, {}, {}, "between 0 and 1"),
        ({"rank": 3}, {"torch_compile": True}, {}, "torch_compile does not allow the adapter's shapes to change"),
        ({"rank": 3}, {"optim": "galore_adamw_layerwise"}, {}, "layerwise"),
        ({"rank": 3}, {}, {"use_dora": True}, "only LoRA of linear layers"),
        ({"margin": -1.0}, {}, {}, "margin"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(
    model_folder: Path, rows: Rows, tmp_path: Path, options: Any, changes: Any, model_changes: Any, match: str
) -> None:
    model = make_peft_model(model_folder, **model_changes)
    trainer: Any = make_trainer(model_folder, rows, tmp_path, partial(Squeeze, **options), model=model, **changes)
    trainer.state.max_steps = STEPS
    arguments = trainer.args, trainer.state, trainer.control
    with pytest.raises((ModelError, SettingsError), match=match):  # `train` would compile first
        trainer.callback_handler.callbacks[-1].on_train_begin(
            *arguments, model=model, train_dataloader=trainer.get_train_dataloader()
        )


def test_a_loop_of_ones_own(model_folder: Path, rows: Rows) -> None:
    batches = make_batches(rows)
    model = make_peft_model(model_folder)
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2, amsgrad=True
    )
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
    assert cut.num_parameters == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert all(map(math.isfinite, losses))
    states = list(optimizer.state.items())
    assert states
    assert all(
        tensor.shape == parameter.shape for parameter, state in states for tensor in state.values() if tensor.dim()
    )
    with pytest.raises(DataError, match="give a rank, or held-out batches"):
        squeeze(model, optimizer, batches[:140])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_trainings_of_trl(model_folder: Path, completion_file: Path, tmp_path: Path, kind: str) -> None:
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    file = completion_file if kind == "SFT" else write_pairs(tmp_path / "pairs.jsonl")
    splits = datasets.load_dataset("json", data_files=str(file), split="train").train_test_split(40, seed=0)
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
        train_dataset=splits["train"],
        eval_dataset=splits["test"],
        processing_class=AutoTokenizer.from_pretrained(model_folder),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )
    trainer.add_callback(Squeeze(trainer, margin=10.0))
    trainer.train()
    assert find_cut(trainer).rank == 1
    assert trainer.model.peft_config["default"].r < 16
    trainer.save_model(str(tmp_path / "saved"))
    again = load_adapter(model_folder, tmp_path / "saved")
    trained_parameters = {name: parameter for name, parameter in trainer.model.named_parameters() if "lora_" in name}
    assert all(
        torch.equal(parameter, trained_parameters[name])
        for name, parameter in again.named_parameters()
        if "lora_" in name
    )


@pytest.mark.filterwarnings("ignore")
def test_a_training_with_lightning(model_folder: Path, rows: Rows, tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    from tests.trainers.with_lightning import Squeeze as LightningSqueeze
    from tests.trainers.with_lightning import fit_model

    model, collator = make_peft_model(model_folder), DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(model_folder))
    batches: Any = torch.utils.data.DataLoader(RowList(rows[:140]), 4, collate_fn=collator)
    callback = LightningSqueeze(rank=2)
    fit_model(model, callback, batches, tmp_path)
    assert callback.cut is not None
    assert callback.cut.rank == 2
    assert model.peft_config["default"].r <= 8
    with pytest.raises(SettingsError, match="a rank or held-out batches"):
        fit_model(make_peft_model(model_folder), LightningSqueeze(), batches, tmp_path)


def test_an_iterable_that_is_read_once_loses_no_row(
    model_folder: Path, rows: Rows, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Require that a training with a cut reads the same rows as one without."""
    remaining = []
    for number, callbacks in enumerate(([], [partial(Squeeze, rank=2)])):
        train = OneTimeRows(rows[:140])
        make_trainer(model_folder, rows, tmp_path / str(number), *callbacks, train=train).train()
        remaining.append(list(train.left))
    assert remaining[0] == remaining[1] != []
    assert "truncated by singular values" in caplog.text


class LazyCollator:
    """A collator that creates its generator at first use and records the labels of its batches."""

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
    """Cover Lightning's callbacks and a cut in a custom loop. The batches are the same as without them."""
    pytest.importorskip("lightning")
    from tests.trainers import with_lightning

    labels = []
    for is_alone in (True, False):
        collator, model = LazyCollator(model_folder), make_peft_model(model_folder)
        train, held_out = (
            torch.utils.data.DataLoader(RowList(split_rows), 8, shuffle=True, collate_fn=collator)
            for split_rows in (rows[:140], rows[140:])
        )
        torch.manual_seed(7)
        if kind == "loop":
            optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
            for number, _ in enumerate(train):
                if number == 8 and not is_alone:
                    squeeze(model, optimizer, train, held_out, margin=10.0)
        else:
            options = {"rank": None, "margin": 10.0} if kind == "Squeeze" else {"margin": 10.0}
            callback = None if is_alone else getattr(with_lightning, kind)(held_out, **options)
            with_lightning.fit_model(model, callback, train, tmp_path / str(is_alone))
        labels.append(collator.labels)
    assert len(labels[0]) == len(labels[1]) > 10
    assert all(torch.equal(*pair) for pair in zip(*labels, strict=True))
