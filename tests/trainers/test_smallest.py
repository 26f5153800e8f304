"""Test the result of `SmallestAdapter` after a training with transformers' `Trainer`, and that the model is unchanged."""

from __future__ import annotations

import copy
import json
import logging
import random
import re
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from rightrank import SelectSettings, SmallestAdapter, compare
from rightrank.adapters.adapter_files import open_adapter
from rightrank.adapters.resize import list_candidate_ranks
from rightrank.decision.comparison import INDEPENDENCE_NOTE
from rightrank.evaluation.attached_adapters import attach_adapter
from rightrank.evaluation.peft_models import set_update_to_zero
from rightrank.evaluation.scores import Scores
from rightrank.runs.resize_by_data import measure_truncations
from rightrank.schema.errors import SettingsError
from rightrank.schema.trials import SplitName
from rightrank.trainers.measurement import InMemoryAdapter
from rightrank.trainers.trainer_batches import compute_batch_loss
from rightrank.training.moments import gather_unseen_moments
from tests.commands import run
from tests.helpers import make_runtime
from tests.tiny import build_small_settings, write_completions, write_pairs
from tests.trainers.trainings import (
    RowList,
    Rows,
    list_messages,
    make_batches,
    make_peft_model,
    make_trainer,
    measure,
    read_answer,
    run_training,
)

pytestmark = pytest.mark.trains


def score_batches(model: Any, batches: Sequence[Any]) -> Scores:
    return InMemoryAdapter(model, list(batches)).score()


