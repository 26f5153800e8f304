"""Train the grids of `grids.py`: every learning rate at ranks 64 and 16 in shared passes over the last blocks of a base.

    python -m benchmarks.early_rates.train BASES DATA WORK OUT design       # or judged, or names of grids

WORK keeps hidden states and adapters; OUT gets one file for each grid as soon as it is complete, and the same command continues where it
stopped. It prints times and whether values are finite, and no value. `OUT/GRID.npz` holds:

    records      JSON: for each row of `validation` its kind, rank, learning rate, and the share of the steps that it has seen
    validation   [records, examples] summed losses in thousandths (uint16; 65535 where a training diverged)
    test         the same for the records with `"test": true`, in their order
    weights_*    label tokens of the examples; groups_*: groups of the examples

Kinds: `base` (a zero update), `head` (the trained classifier with a zero update), `current` and `mean` (of the factors since the warm-up), `mean 5%`, `mean 10%`
and `mean 25%` (of the last steps taken); on the design grids also `annealed` (a copy whose learning rate falls to zero in 5% of the steps),
`short` (a whole training of so many steps) and `mean product` (of B·A at eight steps since the warm-up).
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from benchmarks.early_rates.grids import ALL, BASELINE, BEYOND, DESIGN, JUDGED, RATES, TOP, Grid
from benchmarks.learning_rate.bases import load_base
from benchmarks.learning_rate.train_grids import (
    ALPHA,
    MAX_NORM,
    WARMUP,
    Bank,
    ScaledBank,
    Task,
    compute_losses,
    evaluate,
    first_adapter,
    plan_batches,
    prepare_task,
)

SEED = 0
POINTS = (0.125, 0.25, 0.5, 0.75, 1.0)
EARLY = (0.125, 0.25)
WINDOWS = (0.05, 0.1, 0.25)
ANNEALED = 0.05  # share of the steps in which an annealed copy's learning rate falls to zero
SNAPSHOTS = 8

Adapter = dict[str, torch.Tensor]


@dataclass
class Training:
    """The state of trainings that share passes: factors, Adam's moments, and sums of the factors since the warm-up."""

    task: Task
    cells: Sequence[tuple[int, float]]
    steps: int
    bank: Bank
    states: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    step: int = 0
    sums: list[torch.Tensor] = field(default_factory=list)
    sums_at: dict[int, list[torch.Tensor]] = field(default_factory=dict)

    @classmethod
    def start(cls, task: Task, cells: Sequence[tuple[int, float]], steps: int) -> Training:
        bank = Bank([first_adapter(task, rank, SEED) for rank, _ in cells], trainable=True)
        training = cls(task, cells, steps, bank)
        training.states = [(torch.zeros_like(tensor), torch.zeros_like(tensor)) for _, _, tensor in training.parameters]
        training.sums = [torch.zeros_like(tensor) for _, _, tensor in training.parameters]
        training.sums_at = {0: [torch.zeros_like(total) for total in training.sums]}
        return training

    @property
    def parameters(self) -> list[tuple[int, int, torch.Tensor]]:
        groups = zip(self.bank.groups, self.bank.tensors, strict=True)
        return [(start, end, tensor) for (start, end), group in groups for tensor in group.values()]

    @property
    def warmup(self) -> int:
        return math.ceil(WARMUP * self.steps)

    @property
    def scales(self) -> list[float]:
        return [ALPHA / rank for rank, _ in self.cells]

    def copy(self) -> Training:
        """Copy the factors and Adam's moments; the sums stay behind."""
        adapters = self.bank.unstack()
        states = [(first.clone(), second.clone()) for first, second in self.states]
        return Training(self.task, self.cells, self.steps, Bank(adapters, trainable=True), states, self.step)

    def take_step(self, indices: Sequence[int], factor: float) -> None:
        """Update every adapter with AdamW at its learning rate times `factor`, and add its factors to the sums."""
        losses, _ = compute_losses(self.task, ScaledBank(self.bank, self.scales), indices)
        (losses.sum(1) / self.task.weights(indices).sum()).sum().backward()
        rates = torch.tensor([rate for _, rate in self.cells])
        squares = torch.zeros(len(self.cells))
        for start, end, tensor in self.parameters:
            assert tensor.grad is not None
            squares[start:end] += tensor.grad.square().flatten(1).sum(1)
        clips = (MAX_NORM / (squares.sqrt() + 1e-6)).clamp(max=1.0)
        with torch.no_grad():
            for (start, end, tensor), (first, second) in zip(self.parameters, self.states, strict=True):
                shape = (-1, *[1] * (tensor.dim() - 1))
                gradient = tensor.grad * clips[start:end].view(shape)
                first.lerp_(gradient, 0.1)
                second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
                denominator = (second / (1 - 0.999 ** (self.step + 1))).sqrt_().add_(1e-8)
                rate = (rates[start:end] * factor / (1 - 0.9 ** (self.step + 1))).view(shape)
                tensor.sub_(rate * first / denominator)
                tensor.grad = None
            self.step += 1
            if self.sums and self.step > self.warmup:
                for total, (_, _, tensor) in zip(self.sums, self.parameters, strict=True):
                    total.add_(tensor)

    def remember_sums(self) -> None:
        self.sums_at[self.step] = [total.clone() for total in self.sums]

    def read_adapters(self) -> list[Adapter]:
        """Return each adapter, with its scale in B."""
        return ScaledBank(self.bank, self.scales).unstack()

    def read_means(self, begin: int = 0) -> list[Adapter]:
        """Return the mean of each adapter's factors after step `begin`, or since the warm-up if that is later."""
        count = self.step - max(begin, self.warmup)
        means = [(total - earlier) / count for total, earlier in zip(self.sums, self.sums_at[begin], strict=True)]
        current = [tensor.detach().clone() for _, _, tensor in self.parameters]
        with torch.no_grad():
            for (_, _, tensor), mean in zip(self.parameters, means, strict=True):
                tensor.copy_(mean)
            adapters = self.read_adapters()
            for (_, _, tensor), value in zip(self.parameters, current, strict=True):
                tensor.copy_(value)
        return adapters


