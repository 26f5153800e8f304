"""Compare one arm, and eight arms on the last layers of a model, with `Trainer` + PEFT and TRL's `SFTTrainer`.

    python -m benchmarks.engine.compare MODEL DATA --job one|tail [--steps 6] [--rounds 3] [--out result.json]

Every second round runs in reverse order. Every contender trains once on the same tokenised examples with batch size 8, and evaluates the same
held-out examples once at the end. Both are timed (processor seconds of the process, on one thread; wall time is stored too), but loading and
tokenising are not. A round runs every contender once, from a fresh adapter. Ratios
are computed within a round, and their median is reported together with all of them. `tail` trains one arm with each
contender that cannot share anything, counted eight times, and eight arms with ours, including the cost of the frozen prefix.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import shutil
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peft import get_peft_model

from benchmarks.engine.common import build_trainer_rows, describe_machine, limit_to_one_pass, make_runtime
from rightrank.evaluation import fast_paths
from rightrank.evaluation.device import read_peak_bytes, reset_peak_memory
from rightrank.schema.events import Listener
from rightrank.schema.trials import Arm, Trial, TrialFinished
from rightrank.training.loop import TrialFolders, train_trials
from rightrank.training.runtime import Runtime
from rightrank.training.targets import make_lora_config

BATCH, RATE, RANKS = 8, 1e-3, (16, 4, 1, 64)  # the held-out loss of the first is reported
TAIL_LAYERS = (28, 29)


@dataclass(frozen=True)
class Measured:
    seconds: float  # processor time of this process on a CPU, because wall time depends on other processes; wall time on a GPU
    wall_seconds: float
    held_out: float  # nats per label
    peak_bytes: int


class Clock:
    """Seconds since its creation: processor time and wall time. On a GPU both are wall time after a synchronization."""

    def __init__(self) -> None:
        self._begun = self._now()

    def measure_elapsed(self) -> tuple[float, float]:
        now = self._now()
        return now[0] - self._begun[0], now[1] - self._begun[1]

    def _now(self) -> tuple[float, float]:
        wall = time.perf_counter
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            return wall(), wall()
        return time.process_time(), wall()


@dataclass(frozen=True)
class Job:
    model: str
    data: Path
    work: Path
    steps: int
    max_eval_examples: int
    layers: tuple[int, ...] | None
    arms: int
    seed: int

    def runtime(self, dtype: str, is_cached: bool = True, **changes: Any) -> Runtime:
        """Build our runtime with exactly as many training examples as one pass needs."""
        settings: dict[str, Any] = {
            "dtype": dtype,
            "max_eval_examples": self.max_eval_examples,
            "seeds": (self.seed,),
            **changes,
        }
        if self.layers:
            settings["layers_to_transform"] = self.layers
        shutil.rmtree(self.work / "cache", ignore_errors=True)
        cache = self.work / "cache" if is_cached else None
        return limit_to_one_pass(make_runtime(self.model, self.data, self.steps, cache, **settings), cache)

    def arm(self, number: int) -> Arm:
        rate = RATE if number < len(RANKS) else RATE / 3
        rank = 16 if self.arms == 1 else RANKS[number % len(RANKS)]
        return Arm(rank=rank, learning_rate=rate, lora_alpha=32.0, seed=self.seed, steps=self.steps)


def train_ours(job: Job, dtype: str, pack: int, **changes: Any) -> Measured:
    runtime = job.runtime(dtype, **changes)
    trials = [Trial(trial_id=f"b{number}", arm=job.arm(number)) for number in range(job.arms)]
    folders = lambda trial: TrialFolders(job.work / f"{trial.trial_id}.ckpt", job.work / trial.trial_id)  # noqa: E731
    reset_peak_memory(runtime.loaded.device)
    begun = Clock()
    outcomes = list(train_trials(runtime, trials, None, folders, Listener(), pack))
    seconds, wall = begun.measure_elapsed()
    peak = read_peak_bytes(runtime.loaded.device)
    finished = [outcome for outcome in outcomes if isinstance(outcome, TrialFinished)]
    assert len(finished) == job.arms
    shown = next(outcome for outcome in finished if outcome.trial_id == trials[0].trial_id)
    return Measured(seconds, wall, shown.value, max([peak, *(outcome.peak_bytes for outcome in finished)]))


def train_with_trainer(
    job: Job, dtype: str, grouped: bool, sft: bool = False, small_adapters: bool = False
) -> Measured:
    """Train with transformers' Trainer (or TRL's) on the same examples; all other settings have their defaults.

    Args:
        small_adapters: keep PEFT's adapters in the model's dtype, where it uses float32 by default.
    """
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    runtime = job.runtime(dtype, is_cached=False)
    config = make_lora_config(runtime.settings, job.arm(0), False, runtime.targets.names)
    peft_model = get_peft_model(runtime.model, config, autocast_adapter_dtype=not small_adapters)
    rows = {"train": build_trainer_rows(runtime, "train"), "validation": build_trainer_rows(runtime, "validation")}
    common: dict[str, Any] = {
        "output_dir": str(job.work / "trainer"),
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": 1,
        "learning_rate": RATE,
        "warmup_steps": math.ceil(
            runtime.settings.warmup_ratio * job.steps
        ),  # as in ours, so that held-out losses are comparable
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "seed": job.seed,
        "logging_strategy": "no",
    }
    if grouped:
        common["train_sampling_strategy"] = "group_by_length"
        common["per_device_eval_batch_size"] = 16
    collator = DataCollatorForSeq2Seq(runtime.loaded.tokenizer, label_pad_token_id=-100)
    if sft:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        arguments = SFTConfig(
            **common, max_length=None, packing=False, dataset_kwargs={"skip_prepare_dataset": True}, bf16=False
        )
        built: Any = SFTTrainer(
            model=peft_model,
            args=arguments,
            train_dataset=Dataset.from_list(rows["train"]),
            eval_dataset=Dataset.from_list(rows["validation"]),
            data_collator=collator,
            processing_class=runtime.loaded.tokenizer,
        )
    else:
        built = Trainer(
            model=peft_model,
            args=TrainingArguments(**common),
            train_dataset=rows["train"],
            eval_dataset=rows["validation"],
            data_collator=collator,
        )
    reset_peak_memory(runtime.loaded.device)
    begun = Clock()
    built.train()
    built.evaluate()
    elapsed, peak = begun.measure_elapsed(), read_peak_bytes(runtime.loaded.device)
    return Measured(
        *elapsed, runtime.evaluator.evaluate("validation").loss, peak
    )  # the same measure for every contender


def train_ours_padded(job: Job, dtype: str) -> Measured:
    """Train ours on padded batches of the same examples, to measure what joining them saves."""
    with patch.object(fast_paths, "FUSED_ATTENTION", None):
        return train_ours(job, dtype, 1)


def train_ours_plain_attention(job: Job) -> Measured:
    """Train ours in bfloat16 with attention also in bfloat16, to measure the difference."""
    with patch.object(fast_paths, "use_float32_attention", nullcontext):
        return train_ours(job, "bfloat16", 1)


def list_contenders(job: Job, with_trl: bool) -> dict[str, tuple[int, Callable[[], Measured]]]:
    """Return, by name, how many times a contender's seconds count for the job, and a function that runs it."""
    times = job.arms
    contenders: dict[str, tuple[int, Callable[[], Measured]]] = {
        "Trainer float32": (times, lambda: train_with_trainer(job, "float32", False)),
        "Trainer bfloat16 grouped": (times, lambda: train_with_trainer(job, "bfloat16", True)),
        "ours float32": (1, lambda: train_ours(job, "float32", 1)),
        "ours bfloat16": (1, lambda: train_ours(job, "bfloat16", 1)),
    }
    if job.arms == 1:
        by_hand = lambda: train_with_trainer(job, "bfloat16", True, small_adapters=True)  # noqa: E731
        contenders["Trainer bfloat16 grouped, adapters too"] = (1, by_hand)
        contenders["ours bfloat16, plain attention"] = (1, lambda: train_ours_plain_attention(job))
        contenders["ours float32, padded"] = (1, lambda: train_ours_padded(job, "float32"))
        contenders["ours bfloat16, padded"] = (1, lambda: train_ours_padded(job, "bfloat16"))
    if with_trl:
        contenders["SFTTrainer float32"] = (times, lambda: train_with_trainer(job, "float32", False, sft=True))
        contenders["SFTTrainer bfloat16 grouped"] = (times, lambda: train_with_trainer(job, "bfloat16", True, sft=True))
    if job.arms > 1:
        contenders["ours float32 pack of 8"] = (1, lambda: train_ours(job, "float32", job.arms))
        contenders["ours bfloat16 pack of 8"] = (1, lambda: train_ours(job, "bfloat16", job.arms))
    return contenders


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run all rounds, and store the results after each."""
    arms, layers = (1, None) if arguments.job == "one" else (8, TAIL_LAYERS)
    rounds: list[dict[str, dict[str, float]]] = []
    result: dict[str, Any] = {
        "job": arguments.job,
        "steps": arguments.steps,
        "arms": arms,
        "machine": describe_machine(),
    }
    for number in range(arguments.rounds):
        job = Job(
            arguments.model,
            arguments.data,
            arguments.work,
            arguments.steps,
            arguments.max_eval_examples,
            arguments.layers or layers,
            arms,
            number,
        )
        row: dict[str, dict[str, float]] = {}
        these = {
            name: contender
            for name, contender in list_contenders(job, arguments.trl).items()
            if name in (arguments.only or [name])
        }
        for name, (times, run) in list(these.items())[:: -1 if number % 2 else 1]:
            measured = run()
            row[name] = {
                "seconds": measured.seconds * times,
                "wall_seconds": measured.wall_seconds * times,
                "held_out": measured.held_out,
                "peak_bytes": measured.peak_bytes,
            }
            gc.collect()
            print(number, name, {key: round(value, 4) for key, value in row[name].items()}, flush=True)
        rounds.append({name: row[name] for name in these})
        result |= {"rounds": rounds, "speedup": compute_speedups(rounds)}
        if arguments.out:
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return result


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--job", choices=["one", "tail"], default="one")
    parser.add_argument(
        "--layers", type=lambda text: tuple(map(int, text.split(","))), help="other layers than the job's"
    )
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--max-eval-examples", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trl", action="store_true")
    parser.add_argument("--only", action="append", help="a contender, for each that is run; all by default")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path, default=Path("bench-work"))
    return parser.parse_args(words)


def main() -> None:
    warnings.simplefilter("ignore")
    result = measure(parse_arguments())
    print(json.dumps({key: value for key, value in result.items() if key != "rounds"}, indent=1))


def compute_speedups(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, Any]]:
    """Return, for each of ours against each of theirs, the ratio of every round and the median."""
    names = list(rounds[0])
    table: dict[str, dict[str, Any]] = {}
    for mine in (name for name in names if name.startswith("ours")):
        for theirs in (name for name in names if name != mine):
            ratios = [row[theirs]["seconds"] / row[mine]["seconds"] for row in rounds]
            table.setdefault(mine, {})[theirs] = {
                "median": round(statistics.median(ratios), 2),
                "all": [round(r, 2) for r in ratios],
            }
    return table


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
