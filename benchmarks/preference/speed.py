"""A training step on preference pairs, here and in TRL's `DPOTrainer`: same model, batches and adapter, in one run.

    python -m benchmarks.preference.speed MODEL gloss_pairs.jsonl --out benchmarks/preference/speed.json

Seconds are CPU seconds of one thread, the median over the steps after the first. The reference is computed before the
steps where the trainer can do so (`precompute_ref_log_probs`); its time is given apart.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import trl
from tests.watch import Watch
from transformers import TrainerCallback

from benchmarks.machine import machine
from benchmarks.preference.trl_trainer import trainer_over
from rightrank.data.splits import load_data
from rightrank.models.base_models import load_base
from rightrank.schema.events import StepDone
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import Arm, Trial
from rightrank.train.loop import train_trials
from rightrank.train.runtime import Runtime
from rightrank.train.tokens import encode
from rightrank.train.trial import TrialFolders

ARM = Arm(rank=16, learning_rate=3e-3, lora_alpha=32.0, seed=0, steps=4)
CASES: dict[str, dict[str, Any]] = {"last two layers": {"layers_to_transform": (28, 29)}, "all layers": {}}


def settings_of(case: dict[str, Any]) -> SelectSettings:
    return SelectSettings(
        **{"ranks": (16,), "seq_len": 48, "max_steps": ARM.steps, "eval_items": 16, "device": "cpu", "eval_points": 1}
        | case
    )


class Clock:
    """CPU seconds and losses by step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self._last = 0.0

    def start(self) -> None:
        self._last = time.process_time()

    def step(self) -> None:
        now = time.process_time()
        self.seconds.append(now - self._last)
        self._last = now

    @property
    def per_step(self) -> float:
        return round(median(self.seconds[1:]), 3)


def ours(runtime: Runtime, folder: Path) -> tuple[Clock, float]:
    """The steps, and the seconds of what is computed once before them."""
    clock = Clock()
    begun = time.process_time()
    runtime.prepare(lambda _: None, lambda: False)
    once = time.process_time() - begun

    def note(event: Any) -> None:
        if isinstance(event, StepDone):
            clock.losses.append(event.loss)
            clock.step()

    clock.start()
    folders = TrialFolders(folder / "checkpoint.safetensors", folder / "adapter")
    list(train_trials(runtime, [Trial(trial_id="t", arm=ARM)], None, lambda _: folders, Watch(on_event=note)))
    return clock, round(once, 2)


def theirs(runtime: Runtime, model: str, data: Path, folder: Path, precompute: bool) -> tuple[Clock, float]:
    """As `ours`, for TRL."""
    clock = Clock()

    class Note(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.step()

    begun = time.process_time()
    trainer = trainer_over(runtime, ARM, model, data, folder, precompute=precompute, callbacks=[Note()])
    once = time.process_time() - begun
    clock.start()
    trainer.train()
    clock.losses = trainer.losses
    return clock, round(once, 2)


def measured(model: str, data: Path, case: dict[str, Any]) -> dict[str, Any]:
    settings = settings_of(case)
    splits = load_data(data, settings)
    loaded = load_base(model, settings, None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runtime = Runtime(loaded, encode(splits, loaded, settings), settings, ARM.steps, folder / "cache")
        mine, once = ours(runtime, folder)
        plain, _ = theirs(runtime, model, data, folder / "trl", precompute=False)
        known, their_once = theirs(runtime, model, data, folder / "trl", precompute=True)
    return {
        "rightrank": {"step_seconds": mine.per_step, "once_seconds": once, "losses": mine.losses},
        "trl": {"step_seconds": plain.per_step, "losses": plain.losses},
        "trl, reference first": {"step_seconds": known.per_step, "once_seconds": their_once},
        "ratio": round(plain.per_step / mine.per_step, 2),
        "ratio, reference first": round(known.per_step / mine.per_step, 2),
        "first_loss_difference": abs(mine.losses[0] - plain.losses[0]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"machine": machine(), "trl": trl.__version__, "batch": "8 pairs of glosses", "cases": {}}
    for name, case in CASES.items():
        result["cases"][name] = measured(options.model, options.data, case)
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
