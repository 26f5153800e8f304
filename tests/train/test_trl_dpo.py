"""Our training on preference pairs is that of TRL's `DPOTrainer`: same batches, same first A, step by step."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from rightrank.schema.events import StepDone
from rightrank.schema.trials import Arm, Trial, TrialFinished
from rightrank.train.loop import train_trials
from rightrank.train.trial import TrialFolders
from tests.helpers import make_runtime
from tests.models.kind_checks import with_first_values
from tests.tiny import small_settings, write_jsonl, write_pairs
from tests.watch import Watch

pytestmark = [
    pytest.mark.trains,
    pytest.mark.skipif(find_spec("trl") is None, reason="trl is not installed"),
    pytest.mark.filterwarnings("ignore"),  # of TRL and of what it imports
]

ARM = Arm(rank=4, learning_rate=1e-2, lora_alpha=32.0, seed=3, steps=8)
OTHER = ARM.model_copy(update={"rank": 2, "learning_rate": 3e-2})
BOUND = 2e-5


def rows_of(path: Path, form: str) -> Path:
    """The pairs of `write_pairs`, also as conversations or with an implicit prompt."""
    rows = [json.loads(line) for line in write_pairs(path).read_text(encoding="utf-8").splitlines()]
    if form == "messages":
        rows = [
            {"prompt": [{"role": "user", "content": row["prompt"]}]}
            | {name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")}
            for row in rows
        ]
    if form == "implicit":
        rows = [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in rows]
    return write_jsonl(path, rows)


def ours(runtime: Any, folder: Path, arms: list[Arm]) -> tuple[list[float], TrialFinished]:
    """Losses of the first arm's steps, and its outcome; all arms in one pass."""
    losses: list[float] = []

    def note(event: Any) -> None:
        if isinstance(event, StepDone) and event.trial_id == "t0":
            losses.append(event.loss)

    trials = [Trial(trial_id=f"t{number}", arm=arm) for number, arm in enumerate(arms)]
    outcomes = train_trials(
        runtime,
        trials,
        None,
        lambda trial: TrialFolders(folder / f"{trial.trial_id}.safetensors", folder / trial.trial_id),
        Watch(on_event=note),
        len(arms),
    )
    found = {outcome.trial_id: outcome for outcome in outcomes}["t0"]
    assert isinstance(found, TrialFinished)
    return losses, found


def theirs(runtime: Any, model_folder: Path, data: Path, folder: Path) -> tuple[list[float], float]:
    """Losses of TRL's steps over our batches in our order, and its held-out loss."""
    from tests.train.trl_trainer import trainer_over

    trainer = trainer_over(runtime, ARM, model_folder, data, folder)
    with_first_values(runtime, ARM, trainer.model)
    trainer.train()
    return list(trainer.losses), trainer.evaluate()["eval_loss"]


@pytest.mark.parametrize(
    ("form", "changes"),
    [
        ("strings", {}),
        ("messages", {"layers_to_transform": (2,), "beta": 0.3, "seq_len": 64}),
        ("implicit", {"seq_len": 16}),
    ],
    ids=["strings", "messages-prefix", "implicit-truncated"],
)
def test_each_step_has_the_loss_of_trl(model_folder: Path, tmp_path: Path, form: str, changes: dict[str, Any]) -> None:
    data = rows_of(tmp_path / "pairs.jsonl", form)
    runtime = make_runtime(model_folder, data, small_settings(**changes), tmp_path / "cache")
    their_losses, their_held_out = theirs(runtime, model_folder, data, tmp_path / "trl")
    for arms in ([ARM], [ARM, OTHER]):
        losses, finished = ours(runtime, tmp_path / f"ours-{len(arms)}", arms)
        assert losses == pytest.approx(their_losses, abs=BOUND)
        assert finished.metrics["loss"] == pytest.approx(their_held_out, abs=BOUND)
    assert abs(losses[-1] - losses[0]) > 0.01
