"""Whether what the engine learns is what `Trainer` + PEFT learn: the same held-out loss from the same data.

    python -m benchmarks.engine.held_out MODEL DATA [--layers 28,29] [--steps 40] [--rank 16] [--seeds 0,1,2]
        [--out held_out.json]

Two questions. *Same batches*: given our order of items and our first A, does Trainer's loss agree step by step, and its
held-out loss at the end? *Own batches*: each with its own order and first draw, seed by seed: does the difference of
the mean held-out losses stay within what seeds make? Every held-out loss is the mean over labels of the same items,
from the same function. Trainer's `eval_loss` is a mean over batches of each batch's mean, another figure; it is stored.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from scipy.stats import t as student
from tests.helpers import fresh_adapter, trainable_parameters
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from benchmarks.engine.common import machine, make_runtime, one_pass, trainer_rows
from rightrank.schema.events import Listener
from rightrank.schema.trials import Arm, Trial, TrialFinished
from rightrank.train.loop import run_trial
from rightrank.train.runtime import Runtime
from rightrank.train.targets import lora_config
from rightrank.train.trial import TrialFolders

RATE = 1e-3


@dataclass(frozen=True)
class Learnt:
    losses: list[float]  # of each step, nats a label
    held_out: float  # nats a label
    eval_loss: float | None  # Trainer's own figure


class _GivenOrder(Trainer):
    """Trainer over the items in the order they have."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def train_ours(runtime: Runtime, arm: Arm, work: Path) -> Learnt:
    folders = TrialFolders(work / "ours.checkpoint", work / "ours")
    outcome = run_trial(runtime, Trial(trial_id="h", arm=arm), None, folders, Listener())
    assert isinstance(outcome, TrialFinished)
    return Learnt(outcome.train_losses, outcome.value, None)


def train_theirs(runtime: Runtime, arm: Arm, work: Path, same: bool) -> Learnt:
    """Trainer + PEFT; with `same`, on our batches from our first A."""
    torch.manual_seed(arm.seed)
    initial: dict[str, torch.Tensor] = {}
    if same:
        with fresh_adapter(runtime, arm) as ours:
            initial = {name: value.detach().clone() for name, value in trainable_parameters(ours).items()}
    model: Any = get_peft_model(runtime.model, lora_config(runtime.settings, arm, False, runtime.targets.names))
    with torch.no_grad():
        for name, value in initial.items():
            model.get_parameter(name).copy_(value)
    rows = trainer_rows(runtime, "train")
    if same:
        rows = [rows[index] for indices in runtime.batch_plan(arm.seed) for index in indices]
    built = (_GivenOrder if same else Trainer)(
        model=model,
        args=TrainingArguments(
            output_dir=str(work / "trainer"),
            per_device_train_batch_size=runtime.settings.batch_size,
            num_train_epochs=1,
            learning_rate=arm.learning_rate,
            warmup_steps=math.ceil(runtime.settings.warmup_ratio * arm.steps),
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            seed=arm.seed,
            logging_strategy="steps",
            logging_steps=1,
            log_level="error",
        ),
        train_dataset=rows,
        eval_dataset=trainer_rows(runtime, "selection"),
        data_collator=DataCollatorForSeq2Seq(runtime.loaded.tokenizer, label_pad_token_id=-100),
    )
    built.remove_callback(next(c for c in built.callback_handler.callbacks if type(c).__name__ == "PrinterCallback"))
    built.train()
    losses = [entry["loss"] for entry in built.state.log_history if "loss" in entry]
    eval_loss = built.evaluate()["eval_loss"]
    held_out = runtime.evaluate("selection").loss  # of the base with Trainer's adapter on it
    model.unload()
    runtime.model.requires_grad_(False)
    return Learnt(losses, held_out, eval_loss)


def fresh_benches(arguments: argparse.Namespace, work: Path) -> Iterator[tuple[int, Runtime]]:
    for seed in arguments.seeds:
        changes: dict[str, Any] = {"eval_items": arguments.eval_items, "seeds": (seed,), "cache_prefix": True}
        if arguments.layers:
            changes["layers_to_transform"] = arguments.layers
        runtime = make_runtime(arguments.model, arguments.data, arguments.steps, work / "cache", **changes)
        yield seed, one_pass(runtime, work / "cache")


def compare_same(ours: Learnt, theirs: Learnt) -> dict[str, float]:
    steps = [abs(a - b) / b for a, b in zip(ours.losses, theirs.losses, strict=True)]
    return {
        "first_step_relative": steps[0],
        "largest_step_relative": max(steps),
        "held_out_relative": abs(ours.held_out - theirs.held_out) / theirs.held_out,
    }


def compare_own(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """Welch's 95% interval of the difference of means, beside the spread that seeds make."""
    spread = [statistics.variance(values) for values in (ours, theirs)]
    parts = [spread[0] / len(ours), spread[1] / len(theirs)]
    error = math.sqrt(sum(parts))
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / (len(ours) - 1) + parts[1] ** 2 / (len(theirs) - 1))
    difference = statistics.mean(ours) - statistics.mean(theirs)
    half = float(student.ppf(0.975, freedom)) * error
    return {
        "difference": difference,
        "interval": [difference - half, difference + half],
        "seed_deviation": math.sqrt(statistics.mean(spread)),
        "within_seed_noise": abs(difference) <= half,
    }


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--layers", type=lambda text: tuple(map(int, text.split(","))), default=None)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--eval-items", type=int, default=96)
    parser.add_argument("--seeds", type=lambda text: tuple(map(int, text.split(","))), default=(0, 1, 2))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path, default=Path("bench-work"))
    return parser.parse_args(words)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All seeds; what is there so far is written after each."""
    ours: list[Learnt] = []
    theirs: list[Learnt] = []
    result: dict[str, Any] = {
        "machine": machine(),
        "layers": arguments.layers or "all",
        "steps": arguments.steps,
        "rank": arguments.rank,
        "eval_items": arguments.eval_items,
    }
    for seed, runtime in fresh_benches(arguments, arguments.work):
        arm = Arm(rank=arguments.rank, learning_rate=RATE, lora_alpha=32.0, seed=seed, steps=arguments.steps)
        if seed == arguments.seeds[0]:
            result["base"] = runtime.evaluate("selection").loss
        ours.append(train_ours(runtime, arm, arguments.work))
        if seed == arguments.seeds[0]:
            same = train_theirs(runtime, arm, arguments.work, same=True)
            result["same_batches"] = compare_same(ours[0], same)
            print(json.dumps(result["same_batches"]), flush=True)
        theirs.append(train_theirs(runtime, arm, arguments.work, same=False))
        result |= {
            "seeds": list(arguments.seeds[: len(ours)]),
            "ours": [learnt.held_out for learnt in ours],
            "trainer": [learnt.held_out for learnt in theirs],
            "trainer_eval_loss": [learnt.eval_loss for learnt in theirs],
        }
        if len(ours) > 1:
            result["own_batches"] = compare_own(result["ours"], result["trainer"])
        print(seed, ours[-1].held_out, theirs[-1].held_out, theirs[-1].eval_loss, flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return result


def main() -> None:
    warnings.simplefilter("ignore")
    print(json.dumps(measure(parse()), indent=1))


if __name__ == "__main__":
    main()
