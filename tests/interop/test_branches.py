"""`SmallestAdapter(branch=True)`: branches of a training of others, against the training's own end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from rightrank import SmallestAdapter, Squeeze
from rightrank.interop import end_run, live_cut
from rightrank.schema.trials import TrialFinished
from tests.interop.trainings import Listed, Rows, peft_model

pytestmark = pytest.mark.trains

STEPS = 16


def trained(folder: Path, rows: Rows, out: Path, callback: Any, **changes: Any) -> Trainer:
    settings: dict[str, Any] = {"max_steps": STEPS, "learning_rate": 2e-2, "per_device_train_batch_size": 4, "seed": 0}
    settings |= {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True}
    arguments = TrainingArguments(output_dir=str(out), **settings | changes)
    collator = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(folder), padding=True)
    model = peft_model(folder, lora_dropout=0.0)
    trainer = Trainer(model, arguments, collator, Listed(rows[:140]), Listed(rows[140:]), callbacks=[callback])
    trainer.train()
    return trainer


@pytest.mark.parametrize("memory", [2**26, 0], ids=["in memory", "on disk"])
def test_a_branch_is_the_training_that_is_cut_there(
    model_folder: Path, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: int
) -> None:
    """Of the rank and the place that hold first; the training's own end stays as it was, to the bit."""
    monkeypatch.setattr(live_cut, "MAX_MEMORY", memory)
    changes = {"gradient_accumulation_steps": 2}
    plain = SmallestAdapter(margin=1e-3, ranks=[1, 2, 4])
    alone = trained(model_folder, rows, tmp_path / "plain", plain, **changes)
    callback = SmallestAdapter(margin=1e-3, ranks=[1, 2, 4], branch=True)
    trainer = trained(model_folder, rows, tmp_path / "branches", callback, **changes)
    assert "training_step" not in vars(trainer)
    ends = dict(alone.model.named_parameters())
    assert all(torch.equal(one, ends[name]) for name, one in trainer.model.named_parameters())
    assert trainer.model.peft_config["default"].r == 16
    assert plain.result is not None
    assert callback.result is not None
    trials = {one.trial_id: one for one in callback.result.folder.journal.read() if isinstance(one, TrialFinished)}
    branched = [one for one in callback.result.answer.candidates if one.how == "branched"]
    assert {one.trial_id for one in plain.result.answer.candidates} <= trials.keys()
    first = max((one for one in branched if trials[one.trial_id].cut.step == STEPS * 3 // 4), key=lambda one: one.rank)

    squeezed = Squeeze(rank=first.rank, at=0.75)
    model: Any = trained(model_folder, rows, tmp_path / "squeezed", squeezed, **changes).model
    model.eval()
    with torch.no_grad():
        sums = [
            (
                float(model(**{key: torch.tensor([value]) for key, value in row.items()}).loss),
                sum(one != -100 for one in row["labels"][1:]),
            )
            for row in rows[140:]
        ]
    loss = sum(value * count for value, count in sums) / sum(count for _, count in sums)
    assert first.value == pytest.approx(loss, rel=1e-3)


def test_what_is_handed_over_is_the_branch(
    model_folder: Path, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no truncation holds and a branch does: its file, its card and the document say so."""
    wrong = end_run._End.truncated

    def worse(self: end_run._End, *given: Any) -> Any:
        found = wrong(self, *given)
        return replace(found, losses=[loss + 100 for loss in found.losses])

    monkeypatch.setattr(end_run._End, "truncated", worse)
    callback = SmallestAdapter(margin=10.0, ranks=[1, 2], branch=True)
    trained(model_folder, rows, tmp_path, callback)
    assert callback.result is not None
    assert (callback.result.answer.rank, callback.result.answer.how) == (1, "branched")
    folder = tmp_path / "rightrank"
    card = (folder / "adapter" / "README.md").read_text()
    assert f"cut to rank 1 by K-FAC at step {STEPS * 3 // 4}" in card
    assert json.loads((folder / "decision.json").read_text())["handed_over"]["how"] == "branched"
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, folder / "adapter")
    assert loaded.peft_config["default"].r < 16
