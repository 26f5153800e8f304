"""The certificate on a real model: an arm of a pack of three, trained again alone, in float32 and in bfloat16.

python -m benchmarks.engine.certified MODEL DATA [--layers 28,29] [--steps 6] [--out certified.json]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.engine.common import machine, make_runtime
from rightrank.hooks.certificate import certify
from rightrank.schema.events import Listener
from rightrank.schema.trials import Arm, Trial, TrialFinished
from rightrank.train.loop import train_trials
from rightrank.train.trial import TrialFolders

ARMS = ((16, 0), (16, 1), (4, 0))  # rank and seed; the first is certified, the second says what a seed makes


def measure(arguments: argparse.Namespace, dtype: str) -> dict[str, Any]:
    work = arguments.work / dtype
    changes: dict[str, Any] = {"layers_to_transform": arguments.layers, "eval_items": 24, "seeds": (0, 1)}
    runtime = make_runtime(arguments.model, arguments.data, arguments.steps, work / "cache", dtype=dtype, **changes)
    trials = [
        Trial(
            trial_id=f"c{number}",
            arm=Arm(rank=rank, learning_rate=1e-3, lora_alpha=32.0, seed=seed, steps=arguments.steps),
        )
        for number, (rank, seed) in enumerate(ARMS)
    ]

    def folders(trial: Trial) -> TrialFolders:
        return TrialFolders(work / f"{trial.trial_id}.safetensors", work / trial.trial_id)

    ended = list(train_trials(runtime, trials, None, folders, Listener(), len(ARMS)))
    found = {outcome.trial_id: outcome for outcome in ended if isinstance(outcome, TrialFinished)}
    seeds = abs(found["c0"].value - found["c1"].value)
    certified = certify(runtime, found["c0"], work / "c0", work / "again", Listener(), seeds)
    return certified.model_dump() | {"dtype": dtype, "sentence": certified.sentence()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--layers", type=lambda text: tuple(map(int, text.split(","))), default=(28, 29))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--work", type=Path, default=Path("bench-work"))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    result = {"machine": machine(), "runs": [measure(arguments, dtype) for dtype in ("float32", "bfloat16")]}
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