def schedule(step: int, steps: int) -> float:
    """Return the learning rate's factor: 5% warm-up and linear decay to zero."""
    warmup = math.ceil(WARMUP * steps)
    return step / warmup if step < warmup else (steps - step) / (steps - warmup)


def anneal(training: Training, batches: Sequence[Sequence[int]]) -> list[Adapter]:
    """Train copies while the learning rate falls to zero."""
    copies, factor = training.copy(), schedule(training.step, training.steps)
    for number, indices in enumerate(batches):
        copies.take_step(indices, factor * (1 - (number + 1) / len(batches)))
    return copies.read_adapters()


def train_short(task: Task, cells: Sequence[tuple[int, float]], steps: int) -> list[Adapter]:
    training = Training.start(task, cells, steps)
    for step, indices in enumerate(plan_batches(task, SEED, steps)):
        training.take_step(indices, schedule(step, steps))
    return training.read_adapters()


def concatenate(snapshots: Sequence[Sequence[Adapter]]) -> list[Adapter]:
    """Return the exact mean of the updates of several steps as one product."""
    means = []
    for versions in zip(*snapshots, strict=True):
        mean: Adapter = {}
        for key in versions[0]:
            tensors = [version[key] for version in versions]
            if key.endswith(".A"):
                mean[key] = torch.cat(tensors, 0)
            elif key.endswith(".B"):
                mean[key] = torch.cat(tensors, 1) / len(tensors)
            else:
                mean[key] = torch.stack(tensors).mean(0)
        means.append(mean)
    return means


class Results:
    """The records of a grid, their losses and their adapters."""

    def __init__(self, task: Task, folder: Path) -> None:
        self.task, self.folder = task, folder
        self.records: list[dict[str, Any]] = []
        self.validation: list[np.ndarray[Any, Any]] = []
        self.test: list[np.ndarray[Any, Any]] = []

    def add(self, kind: str, fraction: float, cells: Sequence[tuple[int, float]], adapters: Sequence[Mapping[str, torch.Tensor]],
            has_test: bool = False, is_stored: bool = True) -> None:  # fmt: skip
        records = [{"kind": kind, "rank": rank, "rate": rate, "fraction": fraction, "test": has_test} for rank, rate in cells]  # fmt: skip
        self.records += records
        self.validation.append(evaluate(self.task, adapters, "validation")[0])
        if has_test:
            self.test.append(evaluate(self.task, adapters, "test")[0])
        for record, adapter in zip(records, adapters, strict=True):
            if is_stored:
                save_file({key: value.contiguous() for key, value in adapter.items()}, self.folder / name_adapter(record))  # fmt: skip

    def save(self, path: Path) -> None:
        task = self.task
        arrays: dict[str, Any] = {
            "records": np.array(json.dumps(self.records)),
            "validation": np.concatenate(self.validation),
            "test": np.concatenate(self.test),
        }
        for split in ("validation", "test"):
            groups = [task.examples[index].group for index in task.splits[split]]
            arrays[f"weights_{split}"] = task.weights(task.splits[split]).numpy().astype(np.uint8)
            arrays[f"groups_{split}"] = np.unique(groups, return_inverse=True)[1].astype(np.uint16)
        temporary = path.with_suffix(".part.npz")
        np.savez_compressed(temporary, **arrays)
        temporary.rename(path)


def name_adapter(record: Mapping[str, Any]) -> str:
    return f"{record['kind']}_{record['rank']}_{record['rate']:g}_{record['fraction']:g}.safetensors".replace(" ", "_")


