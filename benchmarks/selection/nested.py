"""One training whose prefixes are adapters of every rank (MatryoshkaLoRA, arXiv 2605.07850), against one training for each rank.

    python -m benchmarks.selection.nested planted --out benchmarks/selection/nested.json
    python -m benchmarks.selection.nested TASK MODEL DATA --work FOLDER --out benchmarks/selection/nested.json

A fixed diagonal P stands between B and A of the top rank: ΔW = B·P·A. The prefix of rank r is the first r columns of B and rows of A, times
the scale s_r of that rank, and P makes ΔW the mean of all prefixes, in one forward pass. After the training a prefix
is read at its scale s_r (`own`, as in the paper) or under P (`kept`). Scales:

    alpha/r     s_r = alpha / r, as each rank has it when it trains alone
    constant    s_r = alpha / top, the same for all ranks

The separate trainings have the same data, batches, first draws, steps and seeds (of the planted teachers they are stored), so every nested value is
compared with the separate one of its seed. Both take their best learning rate over the seeds. The guard is the top: where a nested training
is worse there than a plain one by more than the margin, nesting is no replacement. `--table` prints what is stored.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isclose
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.tuners.lora import LoraLayer

from benchmarks.selection import planted
from benchmarks.selection.long_grids import GRIDS as LONG_GRIDS
from benchmarks.selection.long_grids import run_all
from benchmarks.selection.real_training import GRIDS, Workshop, open_workshop, place
from benchmarks.selection.study import run_study
from rightrank.models.kinds import linear
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import TrialFinished
from rightrank.search.history import base_arm
from rightrank.train.multi_lora import ADAPTER
from rightrank.train.runtime import adapter_attached

HERE = Path(__file__).parent
SCALES = ("alpha/r", "constant")
READINGS = ("own", "kept")
# Of the stored grids; the learning rates that nest.
TASKS = {"senses_long": (1e-3, 3e-3), "glosses_long": (1e-3, 3e-3), "reuters": (1e-3, 3e-3)}
SEEDS = (0, 1)
TEACHERS = range(64, 74)  # the first ten that chose no rule
MARGINS = {"planted": 0.005, "senses_long": 0.02, "glosses_long": 0.02, "reuters": 0.02}  # of their families
Values = dict[str, dict[str, dict[str, float]]]  # rank → learning rate → seed → held-out loss


def diagonal(ranks: Sequence[int], alpha: float, scale: str) -> torch.Tensor:
    """P as a vector [top]."""
    top = max(ranks)
    found = torch.zeros(top)
    for rank in ranks:
        found[:rank] += own_scale(rank, top, alpha, scale) / len(ranks)
    return found


def own_scale(rank: int, top: int, alpha: float, scale: str) -> float:
    return alpha / (rank if scale == "alpha/r" else top)


def prefix(ranks: Sequence[int], alpha: float, scale: str, reading: str, rank: int) -> torch.Tensor:
    """What stands between B and A [top] when the adapter is read at `rank`."""
    top = max(ranks)
    values = diagonal(ranks, alpha, scale)
    if reading == "own":
        values = torch.full((top,), own_scale(rank, top, alpha, scale))
    return torch.where(torch.arange(top) < rank, values, torch.zeros(()))


# Planted teachers


class NestedTraining(planted.Training):
    """Students of the top rank with P between B and A."""

    def __init__(self, data: planted.Data, students: planted.Students, scale: str) -> None:
        super().__init__(data, students, planted.initial(students))
        self.between = diagonal(planted.RANKS, planted.ALPHA, scale)

    def products(self, adapters: planted.Adapters) -> dict[str, torch.Tensor]:
        return read_at(adapters, self.between)


def read_at(adapters: planted.Adapters, between: torch.Tensor) -> dict[str, torch.Tensor]:
    """B·diag·A of every student."""
    return {name: torch.bmm(b, between[:, None] * a) for name, (a, b) in adapters.items()}


def nested_teacher(teacher: planted.Teacher, scale: str) -> dict[str, Values]:
    """Reading → values on the validation split, by rank, learning rate and seed."""
    cells = [(rate, seed) for rate in planted.RATES for seed in planted.SEEDS]
    students = planted.Students([max(planted.RANKS)] * len(cells), [c[0] for c in cells], [c[1] for c in cells])
    data = planted.Data(teacher)
    training = NestedTraining(data, students, scale)
    for step in range(teacher.steps):
        training.step(step, min(1.0, (step + 1) / (0.05 * teacher.steps)) * (1 - step / teacher.steps))
    found: dict[str, Values] = {}
    for reading in READINGS:
        for rank in planted.RANKS:
            between = prefix(planted.RANKS, planted.ALPHA, scale, reading, rank)
            values = data.evaluate(read_at(training.detached(), between))
            for (rate, seed), value in zip(cells, values, strict=True):
                place(found.setdefault(reading, {}), rank, rate, seed, round(value, 6))
    return found


def planted_rows() -> Iterator[dict[str, Any]]:
    stored = {c["id"]: c for c in json.loads((HERE / "planted_new_grids.json").read_text())["curves"]}
    for number in TEACHERS:
        teacher = planted.teachers(number + 1)[number]
        plain = stored[teacher.name]["seed_grid"]
        learned = stored[teacher.name]["base"] - best(plain, max(planted.RANKS))
        for scale in SCALES:
            for reading, values in nested_teacher(teacher, scale).items():
                yield row("planted", teacher.name, scale, reading, values, plain, learned)
        print(teacher.name, flush=True)


# Real tasks


@contextmanager
def scaled_by(between: torch.Tensor) -> Iterator[None]:
    """Within the block, `between` stands between B and A of every adapter of its rank, in place of alpha/r."""
    plain = linear._scale

    def scale(group: Any, like: torch.Tensor) -> torch.Tensor | float:
        return between.to(like)[None, None, :]

    linear._scale = scale
    try:
        yield
    finally:
        linear._scale = plain


@contextmanager
def read_between(model: Any, between: torch.Tensor) -> Iterator[None]:
    """Within the block, `between` stands between B and A of PEFT's attached adapter, in place of its scale."""
    hooks = [
        module.lora_A[ADAPTER].register_forward_hook(
            lambda _, __, output, ratio=between / module.scaling[ADAPTER]: output * ratio.to(output)
        )
        for module in model.modules()
        if isinstance(module, LoraLayer)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def nested_values(shop: Workshop, scale: str) -> dict[str, Values]:
    settings = shop.settings
    ranks, alpha, top = settings.ranks, settings.lora_alpha, max(settings.ranks)
    arms = [shop.space.arm(top, rate, seed) for rate in settings.learning_rates for seed in settings.seeds]
    with scaled_by(diagonal(ranks, alpha, scale)):
        run_all(shop, arms)
    found: dict[str, Values] = {reading: {} for reading in READINGS}
    for arm in arms:
        outcome = shop.outcomes[arm]
        if not isinstance(outcome, TrialFinished):
            print(arm.label(), outcome.type, flush=True)
            continue
        with adapter_attached(shop.runtime, shop.folder.trial_adapter(outcome.trial_id)):
            for reading in READINGS:
                for rank in ranks:
                    with read_between(shop.runtime.model, prefix(ranks, alpha, scale, reading, rank)):
                        value = shop.runtime.evaluate("selection").loss
                    place(found[reading], rank, arm.learning_rate, arm.seed, round(value, 5))
        assert isclose(
            value, outcome.metrics["loss"], rel_tol=1e-2
        )  # the last one is what was trained: the top under P
    return found


def plain_values(shop: Workshop, ranks: Sequence[int]) -> Values:
    """Separate trainings."""
    arms = [
        shop.space.arm(rank, rate, seed)
        for seed in shop.settings.seeds
        for rate in shop.settings.learning_rates
        for rank in ranks
    ]
    run_all(shop, arms)
    found: Values = {}
    for arm in arms:
        outcome = shop.outcomes[arm]
        if isinstance(outcome, TrialFinished):
            place(found, arm.rank, arm.learning_rate, arm.seed, round(outcome.metrics["loss"], 5))
    return found


def real_rows(task: str, model: str, data: Path, work: Path) -> Iterator[dict[str, Any]]:
    settings = SelectSettings(**(GRIDS | LONG_GRIDS)[task] | {"seeds": SEEDS, "learning_rates": TASKS[task]})
    shop = open_workshop(model, data, settings, work / "plain")
    plain = plain_values(shop, settings.ranks)
    base = shop.run(base_arm(settings.lora_alpha))
    assert isinstance(base, TrialFinished)
    learned = base.metrics["loss"] - best(plain, max(settings.ranks))
    for scale in SCALES:
        shop = open_workshop(model, data, settings, work / scale.replace("/", "_"))
        for reading, values in nested_values(shop, scale).items():
            yield row(task, task, scale, reading, values, plain, learned)


# What is stored


def best(values: Mapping[str, Mapping[str, Mapping[str, float]]], rank: int) -> float:
    """The mean over the seeds that nested trainings have, at the best learning rate."""
    return min(float(np.mean(list(by_seed.values()))) for by_seed in values[str(rank)].values())


def row(task: str, name: str, scale: str, reading: str, values: Values, plain: Any, learned: float) -> dict[str, Any]:
    """What nesting costs at every rank: its loss minus that of the separate training, each at its best learning rate."""
    seeds = {seed for by_rate in values.values() for by_seed in by_rate.values() for seed in by_seed}
    separate = {
        rank: {rate: {s: v for s, v in by_seed.items() if s in seeds} for rate, by_seed in by_rate.items()}
        for rank, by_rate in plain.items()
    }
    whole = {
        rank: {rate: by_seed for rate, by_seed in by_rate.items() if len(by_seed) == len(seeds)}
        for rank, by_rate in values.items()
    }
    ranks = sorted(int(rank) for rank in values)
    cost = {str(rank): round(best(whole, rank) - best(separate, rank), 5) for rank in ranks}
    return {
        "task": task,
        "name": name,
        "scale": scale,
        "reading": reading,
        "learned": round(learned, 5),
        "cost": cost,
        "pick of separate trainings": pick(separate, ranks, MARGINS[task]),
        "pick of the nested one": pick(whole, ranks, MARGINS[task]),
        "values": values,
    }


def pick(values: Any, ranks: Sequence[int], margin: float) -> int:
    losses = {rank: best(values, rank) for rank in ranks}
    return min(rank for rank in ranks if losses[rank] <= min(losses.values()) + margin + 1e-9)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| task | scale, reading | cost by rank | top within the margin | picks equal · lower · higher |", "|---|---|---|---|---|"]  # fmt: skip
    for key in dict.fromkeys((one["task"], one["scale"], one["reading"]) for one in rows):
        found = [one for one in rows if (one["task"], one["scale"], one["reading"]) == key]
        cost = ", ".join(
            f"{rank}: {float(np.median([one['cost'][rank] for one in found])):+.4f}" for rank in found[0]["cost"]
        )
        top = max(found[0]["cost"], key=int)
        within = sum(one["cost"][top] <= MARGINS[key[0]] for one in found)
        offs = [one["pick of the nested one"] - one["pick of separate trainings"] for one in found]
        counts = " · ".join(str(sum(test)) for test in ([o == 0 for o in offs], [o < 0 for o in offs], [o > 0 for o in offs]))  # fmt: skip
        lines.append(f"| {key[0]} | {key[1]}, {key[2]} | {cost} | {within} of {len(found)} | {counts} |")
    return "\n".join(lines)


def rows_of(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    if options.task == "planted":
        return planted_rows()
    return real_rows(options.task, options.model, options.data, options.work)


def main() -> None:
    run_study(__doc__, ["planted", *TASKS], rows_of, table, HERE / "nested.json")


if __name__ == "__main__":
    main()
