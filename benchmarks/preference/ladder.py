"""Which learning rates fit DPO on all layers: rank 16 at several of them, a few steps each.

    python -m benchmarks.preference.ladder MODEL gloss_pairs.jsonl --work FOLDER --out benchmarks/preference/ladder.json

The ladder of the last two layers is part of the grid (`grid.py`) and of the journal in its FOLDER.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine
from benchmarks.preference.grid import SETTINGS
from benchmarks.selection.real_training import Workshop, open_workshop
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import Arm, TrialFinished
from rightrank.search.history import base_arm

LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3)
STEPS = 24
ALL_LAYERS = {name: value for name, value in SETTINGS.items() if name != "layers_to_transform"}


def metrics_at(shop: Workshop, learning_rate: float) -> dict[str, float] | str:
    """The held-out metrics, or how the training ended."""
    arm = Arm(rank=16, learning_rate=learning_rate, lora_alpha=shop.settings.lora_alpha, seed=0, steps=STEPS)
    outcome = shop.run(arm)
    if not isinstance(outcome, TrialFinished):
        return outcome.type
    return {name: round(value, 4) for name, value in outcome.metrics.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = SelectSettings(
        **ALL_LAYERS | {"max_steps": STEPS, "eval_items": 100, "learning_rates": (1e-4, 3e-4, 1e-3)}
    )
    shop = open_workshop(options.model, options.data, settings, options.work)
    shop.run(base_arm(settings.lora_alpha))
    found: dict[str, Any] = {f"{rate:g}": metrics_at(shop, rate) for rate in LEARNING_RATES}
    result = {"machine": machine(), "rank": 16, "steps": STEPS, "validation_pairs": 100, "by_learning_rate": found}
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
