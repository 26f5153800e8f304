"""Test the setting `checkpoint`: which evaluation of each training a run keeps, and what the other one would give."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from rightrank.api.selecting import Selected, select_rank
from rightrank.runs.folder import Journal
from rightrank.schema.errors import InterruptedRun
from rightrank.schema.events import StepDone, TestEvaluated
from rightrank.schema.metrics import Checkpoint
from rightrank.schema.trials import TrialFinished
from tests.commands import read_journal_records
from tests.helpers import make_runtime
from tests.tiny import build_small_settings, write_jsonl
from tests.watch import Watch

pytestmark = pytest.mark.trains

NAMES = ("ada", "ben", "cleo", "dan", "eve", "finn", "gus", "hal")


@pytest.fixture(scope="module")
def overfitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return rows with one completion, and validation rows with any: a training first learns the names and then overfits."""
    return write_rows(tmp_path_factory.mktemp("rows"))


def write_rows(folder: Path) -> Path:
    """Write `data.jsonl` and `validation.jsonl` to the folder, and return the path of the first."""
    generator = random.Random(0)

    def draw_names(of: Sequence[str] = NAMES) -> str:
        return " ".join(generator.choices(of, k=4))

    def draw_rows(count: int, num_others: int) -> list[dict[str, Any]]:
        return [
            {
                "prompt": draw_names(),
                "completion": f" {draw_names(NAMES[4:]) if index < num_others else 'ada ben cleo dan'}",
            }
            for index in range(count)
        ]

    write_jsonl(folder / "validation.jsonl", draw_rows(60, num_others=40))
    return write_jsonl(folder / "data.jsonl", draw_rows(150, num_others=0))


def select(
    model: Path, data: Path, out: Path, checkpoint: Checkpoint, watch: Watch | None = None, **changes: Any
) -> Selected:
    values: dict[str, Any] = {
        "ranks": (4, 8),
        "max_steps": 60,
        "learning_rates": (2e-2,),
        "num_evaluations": 6,
        "margin": 0.02,
        "validation": str(data.with_name("validation.jsonl")),
    }
    values |= {"strategy": "bracket", "goal": "adapter", "checkpoint": checkpoint}
    settings = build_small_settings(**(values | changes))
    return select_rank(str(model), data, out, settings=settings, callbacks=[] if watch is None else [watch])


def find_trained(run: Path) -> TrialFinished:
    return next(trial for trial in read_journal_records(run, TrialFinished) if trial.rank == 8 and trial.arm.is_direct)


def compute_peft_loss(model: Path, adapter: Path, data: Path, cache: Path) -> float:
    """Compute the loss on the validation split by a plain forward pass with the adapter as PEFT loads it."""
    settings = build_small_settings(validation=str(data.with_name("validation.jsonl")))
    examples = make_runtime(model, data, settings, cache).data.splits["validation"]
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), adapter).eval()
    total, count = 0.0, 0
    for example in examples:
        tokens = sum(label != -100 for label in example.labels[1:])
        with torch.no_grad():
            passed = {
                "input_ids": torch.tensor([list(example.input_ids)]),
                "labels": torch.tensor([list(example.labels)]),
            }
            total, count = total + float(loaded(**passed).loss) * tokens, count + tokens
    return total / count


@pytest.fixture(scope="module")
def runs(model_folder: Path, overfitted: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Checkpoint, Path]:
    folder = tmp_path_factory.mktemp("runs")
    folders: dict[Checkpoint, Path] = {"last": folder / "last", "best": folder / "best"}
    for checkpoint, run in folders.items():
        select(model_folder, overfitted, run, checkpoint)
    return folders


def test_the_best_checkpoint_is_kept_and_handed_over(
    runs: dict[Checkpoint, Path], model_folder: Path, overfitted: Path, tmp_path: Path
) -> None:
    last, best = find_trained(runs["last"]), find_trained(runs["best"])
    means = [point.mean_value for point in best.points]
    assert last.points == [point.model_copy(update={"mean_value": None}) for point in best.points]  # the same training
    assert None not in means
    value, step, is_mean = min(
        (value, point.step, is_mean)
        for point in best.points
        for value, is_mean in ((point.value, False), (point.mean_value or point.value, True))
    )
    assert last.checkpoint_step is None
    assert (step, is_mean) == (best.checkpoint_step, best.checkpoint_is_mean)
    assert best.value == pytest.approx(value, abs=1e-5)
    assert value < last.value
    assert last.value == pytest.approx(last.points[-1].value, abs=1e-5)
    adapter = runs["best"] / "trials" / best.trial_id
    assert compute_peft_loss(model_folder, adapter, overfitted, tmp_path) == pytest.approx(value, abs=1e-4)
    document = json.loads((runs["best"] / "decision.json").read_text(encoding="utf-8"))
    assert f"step {step} of 60 steps" in document["adapter_provenance"]
    assert document["handed_over"]["reference_adapter"] == f"trials/{best.trial_id}"


def test_only_the_kept_checkpoint_is_evaluated_on_the_test_split(runs: dict[Checkpoint, Path]) -> None:
    for run in runs.values():
        read = [
            record.trial_id for record in Journal(run / "journal.jsonl").read() if isinstance(record, TestEvaluated)
        ]
        assert len(read) == len(set(read)) <= 3


def test_an_interrupted_training_keeps_the_same_checkpoint(
    runs: dict[Checkpoint, Path], model_folder: Path, overfitted: Path, tmp_path: Path
) -> None:
    uninterrupted = find_trained(runs["best"])
    assert uninterrupted.checkpoint_step is not None
    steps: list[int] = []
    watch = Watch(
        lambda event: steps.append(event.step) if isinstance(event, StepDone) else None,
        should_stop=lambda: bool(steps) and steps[-1] == 55,
    )
    with pytest.raises(InterruptedRun):
        select(model_folder, overfitted, tmp_path / "run", "best", watch)
    assert uninterrupted.checkpoint_step < 55
    select(model_folder, overfitted, tmp_path / "run", "best")
    again = find_trained(tmp_path / "run")
    assert (again.checkpoint_step, again.example_losses) == (
        uninterrupted.checkpoint_step,
        uninterrupted.example_losses,
    )
