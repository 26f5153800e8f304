"""Trained adapters truncated by every method to every rank, with and without recovery: losses minus the top's.

    python -m benchmarks.truncation.study NAME MODEL DATA --work FOLDER --out results.jsonl [--parts table,recovery]

NAME is one of `TASKS`, whose settings are those that trained the adapters in FOLDER. A line of the results is one adapter
on one split, with the loss of every example. What the results hold is not measured again: the same command resumes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tests.helpers import made_trainable

from benchmarks.selection.real_training import COMMON
from benchmarks.truncation.tops import Top, best_tops
from rightrank.adapters.resize import write_resized
from rightrank.data.splits import load_data
from rightrank.models.adapter_files import AdapterFolder, AdapterModule, open_adapter, save_adapter
from rightrank.models.base_models import load_base
from rightrank.models.truncation import DAMPING, Moments, components, ranks_within
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import SplitName
from rightrank.train.covariances import gather_moments
from rightrank.train.evaluation import Measured, Scores
from rightrank.train.optimizer import ArmOptimizer, learning_rate_schedule, take_step
from rightrank.train.runtime import Runtime, adapter_attached
from rightrank.train.tokens import encode

TOP = 64
RANKS = (32, 16, 8, 4, 2, 1)
SERVED = (1, 8, 16, 32, 64)  # ranks that vLLM reserves
TOKENS = 4096
SHARED = COMMON | {"seeds": (0, 1, 2), "max_steps": 400, "eval_items": 400, "eval_batch_size": 32}
CAUSAL = SHARED | {
    "layers_to_transform": (28, 29),
    "learning_rates": (1e-3, 3e-3),
    "dtype": "bfloat16",
    "seq_len": 32,
    "eval_items": 300,
}
ENCODER = SHARED | {"layers_to_transform": (4, 5), "learning_rates": (3e-4, 1e-3, 3e-3), "seq_len": 64}
FEW = {"test_fraction": 0.35, "validation_fraction": 0.35}
TASKS: dict[str, dict[str, object]] = {
    "senses": ENCODER,
    "movies": ENCODER,
    "newsgroups": ENCODER | {"metric": "accuracy"},
    "senses_few": ENCODER | FEW | {"learning_rates": (1e-4, 3e-4, 1e-3)},
    "glosses16": CAUSAL,
    "packages16": CAUSAL,
}
Weighting = Literal["none", "inputs", "both"]
METHODS: dict[str, tuple[Weighting, str]] = {
    "svd": ("none", "uniform"),
    "activation": ("inputs", "uniform"),
    "kfac": ("both", "uniform"),
    "para": ("none", "values"),  # singular values in one order, whatever a rank costs in a module
    "kfac_global": ("both", "global"),
    "svd_served": ("none", "served"),
    "kfac_served": ("both", "served"),
}
KEYS = ("method", "rank", "steps", "factor", "order", "tokens", "damping", "source")


@dataclass
class Study:
    """One top on its base; results go to the file at once."""

    name: str
    runtime: Runtime
    top: Top
    out: Path
    known: dict[tuple[object, ...], dict[str, Any]] = field(default_factory=dict)
    gathered: dict[tuple[int, str], dict[str, Moments]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for line in self.out.read_text().splitlines() if self.out.exists() else []:
            row = json.loads(line)
            if (row["task"], row["learning_rate"], row["seed"]) == self.identity:
                self.known[_key({name: row[name] for name in KEYS if name in row}, row["split"])] = row

    @property
    def identity(self) -> tuple[object, ...]:
        return self.name, self.top.trial.learning_rate, self.top.trial.seed

    @property
    def adapter(self) -> AdapterFolder:
        return open_adapter(self.top.adapter)

    def record(self, key: Mapping[str, object], split: SplitName, scores: Scores, **extra: object) -> None:
        row = dict(zip(("task", "learning_rate", "seed"), self.identity, strict=True)) | dict(key) | {"split": split}
        row |= {"loss": scores.loss} | extra
        if (correct := scores.fields(Measured())["item_correct"]) is not None:
            row["correct"] = correct
        print(json.dumps(row), flush=True)
        row |= {"losses": [round(loss, 4) for loss in scores.losses], "tokens_of": scores.tokens}
        with self.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.known[_key(key, split)] = row

    def has(self, key: Mapping[str, object], split: SplitName) -> bool:
        return _key(key, split) in self.known

    def examples(self, source: str) -> list[int]:
        """Training examples that the top was not trained on, in the order in which they would come; or those it was."""
        runtime, seed = self.runtime, self.top.trial.seed
        seen = [index for indices in runtime.batch_plan(seed) for index in indices]
        later = [index for indices in runtime.batch_plan(seed, 4 * runtime.steps) for index in indices]
        if source == "seen":
            return list(dict.fromkeys(reversed(seen)))
        unseen = [index for index in dict.fromkeys(later) if index not in set(seen)]
        return unseen or list(dict.fromkeys(reversed(seen)))  # few examples: all were trained on

    def moments(self, weighting: Weighting, tokens: int, source: str = "unseen") -> dict[str, Moments]:
        if weighting == "none":
            return {}
        if (tokens, source) not in self.gathered:
            begun = time.process_time()
            with adapter_attached(self.runtime, self.top.adapter) as peft_model:
                found = gather_moments(self.runtime, peft_model, self.examples(source), tokens)
            print(f"# {found.tokens} {source} tokens, {time.process_time() - begun:.1f} s", flush=True)
            self.gathered[tokens, source] = dict(found.moments)
        return self.gathered[tokens, source]

    def write(
        self, folder: Path, method: str, rank: int, moments: Mapping[str, Moments], damping: float
    ) -> dict[str, int]:
        """The truncated adapter, through the library's own writer; the rank of each module."""
        weighting, sharing = METHODS[method]
        adapter = self.adapter
        ranks = dict(ranks_of(adapter, sharing, weighting, rank, moments, damping))
        by_name = {module.name: module for module in adapter.modules}
        used = {name: weighed(adapter, by_name[name], one, weighting, damping) for name, one in moments.items()}
        write_resized(adapter, folder, ranks, used)
        return ranks


