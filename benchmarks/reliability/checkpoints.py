"""What checkpoints cost: the share of a training's time that goes into writing them.

    python -m benchmarks.reliability.checkpoints > benchmarks/reliability/checkpoints.json

One model and one adapter are trained in two ways in turn: with a checkpoint every `--every` seconds (the default
setting is 60), and with one as often as the engine's own limit lets (asked for all the time). The seconds inside
`save` (fsync included) are counted against the training's seconds, so the share needs no second run to compare with.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.helpers import make_runtime
from tests.tiny import make_tokenizer, small_settings, write_completions

from benchmarks.machine import machine
from rightrank.schema.events import Listener
from rightrank.schema.trials import Arm, Trial, TrialFinished
from rightrank.train import trial as arm_training
from rightrank.train.loop import run_trial
from rightrank.train.trial import ArmTraining, TrialFolders


def save_llama(folder: Path, width: int, layers: int) -> Path:
    """A random Llama whose adapters are large beside a step's work: the worst case for checkpoints."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128, pad_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def measure(model: Path, root: Path, every: float, rank: int, steps: int) -> dict[str, Any]:
    """One training; seconds in all and in `save`."""
    settings = small_settings(ranks=(rank,), max_steps=steps, eval_points=1, checkpoint_seconds=every)
    runtime = make_runtime(model, write_completions(root / "data.jsonl"), settings, root / "cache")
    saves: list[float] = []
    sizes: list[int] = []
    real = ArmTraining.save

    def timed(training: ArmTraining) -> None:
        begun = time.perf_counter()
        real(training)
        saves.append(time.perf_counter() - begun)
        sizes.append(folders.checkpoint.stat().st_size)

    folders = TrialFolders(root / f"checkpoint-{every}", root / f"adapter-{every}")
    arm = Arm(rank=rank, learning_rate=1e-4, lora_alpha=32.0, seed=0, steps=steps)
    arm_training.ArmTraining.save = timed  # type: ignore[method-assign]
    begun = time.perf_counter()
    outcome = run_trial(runtime, Trial(trial_id="a" * 12, arm=arm), 20.0, folders, Listener())
    seconds = time.perf_counter() - begun
    arm_training.ArmTraining.save = real  # type: ignore[method-assign]
    assert isinstance(outcome, TrialFinished)
    return {
        "checkpoint_seconds": every,
        "training_seconds": round(seconds, 1),
        "checkpoints": len(saves),
        "checkpoint_mib": round(max(sizes, default=0) / 2**20, 1),
        "mean_save_seconds": round(sum(saves) / max(len(saves), 1), 4),
        "share": round(sum(saves) / seconds, 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=float, default=60.0)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--width", type=int, default=256)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model = save_llama(root / "model", options.width, layers=4)
        runs = [measure(model, root, every, options.rank, options.steps) for every in (options.every, 1e-6)]
    print(
        json.dumps(
            {"machine": machine(), "rank": options.rank, "limit": arm_training.CHECKPOINT_SHARE, "runs": runs}, indent=1
        )
    )


if __name__ == "__main__":
    main()
