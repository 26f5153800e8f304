"""The live case: GRPO with TRL on two-digit addition, ranks × learning rates × seeds, every training with its looks.

    python -m benchmarks.rl.addition BASE             # the base, once
    python -m benchmarks.rl.live BASE                 # the trainings that `live.json` does not have yet

All trainings are whole: 150 steps of 16 prompts × 8 completions, a constant learning rate, 10 looks at 300 validation prompts,
and the best checkpoint measured on 300 test prompts. One takes about a minute on a core.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import GRPOConfig

from benchmarks.rl.addition import reward, rows
from rightrank.runs.calls import TrialTask

sys.path.append(str(Path(__file__).parents[2] / "examples"))

from trl_grpo import GRPOTrain

RESULTS = Path(__file__).with_name("live.json")
RANKS, LEARNING_RATES, SEEDS = (1, 4, 16), (1e-4, 4e-4, 2e-3), (0, 1, 2)
STEPS, LOOKS = 150, 10


def make_train(
    base: str, steps: int = STEPS, looks: int = LOOKS, batch: int = 128, held_out: int | None = None
) -> GRPOTrain:
    """The trainer of the case; smaller for tests."""
    splits = rows()
    settings = GRPOConfig(
        per_device_train_batch_size=batch,
        num_generations=8,
        max_completion_length=4,
        max_steps=steps,
        temperature=1.0,
        beta=0.0,
        lr_scheduler_type="constant",
        report_to=[],
        disable_tqdm=True,
        logging_steps=steps,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    return GRPOTrain(
        model=base,
        args=settings,
        train_dataset=Dataset.from_list(splits["train"]),
        validation=splits["validation"][:held_out],
        test=splits["test"][:held_out],
        looks=looks,
        reward_funcs=reward,
    )


def run(base: str) -> None:
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"about": about(), "runs": []}
    done = {(one["rank"], one["learning_rate"], one["seed"]) for one in stored["runs"]}
    train = make_train(base)
    for seed, learning_rate, rank in product(SEEDS, LEARNING_RATES, RANKS):
        if (rank, learning_rate, seed) in done:
            continue
        with tempfile.TemporaryDirectory() as folder:
            task = TrialTask(
                trial_id="live", rank=rank, learning_rate=learning_rate, lora_alpha=32.0, seed=seed, steps=STEPS,
                folder=Path(folder),
            )  # fmt: skip
            begun = time.perf_counter()
            result = train(task)
        stored["runs"].append(
            {
                "rank": rank,
                "learning_rate": learning_rate,
                "seed": seed,
                "steps": STEPS,
                "seconds": round(time.perf_counter() - begun, 1),
                "points": [[point.step, bits(point.item_scores or [])] for point in result.points],
                "test": bits(result.item_scores or []),
            }
        )
        RESULTS.write_text(json.dumps(stored, indent=1) + "\n")
        print(rank, learning_rate, seed, result.metrics, [round(point.value, 2) for point in result.points], flush=True)


def bits(scores: list[float]) -> str:
    """Rewards of 0 and 1 as a string: one digit for each prompt."""
    return "".join(str(int(score)) for score in scores)


def about() -> dict[str, Any]:
    names = ("torch", "transformers", "peft", "trl")
    return {
        "task": "two-digit addition; a llama of 128 × 3 that answers 40% of the prompts",
        "machine": f"{platform.machine()}, one thread of a shared CPU",
        "versions": {name: version(name) for name in names},
        "scores": "one digit a prompt: 1 for the right sum; points are [step, validation prompts], test is of the best checkpoint",
    }


if __name__ == "__main__":
    run(sys.argv[1])