def clear_update(adapter: Mapping[str, torch.Tensor]) -> Adapter:
    """Return the adapter with a zero update, and its classifier as it is."""
    return {key: torch.zeros_like(value) if key.endswith(".B") else value for key, value in adapter.items()}


def list_needed_steps(grid: Grid) -> set[int]:
    """Return the steps whose sums are needed for means of a window."""
    return {count_steps(grid, point) - max(1, round(window * count_steps(grid, point))) for point in EARLY for window in WINDOWS}  # fmt: skip


def count_steps(grid: Grid, fraction: float) -> int:
    return round(fraction * grid.steps)


def run_grid(grid: Grid, task: Task, work: Path, out: Path) -> None:
    """Train and evaluate everything that `README.md` lists for the grid, and store it."""
    begun = time.perf_counter()
    is_design = grid in DESIGN
    folder = work / grid.name
    folder.mkdir(exist_ok=True)
    results = Results(task, folder)
    results.add("base", 0.0, [(0, 0.0)], [clear_update(first_adapter(task, 1, SEED))], has_test=True)
    rates = (*RATES, BEYOND) if is_design else RATES
    cells = [(rank, rate) for rank in (BASELINE, TOP) for rate in rates]
    tops = slice(len(rates), None)
    training = Training.start(task, cells, grid.steps)
    plan = plan_batches(task, SEED, grid.steps)
    points = {count_steps(grid, point): point for point in POINTS}
    needed = list_needed_steps(grid)
    quarter = count_steps(grid, 0.25)
    snapshot_steps = {round(step) for step in np.linspace(training.warmup + 1, quarter, SNAPSHOTS)}
    snapshots: list[list[Adapter]] = []
    is_finite = True
    for step, indices in enumerate(plan):
        training.take_step(indices, schedule(step, grid.steps))
        if training.step in needed:
            training.remember_sums()
        if is_design and training.step in snapshot_steps:
            snapshots.append(training.read_adapters()[tops])
        if training.step not in points:
            continue
        point = points[training.step]
        adapters = training.read_adapters()
        is_finite &= all(bool(torch.isfinite(value).all()) for adapter in adapters for value in adapter.values())
        results.add("current", point, cells, adapters, has_test=point == 1 or (is_design and point >= 0.25))
        results.add("mean", point, cells, training.read_means(), has_test=is_design and point >= 0.25)
        if point in EARLY:
            for window in WINDOWS:
                begin = training.step - max(1, round(window * training.step))
                results.add(f"mean {window:.0%}", point, cells[tops], training.read_means(begin)[tops], is_stored=False)
        if is_design and point in EARLY:
            count = max(2, round(ANNEALED * grid.steps))
            annealed = anneal(training, plan[training.step : training.step + count])
            results.add("annealed", point, cells[tops], annealed[tops], is_stored=False)
            results.add("short", point, cells, train_short(task, cells, training.step), is_stored=False)
        if is_design and training.step == quarter:
            results.add("mean product", point, cells[tops], concatenate(snapshots), is_stored=False)
    if task.classes:
        results.add("head", 1.0, cells, [clear_update(adapter) for adapter in training.read_adapters()], has_test=True)
    results.save(out / f"{grid.name}.npz")
    print(f"  stored after {time.perf_counter() - begun:.0f} s, finite {is_finite}", flush=True)


def load_grid(grid: Grid, bases: Path, data: Path, work: Path) -> Task:
    base = replace(load_base(bases, grid.base, grid.blocks), is_prefix_half=True)
    name = grid.name.removesuffix("-few").removesuffix("-2")
    return prepare_task(base, data / f"{name}.jsonl", work / f"{grid.name}_hidden.safetensors", grid.counts, *grid.lengths)  # fmt: skip


def load_adapters(folder: Path, records: Sequence[Mapping[str, Any]]) -> Iterator[Adapter]:
    """Yield the stored adapters of records."""
    for record in records:
        yield load_file(folder / name_adapter(record))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("bases", "data", "work", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("grids", nargs="+", metavar="GRID")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Mismatch dtype")
    options.work.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    groups = {"design": DESIGN, "judged": JUDGED}
    for grid in [grid for name in options.grids for grid in groups.get(name) or (ALL[name],)]:
        if (options.out / f"{grid.name}.npz").exists():
            continue
        begun = time.perf_counter()
        # As with `bf16=True` in Trainer: products in bfloat16, factors, Adam's moments and losses in float32.
        task = load_grid(grid, options.bases, options.data, options.work)
        sizes = {split: len(indices) for split, indices in task.splits.items()}
        print(f"{time.strftime('%H:%M:%S')} {grid.name}: {sizes}, head {tuple(task.head.shape)}, prepared in {time.perf_counter() - begun:.0f} s", flush=True)  # fmt: skip
        with torch.autocast("cpu", torch.bfloat16):
            run_grid(grid, task, options.work, options.out)


if __name__ == "__main__":
    main()