def _key(key: Mapping[str, object], split: str) -> tuple[object, ...]:
    return (*sorted(key.items()), split)


def ranks_of(
    adapter: AdapterFolder,
    sharing: str,
    weighting: Weighting,
    rank: int,
    moments: Mapping[str, Moments],
    damping: float = DAMPING,
) -> dict[str, int]:
    """A rank for each module, at most the parameters of the uniform `rank`."""
    names = [module.name for module in adapter.modules]
    if sharing == "uniform":
        return dict.fromkeys(names, rank)
    costs = [module.rows + module.columns for module in adapter.modules]
    found = {
        one.name: weighed(adapter, one, moments[one.name], weighting, damping) for one in adapter.modules if moments
    }
    worth = [components(*adapter.factors(one), one.scaling, found.get(one.name)).costs for one in adapter.modules]
    if sharing == "values":  # by σ alone: times the parameters that `ranks_within` divides it by
        worth = [np.sqrt(one) * cost for one, cost in zip(worth, costs, strict=True)]
    highest = next(served for served in SERVED if served >= rank) if sharing == "served" else TOP
    return dict(zip(names, ranks_within(worth, costs, rank * sum(costs), highest), strict=True))


def weighed(
    adapter: AdapterFolder, module: AdapterModule, moments: Moments, weighting: Weighting, damping: float
) -> Moments:
    """Moments that make the library's K-FAC the method asked for: the plain metric on a side, or another damping."""
    b, a = adapter.factors(module)
    plain_b, plain_a = module.scaling**2 * b.T @ b, a @ a.T
    inputs = moments.inputs + (damping - DAMPING) * plain_a * np.trace(moments.inputs) / np.trace(plain_a)
    if weighting == "inputs":
        return Moments(inputs, plain_b)
    share = (damping - DAMPING) * np.trace(moments.gradients) / np.trace(plain_b)
    return Moments(inputs, moments.gradients + share * plain_b)


def truncate(study: Study, methods: Sequence[str], ranks: Sequence[int], split: SplitName, **changes: Any) -> None:
    """Every method at every rank, no training."""
    for method in methods:
        for rank in ranks:
            weighting = METHODS[method][0]
            tokens = 0 if weighting == "none" else changes.get("tokens", TOKENS)
            key = {"method": method, "rank": rank, **changes, "tokens": tokens}
            if study.has(key, split):
                continue
            moments = study.moments(weighting, tokens, changes.get("source", "unseen"))
            with tempfile.TemporaryDirectory() as name:
                chosen = study.write(Path(name) / "t", method, rank, moments, changes.get("damping", DAMPING))
                with adapter_attached(study.runtime, Path(name) / "t"):
                    scores = study.runtime.evaluate(split)
            study.record(
                key,
                split,
                scores,
                parameters=parameters(study.adapter, chosen),
                max_module_rank=max(chosen.values()),
            )


def parameters(adapter: AdapterFolder, ranks: Mapping[str, int]) -> int:
    return sum(ranks[module.name] * (module.rows + module.columns) for module in adapter.modules)


def recover(study: Study, plan: Sequence[tuple[str, int, float, float]], split: SplitName) -> None:
    """`(method, rank, share of the steps, factor on the learning rate)`; method "top" trains the top itself further."""
    for method, rank, share, factor in plan:
        steps = round(share * study.runtime.steps)
        key = {"method": method, "rank": rank, "steps": steps, "factor": factor}
        if study.has(key, split):
            continue
        begun = time.process_time()
        with tempfile.TemporaryDirectory() as name:
            folder = study.top.adapter
            if method != "top":
                folder = Path(name) / "t"
                study.write(folder, method, rank, study.moments(METHODS[method][0], TOKENS), DAMPING)
            with adapter_attached(study.runtime, folder) as peft_model:
                train_further(study, peft_model, steps, study.top.trial.learning_rate * factor)
                scores = study.runtime.evaluate(split)
        study.record(key, split, scores, seconds=round(time.process_time() - begun, 1))


