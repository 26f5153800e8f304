"""Train at rank 64 and cut to 16, 4 or 1 inside the training: when, how, and is it as good as training at that rank?

    python -m benchmarks.squeeze.study --data FOLDER --bases FOLDER --work FOLDER --out benchmarks/squeeze/results

Three tasks choose a way of cutting to each rank among `VARIANTS`; the others are trained afterwards with it alone and judge it once.
Every task has two or three seeds, and for each: direct trainings at ranks 1, 4 and 16 and learning rates `RATES`, the top at the same rates,
the top at its best rate cut inside the training and at its end. Stored results also have the cut at the end
with recovery (`recovered`: a tenth of the steps more, on unseen examples), which the engine no longer offers. The best rate of a rank is that of the mean
over seeds on `CHOOSING` validation examples; the others (2,000 where there are so many) are what is reported, and their losses stand in
an `.npz` beside the task's JSON file, in thousandths ([rows, examples], int16). All arms of a stage share passes over the base. FOLDER keeps finished
trainings, and the same command resumes. `choice.json` is written when the first half is whole, before the second begins.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.machine import machine
from benchmarks.selection.long_grids import run_all
from benchmarks.selection.real_training import Workshop, open_workshop
from benchmarks.selection.wide_grids import speed_up
from benchmarks.squeeze.table import Row, best_rates, choose
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import Arm, Cut, TrialFinished, trial_id
from rightrank.search.history import base_arm

TOP, RANKS, SEEDS = 64, (1, 4, 16), (0, 1, 2)
CHOOSING = 500  # of the validation examples

COMMON: dict[str, Any] = {"ranks": (*RANKS, TOP), "seeds": SEEDS, "eval_points": 1, "device": "cpu", "eval_batch_size": 64, "max_steps": 300,
                          "seq_len": 24, "adapters_per_pass": 12, "test_fraction": 0.01, "eval_items": 2500}  # fmt: skip
OF_12000, OF_8000 = {"validation_fraction": 0.21}, {"validation_fraction": 0.315}
HIGH, LOW = (1e-3, 3e-3, 1e-2), (3e-4, 1e-3, 3e-3)
L3, L6 = {"layers_to_transform": (2,)} | OF_12000, {"layers_to_transform": (5,)} | OF_12000
SMOLLM2 = {"layers_to_transform": (29,), "max_steps": 200} | OF_8000


@dataclass(frozen=True)
class Task:
    base: str
    rates: tuple[float, ...]
    settings: Mapping[str, Any]
    data: str = ""  # where it is not the task's name
    seeds: tuple[int, ...] = SEEDS


CHOOSE = {
    "sections": Task("minilm-l3", HIGH, L3),
    "origins": Task("minilm-l6", HIGH, L6, seeds=(0, 1)),
    "speakers": Task("minilm-l3", LOW, L3, seeds=(0, 1)),
}
JUDGE = {
    "syllables": Task("minilm-l3", HIGH, L3),
    "verbs": Task("minilm-l6", HIGH, L6),
    "unions": Task("minilm-l6", HIGH, L6),
    "answers": Task("SmolLM2-135M-Instruct.Q4_1.gguf", HIGH, SMOLLM2),
    "answer_pairs": Task("SmolLM2-135M-Instruct.Q4_1.gguf", LOW, SMOLLM2, "answers"),
}
TASKS = CHOOSE | JUDGE


@dataclass(frozen=True)
class Variant:
    """A way of cutting. `at`: the part of the steps of the cut to each rank of `RANKS`; in one go, or from the next higher one."""

    at: tuple[float, float, float]
    by: Literal["kfac", "svd"] = "kfac"
    optimizer: Literal["projected", "fresh"] = "projected"
    warms: bool = False
    staged: bool = False
    ranks: tuple[int, ...] = RANKS

    @property
    def places(self) -> dict[int, float]:
        """By rank, where it is cut to it, from the highest rank down."""
        return {rank: part for rank, part in reversed(list(zip(RANKS, self.at, strict=True))) if rank in self.ranks}


def at(part: float, **how: Any) -> Variant:
    return Variant((part, part, part), **how)


WARMUP = 0.05  # of the steps
VARIANTS = {
    "quarter": at(0.25),
    "half": at(0.5),
    "three_quarters": at(0.75),
    "seven_eighths": at(0.875),
    "half_svd": at(0.5, by="svd"),
    "half_fresh": at(0.5, optimizer="fresh"),
    "half_svd_fresh": at(0.5, by="svd", optimizer="fresh"),
    "half_warm": at(0.5, warms=True),
    "half_fresh_warm": at(0.5, optimizer="fresh", warms=True),
    "three_quarters_fresh": at(0.75, optimizer="fresh"),
    "seven_eighths_fresh": at(0.875, optimizer="fresh"),
    "stages": Variant((0.75, 0.5, 0.25), staged=True),
}
DROPPED = (
    "quarter",
    "half_svd",
    "half_warm",
    "stages",
)  # after the first task, on which each loses to another at every rank


class Study:
    """One task: its trainings and rows."""

    def __init__(self, name: str, shop: Workshop) -> None:
        self.name, self.shop = name, shop
        self.rates, self.seeds = TASKS[name].rates, TASKS[name].seeds
        self.steps = shop.settings.max_steps or 0
        self.rows: list[tuple[Row, TrialFinished]] = []

    def arm(self, rank: int, rate: float, seed: int, **changes: Any) -> Arm:
        fields = {"rank": rank, "learning_rate": rate, "lora_alpha": self.shop.settings.lora_alpha, "seed": seed}
        return Arm(**fields | {"steps": self.steps} | changes)

    def identity(self, arm: Arm) -> str:
        return trial_id(self.shop.fingerprint, arm)

    def run(self, kinds: Sequence[tuple[str, Arm]]) -> None:
        """Train the arms in shared passes; those of a kind become rows, the others are parts of trainings."""
        run_all(self.shop, [arm for _, arm in kinds])
        for kind, arm in kinds:
            outcome = self.shop.outcomes.get(arm)
            if kind and isinstance(outcome, TrialFinished):
                self.rows.append((self.row(kind, outcome), outcome))

    def row(self, kind: str, outcome: TrialFinished) -> Row:
        losses, weights = np.array(outcome.item_losses), np.array(outcome.item_tokens)
        chosen, reported = slice(0, CHOOSING), slice(CHOOSING, None)
        return Row(
            kind=kind,
            rank=outcome.rank,
            learning_rate=outcome.learning_rate,
            seed=outcome.seed,
            choosing=round(float(losses[chosen].sum() / weights[chosen].sum()), 5),
            loss=round(float(losses[reported].sum() / weights[reported].sum()), 5),
            seconds=round(outcome.train_seconds, 2),
            parameters=outcome.trainable_parameters,
        )

    def train_at_one_rank(self) -> None:
        """Seed by seed, at every rate."""
        base = self.shop.run(base_arm(self.shop.settings.lora_alpha))
        assert isinstance(base, TrialFinished)
        self.rows.append((self.row("base", base), base))
        for seed in self.seeds:
            whole = [("direct", self.arm(rank, rate, seed)) for rate in self.rates for rank in RANKS]
            self.run([*whole, *(("top", self.arm(TOP, rate, seed)) for rate in self.rates)])

    def cut(self, variants: Mapping[str, Variant]) -> None:
        """Seed by seed, at the best rate of the top."""
        rate = best_rates([row for row, _ in self.rows])[TOP]
        for seed in self.seeds:
            top = self.arm(TOP, rate, seed)
            self.run([kind for part in self.parts(top, variants) for kind in part])
            self.run(self.ends(top))

    def parts(self, top: Arm, variants: Mapping[str, Variant]) -> list[list[tuple[str, Arm]]]:
        """The top in parts up to its last cut, and all its branches."""
        cuts = [list(one.places.values())[: 1 if one.staged else None] for one in variants.values()]
        places = sorted({part for places in cuts for part in places})
        chain: list[Arm] = []
        for part in places:
            before = {"continue_from": self.identity(chain[-1])} if chain else {}
            chain.append(self.arm(TOP, top.learning_rate, top.seed, stop_at=round(part * self.steps), **before))
        tops = dict(zip(places, chain, strict=True))
        branches = [self.branches(name, variant, tops) for name, variant in variants.items()]
        return [[("", arm) for arm in chain], *branches]

    def branches(self, name: str, variant: Variant, tops: Mapping[float, Arm]) -> list[tuple[str, Arm]]:
        found: list[tuple[str, Arm]] = []
        warmup = round(WARMUP * self.steps) if variant.warms else 0
        parent: Arm | None = None
        for rank, part in variant.places.items():
            parent = parent if parent is not None and variant.staged else tops[part]
            cut = Cut(
                step=round(part * self.steps),
                rank=parent.rank,
                by=variant.by,
                optimizer=variant.optimizer,
                warmup=warmup,
            )
            fields = {"continue_from": self.identity(parent), "cut": cut}
            whole = self.arm(rank, parent.learning_rate, parent.seed, **fields)
            lower = [later for other, later in variant.places.items() if other < rank]
            if variant.staged and lower:  # the next stage leaves from here
                parent = whole.model_copy(update={"stop_at": round(min(lower) * self.steps)})
                found.append(("", parent))
                whole = whole.model_copy(update={"continue_from": self.identity(parent)})
            found.append((name, whole))
        return found

    def ends(self, top: Arm) -> list[tuple[str, Arm]]:
        """The whole top cut at its end."""
        fields = {"truncate_from": self.identity(top), "steps": 0}
        return [("end", self.arm(rank, top.learning_rate, top.seed, **fields)) for rank in RANKS]

    def store(self, out: Path, seconds: float) -> None:
        out.mkdir(parents=True, exist_ok=True)
        losses = np.array([outcome.item_losses[CHOOSING:] for _, outcome in self.rows])
        tokens = np.array(self.rows[0][1].item_tokens[CHOOSING:])
        np.savez_compressed(
            out / f"{self.name}.npz", losses=np.round(losses * 1000).astype(np.int16), tokens=tokens.astype(np.int16)
        )
        found = {
            "task": self.name,
            "base": TASKS[self.name].base,
            "steps": self.steps,
            "examples": len(tokens),
            "seconds": round(seconds, 1),
            "machine": machine(),
            "rows": [row._asdict() for row, _ in self.rows],
        }
        (out / f"{self.name}.json").write_text(json.dumps(found, indent=1) + "\n")


def pairs_file(source: Path, target: Path) -> Path:
    """Preference pairs of questions and answers: the answer is chosen, and one of another kind is rejected."""
    if not target.exists():
        rows = [json.loads(line) for line in source.read_text().splitlines()]
        drawn = np.random.default_rng(0).permutation(len(rows))
        pairs = [
            {"prompt": row["prompt"], "chosen": row["completion"], "rejected": rows[other]["completion"]}
            for row, other in zip(rows, drawn, strict=True)
            if row["completion"] != rows[other]["completion"]
        ]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return target


def train_task(name: str, variants: Mapping[str, Variant], options: argparse.Namespace) -> None:
    """Train and store a task; where there are no variants, its trainings at one rank alone."""
    if (options.out / f"{name}.json").exists():
        return
    begun, task = time.process_time(), TASKS[name]
    data = options.data / f"{task.data or name}.jsonl"
    if task.data:
        data = pairs_file(data, options.work / f"{name}.jsonl")
    settings = SelectSettings(**COMMON | {"learning_rates": task.rates} | dict(task.settings) | options.changes)
    shop = open_workshop(str(options.bases / task.base), data, settings, options.work / name)
    speed_up(shop)
    study = Study(name, shop)
    study.train_at_one_rank()
    if not variants:
        return
    study.cut(variants)
    study.store(options.out, time.process_time() - begun)
    print(f"{name}: {time.process_time() - begun:.0f} processor seconds", flush=True)


def read_rows(out: Path, name: str) -> list[Row]:
    return [Row(**row) for row in json.loads((out / f"{name}.json").read_text())["rows"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--bases", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder of finished trainings")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--steps", type=int, help="of a training, to try the command")
    parser.add_argument("--early", help="a task of the second half, whose trainings at one rank need no choice")
    options = parser.parse_args()
    options.changes = {} if options.steps is None else {"max_steps": options.steps, "eval_items": 600}
    torch.set_num_threads(1)
    if options.early:
        train_task(options.early, {}, options)
        return
    for number, name in enumerate(CHOOSE):
        raced = {key: variant for key, variant in VARIANTS.items() if number == 0 or key not in DROPPED}
        train_task(name, raced, options)
    choice = options.out / "choice.json"
    if not choice.exists():
        raced = tuple(key for key in VARIANTS if key not in DROPPED)
        scores = choose({name: read_rows(options.out, name) for name in CHOOSE}, raced)
        chosen = {rank: min(of, key=of.__getitem__) for rank, of in scores.items()}
        choice.write_text(json.dumps({"chosen": chosen, "scores": scores}, indent=1) + "\n")
    chosen = {int(rank): key for rank, key in json.loads(choice.read_text())["chosen"].items()}
    variants = {
        key: replace(VARIANTS[key], ranks=tuple(rank for rank in RANKS if chosen[rank] == key))
        for key in dict.fromkeys(chosen.values())
    }
    for name in JUDGE:
        train_task(name, variants, options)


if __name__ == "__main__":
    main()
