"""Less noise between seeds for the same money: four ways, each trained.

    python -m benchmarks.selection.noise planted --out benchmarks/selection/noise.json
    python -m benchmarks.selection.noise TASK MODEL DATA --work FOLDER --out benchmarks/selection/noise.json

What counts is the difference between a rank's loss and the top's, all at one learning rate. A training has two sources of
noise, its first draw and its batches.

    independent   six seeds; each has its own first draw and its own batches
    shared        the first draws differ, the batches are those of the first seed
    antithetic    every second seed reads the batches of the one before in reverse order
    from half     the second seed starts from half of the first seed's training, and has batches of its own from there

Each way is read twice: the adapter at the end, and the mean of A and of B over the last tenth of the steps. A way that shows too little
of the noise makes a bound too narrow, so `shared` and `from half` are compared with `independent`: the share of its standard deviation
that they show. `antithetic` should have pairs whose mean varies less than that of independent pairs. The bias is the mean
difference minus that of `independent`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.selection import planted
from benchmarks.selection.long_grids import MINILM, SHORT_TEXTS, run_all
from benchmarks.selection.nested import TEACHERS
from benchmarks.selection.real_training import COMMON, LONG, Workshop, open_workshop
from benchmarks.selection.study import run_study
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import TrialFinished
from rightrank.train.runtime import Runtime

HERE = Path(__file__).parent
SEEDS = tuple(range(6))
LAST = 0.1  # of the steps: the running mean
WAYS = ("independent", "shared", "antithetic", "from half")
REAL_WAYS = ("independent", "antithetic")  # the teachers dropped the others
RATES = {"senses": 1e-3, "newsgroups": 3e-3}
SETTINGS = COMMON | LONG | SHORT_TEXTS | MINILM | {"dtype": "bfloat16", "ranks": (4, 16, 64), "seeds": SEEDS}
Losses = dict[str, dict[str, list[float]]]  # reading → rank → by seed

Plan = Callable[[int], tuple[int, bool]]  # seed → whose batches it reads, and whether in reverse order
PLANS: dict[str, Plan] = {
    "independent": lambda seed: (seed, False),
    "shared": lambda seed: (SEEDS[0], False),
    "antithetic": lambda seed: (seed - seed % 2, seed % 2 == 1),
    "from half": lambda seed: (seed, False),
}


# Planted teachers


class Reordered(planted.Data):
    """A teacher's data, in the order that a way gives each seed."""

    def __init__(self, teacher: planted.Teacher, plan: Plan) -> None:
        super().__init__(teacher)
        self.plan = plan

    def batch(self, seed: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        source, reverse = self.plan(seed)
        return super().batch(source, self.teacher.steps - 1 - step if reverse else step)


def planted_losses(teacher: planted.Teacher, rate: float, way: str) -> Losses:
    cells = [(rank, seed) for rank in planted.RANKS for seed in SEEDS]
    seeds = [seed for _, seed in cells]
    first = [SEEDS[0]] * len(cells) if way == "from half" else seeds
    students = planted.Students([rank for rank, _ in cells], [rate] * len(cells), first)
    data, steps = Reordered(teacher, PLANS[way]), teacher.steps
    training, mean, count = planted.Training(data, students, planted.initial(students)), {}, 0
    for step in range(steps):
        if step == steps // 2:
            training.follow(seeds)
        training.step(step, min(1.0, (step + 1) / (0.05 * steps)) * (1 - step / steps))
        if step >= round((1 - LAST) * steps):
            count += 1
            mean = planted.running_mean(mean, training.detached(), count)
    values = {"end": training.values(), "mean of the last tenth": data.evaluate(training.products(mean))}
    return {
        reading: {
            str(rank): [value for value, (own, _) in zip(found, cells, strict=True) if own == rank]
            for rank in planted.RANKS
        }
        for reading, found in values.items()
    }


def planted_rows() -> Iterator[dict[str, Any]]:
    stored = {c["id"]: c for c in json.loads((HERE / "planted_new_grids.json").read_text())["curves"]}
    for number in TEACHERS:
        teacher = planted.teachers(number + 1)[number]
        curve = stored[teacher.name]
        top = curve["lr_grid"][str(max(planted.RANKS))]
        rate = min(top, key=lambda one: top[one])
        for way in WAYS:
            losses = planted_losses(teacher, float(rate), way)
            yield {"task": "planted", "name": teacher.name, "way": way, "learned": curve["base"] - top[rate]} | {
                "losses": {reading: rounded(found) for reading, found in losses.items()}
            }
        print(teacher.name, flush=True)


# Real tasks


@contextmanager
def batches_of(plan: Plan, steps: int) -> Iterator[None]:
    """Within the block, a seed reads the batches that `plan` says."""
    plain = Runtime.batch_plan

    def ordered(self: Runtime, seed: int, wanted: int | None = None) -> list[list[int]]:
        source, reverse = plan(seed)
        found = plain(self, source, wanted)
        return found[steps - 1 :: -1] + found[steps:] if reverse else found

    with patch.object(Runtime, "batch_plan", ordered):
        yield


def real_losses(shop: Workshop, way: str) -> Losses:
    settings, steps = shop.settings, shop.settings.max_steps
    assert steps is not None
    whole = [
        shop.space.arm(rank, settings.learning_rates[0], seed).model_copy(update={"stop_at": steps})
        for seed in SEEDS
        for rank in settings.ranks
    ]
    with batches_of(PLANS[way], steps):
        run_all(shop, whole)
    found: Losses = {}
    for arm in whole:
        outcome = shop.outcomes[arm]
        assert isinstance(outcome, TrialFinished)
        found.setdefault("end", {}).setdefault(str(arm.rank), []).append(outcome.metrics["loss"])
    return found


def real_rows(task: str, model: str, data: Path, work: Path) -> Iterator[dict[str, Any]]:
    settings = SelectSettings(**SETTINGS | {"learning_rates": (RATES[task],)})
    for way in REAL_WAYS:
        shop = open_workshop(model, data, settings, work / way.replace(" ", "_"))
        losses = real_losses(shop, way)
        base = next(o for o in shop.outcomes.values() if isinstance(o, TrialFinished) and o.rank == 0)
        best = min(min(values) for values in losses["end"].values())
        yield {"task": task, "name": task, "way": way, "learned": round(base.metrics["loss"] - best, 5)} | {
            "losses": {reading: rounded(found) for reading, found in losses.items()}
        }


# What is stored


def rounded(losses: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    return {rank: [round(value, 6) for value in values] for rank, values in losses.items()}


def differences(row: Mapping[str, Any], reading: str) -> dict[str, np.ndarray]:
    """Rank → [seed]: its loss minus the top's, in units of what was learned."""
    losses = row["losses"][reading]
    top = max(losses, key=int)
    return {
        rank: (np.array(values) - np.array(losses[top])) / row["learned"]
        for rank, values in losses.items()
        if rank != top
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Medians over teachers or ranks, against `independent` at the end of the same task."""
    lines = ["| task | way | read | deviation over seeds | ratio | of a pair's mean | bias | loss |", "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for task in dict.fromkeys(row["task"] for row in rows):
        plain = {row["name"]: row for row in rows if (row["task"], row["way"]) == (task, "independent")}
        for way in WAYS:
            ours = [row for row in rows if (row["task"], row["way"]) == (task, way)]
            for reading in ours[0]["losses"] if ours else ():
                cells = []
                for row in ours:
                    base = differences(plain[row["name"]], "end")
                    for rank, values in differences(row, reading).items():
                        pairs, plain_pairs = (x.reshape(-1, 2).mean(1).std(ddof=1) for x in (values, base[rank]))
                        losses = (row["losses"][reading], plain[row["name"]]["losses"]["end"])
                        mine, theirs = (np.mean(one[rank]) for one in losses)
                        plain_deviation = max(base[rank].std(ddof=1), 1e-12)
                        cells.append(
                            [
                                values.std(ddof=1),
                                values.std(ddof=1) / plain_deviation,
                                pairs / max(plain_pairs, 1e-12),
                                abs(values.mean() - base[rank].mean()),
                                (mine - theirs) / row["learned"],
                            ]
                        )
                a, ratio, pair, bias, loss = np.median(np.array(cells), axis=0)
                lines.append(f"| {task} | {way} | {reading} | {a:.4f} | {ratio:.2f} | {pair:.2f} | {bias:.4f} | {loss:+.4f} |")  # fmt: skip
    return "\n".join(lines)


def rows_of(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    if options.task == "planted":
        return planted_rows()
    return real_rows(options.task, options.model, options.data, options.work)


def main() -> None:
    run_study(__doc__, ["planted", *RATES], rows_of, table, HERE / "noise.json")


if __name__ == "__main__":
    main()