def truncate_further_trained(study: Study, split: SplitName) -> None:
    """The other order: the extra steps go to the top, which is then truncated."""
    steps = round(0.2 * study.runtime.steps)
    methods = (("kfac", 16), ("kfac", 8), ("kfac", 4), ("kfac_served", 4), ("kfac_served", 2))
    keys = [
        {"method": method, "rank": rank, "steps": steps, "factor": 0.1, "order": "after"} for method, rank in methods
    ]
    missing = [key for key in keys if not study.has(key, split)]
    if not missing:
        return
    with tempfile.TemporaryDirectory() as name:
        with adapter_attached(study.runtime, study.top.adapter) as peft_model:
            train_further(study, peft_model, steps, study.top.trial.learning_rate * 0.1)
            save_adapter(peft_model, Path(name) / "top", str(study.runtime.loaded.name))
        later = replace(study, top=Top(study.top.trial, Path(name) / "top"), gathered={})
        for number, key in enumerate(missing):
            folder = Path(name) / str(number)
            method, rank = str(key["method"]), int(str(key["rank"]))
            later.write(folder, method, rank, later.moments(METHODS[method][0], TOKENS), DAMPING)
            with adapter_attached(study.runtime, folder):
                study.record(key, split, study.runtime.evaluate(split))


def train_further(study: Study, peft_model: Any, steps: int, learning_rate: float) -> None:
    """New optimizer state and the settings' schedule over `steps`, on the batches that follow the training's."""
    runtime = study.runtime
    plan = runtime.batch_plan(study.top.trial.seed, runtime.steps + steps)[runtime.steps :]
    schedule = learning_rate_schedule(runtime.settings, steps)
    optimizer = ArmOptimizer(runtime, made_trainable(peft_model), learning_rate, plan, schedule)
    for _ in range(steps):
        take_step(
            [optimizer],
            lambda batches, _: [
                runtime.losses("train", batches[0], 1 / optimizer.labels, backward=True).example_losses
            ],
        )


def run(study: Study, parts: Sequence[str]) -> Iterator[str]:
    """The test split is read for the table and the recovered adapters; what is chosen inside a method, for validation."""
    if not study.has({"method": "top", "rank": TOP}, "test"):
        with adapter_attached(study.runtime, study.top.adapter):
            study.record({"method": "top", "rank": TOP}, "test", study.runtime.evaluate("test"))
    if "table" in parts:
        truncate(study, ["svd", "kfac"], RANKS, "test")
        truncate(study, ["activation", "para"], [16, 4], "test")
        truncate(study, ["kfac_global"], [16, 8, 4, 2], "test")
        truncate(study, ["kfac_served", "svd_served"], [4, 2], "test")
        yield "table"
    if "recovery" in parts:
        recover(study, [("top", TOP, 0.2, 0.1), *(("kfac", rank, 0.2, 0.1) for rank in (4, 8, 16, 2, 1))], "test")
        recover(study, [("svd", 4, 0.2, 0.1), ("kfac_served", 4, 0.2, 0.1), ("kfac_served", 2, 0.2, 0.1)], "test")
        recover(study, [(m, r, share, 0.1) for share in (0.1, 0.05) for m, r in (("kfac", 4), ("top", TOP))], "test")
        yield "recovery"
    if "after" in parts:
        truncate_further_trained(study, "test")
        yield "after"
    if "factors" in parts:
        pairs = [("top", TOP), ("kfac", 16), ("kfac", 4)]
        recover(study, [(m, r, 0.2, factor) for factor in (0.1, 0.3, 0.03) for m, r in pairs], "selection")
        yield "factors"
    if "variants" in parts:
        for tokens in (16384, TOKENS, 1024, 256):
            truncate(study, ["kfac"], [16, 4], "selection", tokens=tokens)
        for damping in (1.0, 0.1, 0.001):
            truncate(study, ["kfac"], [16, 4], "selection", damping=damping)
        truncate(study, ["kfac"], [16, 4], "selection", source="seen")
        yield "variants"


def open_runtime(model: str, data: Path, settings: SelectSettings, cache: Path) -> Runtime:
    assert settings.max_steps is not None
    splits = load_data(data, settings)
    loaded = load_base(model, settings, splits.summary.classes)
    return Runtime(loaded, encode(splits, loaded, settings), settings, settings.max_steps, cache)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=TASKS)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", default="table,recovery,after,factors,variants")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as cache:
        runtime = open_runtime(options.model, options.data, SelectSettings(**TASKS[options.name]), Path(cache))
        for top in best_tops(options.work, TOP):
            for part in run(Study(options.name, runtime, top, options.out), options.parts.split(",")):
                print(f"# {options.name} seed {top.trial.seed}: {part} done", flush=True)


if __name__ == "__main__":
    main()