def raise_interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def compute_peft_losses(folder: Path, adapter: Path, rows: Rows) -> list[float]:
    """Return the loss of each row in a plain forward pass with the adapter that PEFT loads."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), adapter).eval()
    with torch.no_grad():
        return [
            float(model(**{key: torch.tensor([value]) for key, value in row.items()}).loss)
            * (sum(label != -100 for label in row["labels"][1:]))
            for row in rows
        ]


class RecordingTracker(TrainerCallback):
    """A tracker that closes its run when the training ends."""

    def __init__(self) -> None:
        self.logged: dict[str, float] = {}
        self.is_open = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        assert self.is_open
        self.logged |= logs

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.is_open = False


def find_callback(trainer: Trainer) -> Any:
    return next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, SmallestAdapter))


def test_the_end_of_a_training_has_the_smallest_adapter(
    model_folder: Path, rows: Rows, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = RecordingTracker()
    trainer = make_trainer(
        model_folder, rows, tmp_path / "out", lambda _: tracker, partial(SmallestAdapter, margin=0.1), max_steps=60
    )
    with caplog.at_level(logging.WARNING, "rightrank"):
        trainer.train()
    model: Any = trainer.model
    answer = find_callback(trainer).result.answer
    assert INDEPENDENCE_NOTE in answer.notes
    assert tracker.logged["rightrank/rank"] == answer.rank
    assert tracker.logged["rightrank/difference_high"] == answer.difference_high
    folder = tmp_path / "out" / "rightrank"
    document = read_answer(tmp_path / "out")
    assert (document["metric"], document["rank"]) == ("loss", answer.rank)
    assert document["sentence"] == answer.sentence
    assert answer.rank < 16
    lines = [line.removeprefix("rightrank: ") for line in list_messages(caplog) if "measuring" not in line]
    assert re.match(r"Rank \d+ keeps [\d.]+% of what rank 16 gained \(at least [\d.]+%, 95% confidence\)\.", lines[0])
    assert lines[:2] == [answer.sentence, f"adapter: {folder / 'adapter'}"]
    modules = "['down_proj', 'gate_proj', 'k_proj', 'o_proj', 'q_proj', 'up_proj', 'v_proj']"
    settings = f"r=16, lora_alpha=32, learning_rate=0.01, target_modules={modules}, per_device_train_batch_size=8, "
    assert lines[2] == f"train: {settings}gradient_accumulation_steps=1, max_steps=60"
    assert trainer.state.log_history[-1]["rightrank/rank"] == answer.rank
    assert "Measured on the last (step 60) weights with 60 held-out examples" in caplog.text
    assert "of the training's time." in caplog.text
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert answer.sentence in page
    assert "data:image/svg+xml" in page
    assert "To train again: r=16, lora_alpha=32" in page
    data = write_completions(tmp_path / "compared.jsonl", 20, seed=9)
    sides = folder / "adapter", "base"
    assert compare(*sides, model=str(model_folder), data=data, settings=SelectSettings(seq_len=32)).examples == 20
    model.save_pretrained(tmp_path / "trained")
    trained_losses = compute_peft_losses(model_folder, tmp_path / "trained", rows[140:])
    truncated_losses = compute_peft_losses(model_folder, folder / "adapter", rows[140:])
    tokens = sum(sum(label != -100 for label in row["labels"][1:]) for row in rows[140:])
    assert (sum(truncated_losses) - sum(trained_losses)) / tokens == pytest.approx(answer.difference, abs=1e-4)


def test_the_answer_is_that_of_resize_data_on_the_saved_folder(
    model_folder: Path, completion_file: Path, rows: Rows, tmp_path: Path
) -> None:
    """Use the same examples and the same training rows for second moments: the values and bounds of all candidates agree."""
    model = run_training(model_folder, rows, tmp_path / "out", max_steps=60).model
    model.save_pretrained(tmp_path / "trained")
    adapter = open_adapter(tmp_path / "trained")
    runtime = make_runtime(model_folder, completion_file, build_small_settings(margin=0.1), tmp_path / "cache")
    smallest, _ = measure_truncations(
        adapter, runtime.evaluator, runtime.settings, list_candidate_ranks(adapter), tmp_path / "folder"
    )
    folder_answer = smallest.answer
    steps = runtime.settings.count_training_steps(len(runtime.data.splits["train"]))
    seed = runtime.settings.seeds[0]
    order = [index for batch in runtime.plan_batches(seed, 2 * steps)[steps:] for index in batch]
    with attach_adapter(runtime.evaluator, adapter.path) as attached_model:
        tokens = gather_unseen_moments(runtime.evaluator, runtime.settings, attached_model, seed, steps).tokens
    totals = np.cumsum(runtime.data.splits["train"].lengths[order]).tolist()
    read = order[: totals.index(tokens) + 1]

    def batches(split: SplitName, indices: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        examples = [runtime.data.splits[split][index] for index in indices]
        return [
            {"input_ids": torch.tensor([list(candidate.input_ids)]), "labels": torch.tensor([list(candidate.labels)])}
            for candidate in examples
        ]

    held_out = batches("validation", range(len(runtime.data.splits["validation"])))
    train = batches("train", read)
    answer = measure(model, held_out, train, tmp_path / "live", margin=0.1, moment_tokens=10**9).answer
    assert (answer.rank, answer.trained_rank) == (folder_answer.rank, folder_answer.trained_rank)
    assert answer.difference_high == pytest.approx(folder_answer.difference_high, abs=1e-4)
    by_rank = {candidate.rank: candidate for candidate in folder_answer.candidates}
    for candidate in answer.candidates:
        assert candidate.value == pytest.approx(by_rank[candidate.rank].value, abs=1e-4)
        assert candidate.difference == pytest.approx(by_rank[candidate.rank].difference, abs=1e-4)


def test_the_model_is_given_back_as_it_came(model_folder: Path, rows: Rows, tmp_path: Path) -> None:
    model = make_peft_model(model_folder)
    model.train()
    model.base_model.model.model.layers[0].eval()
    batches = make_batches(rows[:40])
    torch.autograd.backward(compute_batch_loss(model, batches[0]).total)
    initial_values = {name: value.detach().clone() for name, value in model.named_parameters()}
    gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    needs = [parameter.requires_grad for parameter in model.parameters()]
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    configs, active = copy.deepcopy(model.peft_config), copy.deepcopy(model.active_adapter)
    layers = [copy.copy(vars(module)) for module in model.modules()]
    measure(model, batches[20:], batches[:20], tmp_path)
    assert all(torch.equal(value, initial_values[name]) for name, value in model.named_parameters())
    assert {name for name, value in model.named_parameters() if value.grad is not None} == set(gradients)
    assert all(
        torch.equal(value.grad, gradients[name]) for name, value in model.named_parameters() if name in gradients
    )
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert [parameter.requires_grad for parameter in model.parameters()] == needs
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]
    assert {name: vars(config) for name, config in model.peft_config.items()} == {
        n: vars(config) for n, config in configs.items()
    }
    assert model.active_adapter == active
    assert [vars(module) for module in model.modules()] == layers  # nothing is replaced, added or taken away


@pytest.mark.filterwarnings("ignore")
def test_examples_packed_in_one_row_have_their_own_losses(model_folder: Path, rows: Rows) -> None:
    """Pack by hand, and join rows as TRL's collator without padding does."""
    model = make_peft_model(model_folder).eval()
    alone = score_batches(model, make_batches(rows[:3]))
    joined = {key: torch.tensor([[token for row in rows[:3] for token in row[key]]]) for key in ("input_ids", "labels")}
    joined["position_ids"] = torch.tensor([[index for row in rows[:3] for index in range(len(row["labels"]))]])
    collators = pytest.importorskip("trl.trainer.sft_trainer")
    collator = collators.DataCollatorForLanguageModeling(pad_token_id=1, padding_free=True)
    by_trl = collator([dict(row) for row in rows[:3]])
    for batch in (joined, {key: by_trl[key] for key in ("input_ids", "labels", "position_ids")}):
        packed = score_batches(model, [batch])
        assert packed.tokens == alone.tokens
        assert packed.losses == pytest.approx(alone.losses, rel=1e-3)  # the first sees nothing before it


class BrokenTracker(TrainerCallback):
    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "rightrank/rank" in logs:
            raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("function", "line"),
    [
        (
            "rightrank.trainers.measurement.measure_truncations",
            "the search .* failed: {error}; to measure the saved adapter: rightrank resize .*/trained .*/resized --data .*",
        ),
        ("rightrank.trainers.measurement._save_adapter", "the search .* failed: {error}"),
        ("rightrank.trainers.smallest.read_moment_batches", "the search .* failed: {error}"),
        ("", "a tracker did not accept the values: {error}"),
    ],
)
def test_what_fails_at_the_end_is_one_line(
    function: str,
    line: str,
    model_folder: Path,
    rows: Rows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Check that the traceback is in the log at debug level, and that a measurement of an earlier training is not named."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    if function.endswith("read_moment_batches"):
        (tmp_path / "rightrank" / "trained").mkdir(parents=True)
    if function:
        monkeypatch.setattr(function, full)
    trainer = make_trainer(model_folder, rows, tmp_path, lambda _: BrokenTracker(), SmallestAdapter, max_steps=1)
    with caplog.at_level(logging.DEBUG, "rightrank"):
        trainer.train()
    assert trainer.state.global_step == 1
    error = re.escape("[Errno 28] No space left on device")
    assert re.fullmatch("rightrank: " + line.format(error=error), list_messages(caplog)[-1])
    assert "Traceback" in caplog.text
    assert function or (tmp_path / "rightrank" / "adapter").is_dir()


def test_a_measurement_that_was_cut_off_is_made_by_the_command_that_was_logged(
    model_folder: Path,
    rows: Rows,
    completion_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    callback, folder = partial(SmallestAdapter, margin=0.1, ranks=[2, 8]), tmp_path / "cut" / "rightrank"
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "rightrank"):
        patch.setattr("rightrank.trainers.measurement.measure_truncations", raise_interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_training(model_folder, rows, tmp_path / "cut", callback)
    assert [path.name for path in folder.iterdir()] == ["trained"]
    line = next(line for line in list_messages(caplog) if "if this is interrupted: " in line)
    _, *command = shlex.split(line.split("if this is interrupted: ")[1])
    lines = completion_file.read_text(encoding="utf-8").splitlines(keepends=True)
    files = {"TRAINING.jsonl": lines[:140], "HELD_OUT.jsonl": lines[140:]}
    for name, chosen in files.items():
        (tmp_path / name).write_text("".join(chosen), encoding="utf-8")
    arguments = [str(tmp_path / word) if word in files else word for word in command]
    capsys.readouterr()  # what the training said
    exit_status, printed, _ = run([*arguments, "--json", "--set", "seq_len=32"], capsys)
    assert exit_status == 0
    answer = json.loads(printed)["answer"]
    assert (answer["margin"], answer["trained_rank"]) == (0.1, 16)
    assert {candidate["rank"] for candidate in answer["candidates"]} <= {1, 2, 4, 8, 16}
    assert open_adapter(folder / "resized").modules
    assert run_training(model_folder, rows, tmp_path / "cut", callback).result is not None
    assert (folder / "adapter").is_dir()
    assert not (folder / "trained").exists()


def test_rows_of_the_training_set_are_counted_and_left_out(
    model_folder: Path, rows: Rows, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Give other rows than the trainer's."""
    callback = partial(SmallestAdapter, eval_dataset=RowList(rows[130:165]), margin=0.1)
    with caplog.at_level(logging.WARNING, "rightrank"):
        result = run_training(model_folder, rows, tmp_path, callback, max_steps=2).result
    assert "10 of 35 held-out rows are also in the training set; they are left out" in caplog.text
    assert len(result.trained_scores.losses) == 25
    assert "10 of 35" in (tmp_path / "rightrank" / "answer.json").read_text(encoding="utf-8")


def test_the_best_checkpoint_is_measured_where_the_trainer_loads_it(
    model_folder: Path, rows: Rows, tmp_path: Path
) -> None:
    changes = {"eval_strategy": "steps", "eval_steps": 10, "save_strategy": "steps", "save_steps": 10, "max_steps": 40}
    # At this rate the last step is not the best one.
    changes |= {"load_best_model_at_end": True, "learning_rate": 0.3, "lr_scheduler_type": "constant"}
    callback = run_training(model_folder, rows, tmp_path, partial(SmallestAdapter, margin=0.1), **changes)
    document = json.loads((tmp_path / "rightrank" / "answer.json").read_text(encoding="utf-8"))
    assert any("Measured on the best (step " in note for note in document["notes"])
    value = score_batches(callback.trainer.model.eval(), make_batches(rows[140:])).loss
    assert callback.result.trained_scores.loss == pytest.approx(value, rel=1e-4)


def test_a_resumed_training_is_measured_as_the_whole_one(
    model_folder: Path, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # several batches, of a training this short
    monkeypatch.setattr("rightrank.trainers.trainer_batches.MOMENT_TOKEN_FRACTION", 0.5)
    callback = partial(SmallestAdapter, margin=0.1)
    complete = run_training(model_folder, rows, tmp_path, callback, max_steps=8, save_strategy="steps", save_steps=4)
    trainer = make_trainer(model_folder, rows, tmp_path, callback, max_steps=8)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    resumed = find_callback(trainer).result
    value = score_batches(complete.trainer.model.eval(), make_batches(rows[140:])).loss
    assert resumed.trained_scores.loss == pytest.approx(value, rel=1e-4)
    values = [[candidate.value for candidate in result.answer.candidates] for result in (complete.result, resumed)]
    assert values[0] == pytest.approx(values[1], rel=1e-5)  # the same examples and the same second moments


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_the_end_of_a_classification(model_folder: Path, class_file: Path, tmp_path: Path, metric: str) -> None:
    """Use the trainer's own rows and metric. The trained head is kept."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    rows = [json.loads(line) for line in class_file.read_text(encoding="utf-8").splitlines()]
    encoded = [{**tokenizer(row["text"]), "label": int(row["label"] == "cat")} for row in rows]
    base = AutoModelForSequenceClassification.from_pretrained(
        model_folder, num_labels=2, pad_token_id=tokenizer.pad_token_id
    )
    model: Any = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="SEQ_CLS"))
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=60, learning_rate=1e-2, per_device_train_batch_size=8, save_strategy="no",
        report_to=[], disable_tqdm=True, use_cpu=True, metric_for_best_model=None if metric == "loss" else "eval_accuracy",
    )  # fmt: skip
    collator = DataCollatorWithPadding(tokenizer)
    trainer = Trainer(model, arguments, collator, encoded[:200], encoded[200:])
    callback = SmallestAdapter(trainer, margin=0.05)
    trainer.add_callback(callback)
    trainer.train()
    assert (tmp_path / "out" / "rightrank" / "adapter" / "classifier.json").is_file()
    assert callback.result is not None
    assert callback.metric == (None if metric == "loss" else "accuracy")
    assert callback.result.answer.candidates[0].value == callback.result.trained_scores.metrics[metric]
    if metric == "accuracy":
        return
    assert callback.result.trained_scores.loss == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-4)
    model.save_pretrained(tmp_path / "trained")
    folder = tmp_path / "out" / "rightrank" / "adapter"
    values = [
        compute_class_loss(model_folder, adapter_path, encoded[200:], collator)
        for adapter_path in (tmp_path / "trained", folder)
    ]
    assert values[1] - values[0] == pytest.approx(callback.result.answer.difference, abs=1e-4)
    set_update_to_zero(model, "default")  # the head stays the trained one
    gain = trainer.evaluate()["eval_loss"] - callback.result.trained_scores.loss
    assert gain == pytest.approx(callback.result.answer.gain.mean, abs=1e-4)


def compute_class_loss(folder: Path, adapter: Path, rows: Sequence[Any], collator: Any) -> float:
    torch.manual_seed(5)
    base = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=2, pad_token_id=collator.tokenizer.pad_token_id
    )
    model = PeftModel.from_pretrained(base, adapter).eval()
    with torch.no_grad():
        return sum(float(model(**collator([row])).loss) for row in rows) / len(rows)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("changes", [{}, {"precompute_ref_log_probs": True, "beta": 0.5}])
def test_the_end_of_a_preference_training(changes: dict[str, Any], model_folder: Path, tmp_path: Path) -> None:
    """Compare the loss of pairs with TRL's loss and its reference, and the adapter's difference with the callback's."""
    trainer, held_out = make_dpo_trainer(model_folder, tmp_path, max_steps=30, **changes)
    callback = SmallestAdapter(trainer, margin=0.05)
    trainer.add_callback(callback)
    trainer.train()
    assert callback.result is not None
    assert callback.result.trained_scores.loss == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-3)
    assert callback.result.answer.has_no_gain == (callback.result.answer.rank == 16)
    live, adapter_path = trainer.model, tmp_path / "out" / "rightrank" / "adapter"
    batches = [trainer.data_collator([row]) for row in held_out]
    losses_in_memory = [
        float(batch_loss.example_losses)
        for batch_loss in (compute_batch_loss(live.eval(), b, trainer.args.beta) for b in batches)
    ]
    reloaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32), adapter_path
    ).eval()
    losses_of_file = [
        float(batch_loss.example_losses)
        for batch_loss in (compute_batch_loss(reloaded, b, trainer.args.beta) for b in batches)
    ]
    assert (sum(losses_of_file) - sum(losses_in_memory)) / len(losses_in_memory) == pytest.approx(
        callback.result.answer.difference, abs=1e-4
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("changes", "reference", "named"),
    [
        ({"loss_type": "aot"}, None, "loss_type .*aot.*"),
        ({"loss_weights": [3.0]}, None, "loss_weights"),
        ({}, torch.nn.Identity(), "ref_model"),
    ],
)
def test_a_loss_of_pairs_that_is_not_plain_is_refused(
    model_folder: Path, tmp_path: Path, changes: dict[str, Any], reference: Any, named: str
) -> None:
    trainer, _ = make_dpo_trainer(model_folder, tmp_path, max_steps=1, **changes)
    trainer.ref_model = reference
    trainer.add_callback(SmallestAdapter(trainer))
    with pytest.raises(SettingsError, match=named):
        trainer.train()


def make_dpo_trainer(model_folder: Path, folder: Path, **changes: Any) -> tuple[Any, Any]:
    datasets = pytest.importorskip("datasets")
    trl = pytest.importorskip("trl")
    pairs = datasets.load_dataset("json", data_files=str(write_pairs(folder / "pairs.jsonl")), split="train")
    splits = pairs.train_test_split(60, seed=0)
    settings: dict[str, Any] = {
        "learning_rate": 3e-3,
        "per_device_train_batch_size": 8,
        "save_strategy": "no",
        "report_to": [],
    }
    settings |= {"disable_tqdm": True, "use_cpu": True, "bf16": False, "max_length": 64}
    trainer = trl.DPOTrainer(
        AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32),
        args=trl.DPOConfig(output_dir=str(folder / "out"), **settings | changes),
        train_dataset=splits["train"],
        eval_dataset=splits["test"],
        processing_class=AutoTokenizer.from_pretrained(model_folder),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )
    return trainer, trainer.eval_dataset


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_end_of_a_trl_training(model_folder: Path, completion_file: Path, tmp_path: Path) -> None:
    """Use `SFTTrainer`, which tokenizes the rows itself and whose loss returns no logits if labels are passed."""
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
    callback = SmallestAdapter(trainer, margin=0.1)
    trainer.add_callback(callback)
    trainer.train()
    assert callback.result is not None
    top = next(candidate for candidate in callback.result.answer.candidates if candidate.rank == 16)
    evaluated = trainer.evaluate()["eval_loss"]
    assert top.value == pytest.approx(evaluated, rel=0.02)  # the trainer averages batches, not tokens
    assert (tmp_path / "out" / "rightrank" / "adapter" / "adapter_config.json").exists()
