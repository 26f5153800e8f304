"""The study's tables and picture, from its stored results: `python -m benchmarks.squeeze.judge benchmarks/squeeze/results`.

A case is a task, a rank and a seed that did not choose. The cut holds in it where its held-out loss is at most half a margin above that of the training at the
rank, at the rank's own best learning rate. The margin is the default one: 0.005 nats a token, 0.02 nats a pair, else 1% of the top's loss.
Losses of the reported examples stand in an `.npz` beside the task's JSON file, in thousandths ([rows, examples], int16).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.machine import machine_text
from benchmarks.squeeze.table import Row, best_rows, mean
from rightrank.report.figure import Axis, Figure, Series, rank_axis
from rightrank.report.svg import svg_file
from rightrank.schema.metrics import MetricKind, default_margin

RANKS = (1, 4, 16)
CHOOSE = ("sections", "origins", "speakers")  # tasks that chose a way of cutting to each rank
JUDGE = ("syllables", "verbs", "unions", "answers", "answer_pairs")  # those that were trained with it alone
# By name: where, in parts of the steps; by singular values (`svd`), else K-FAC; with a fresh optimizer, else its state projected; with a
# warm-up of a twentieth of the steps. `stages`: to 16 at a quarter, 4 at half, 1 at three quarters.
VARIANTS = ("quarter", "half", "three_quarters", "seven_eighths", "half_svd", "half_fresh", "half_svd_fresh", "half_warm", "half_fresh_warm",
            "three_quarters_fresh", "seven_eighths_fresh", "stages")  # fmt: skip
LOSSES: Mapping[str, MetricKind] = {"answers": "token_loss", "answer_pairs": "pair_loss"}  # else one for each example
STORY = 0.9  # of the cases in which the cut must hold
KINDS = {
    "direct": "trained at the rank",
    "end": "top cut at its end",
    "recovered": "cut at its end, recovered",
    "cut": "cut inside",
}


class Task(NamedTuple):
    name: str
    base: str
    rows: Sequence[Row]
    losses: np.ndarray  # [rows, examples], nats
    tokens: np.ndarray
    machine: Mapping[str, str]


class Case(NamedTuple):
    task: str
    rank: int
    seed: int
    difference: float  # of the cut from the training at the rank, nats
    error: float  # its standard error over the examples
    margin: float
    share: float  # the difference, as a share of what training at the top gains

    @property
    def holds(self) -> bool:
        return self.difference <= self.margin / 2


def read(folder: Path, name: str) -> Task | None:
    file = folder / f"{name}.json"
    if not file.exists():
        return None
    stored, arrays = json.loads(file.read_text()), np.load(folder / f"{name}.npz")
    rows = [Row(**row) for row in stored["rows"]]
    return Task(name, stored["base"], rows, arrays["losses"] / 1000, arrays["tokens"].astype(float), stored["machine"])


def best(task: Task, chosen: Mapping[int, str]) -> dict[tuple[str, int, int], int]:
    """By kind, rank and seed, the number of the row; the chosen way of cutting to a rank is the kind `cut`."""
    numbers = {row: number for number, row in enumerate(task.rows)}
    found = {key: numbers[row] for key, row in best_rows(task.rows).items()}
    return found | {
        ("cut", rank, seed): found[kind, rank, seed] for kind, rank, seed in found if kind == chosen.get(rank)
    }


def difference(task: Task, one: int, other: int) -> tuple[float, float]:
    """`(mean, standard error)` of the paired difference, nats a label token."""
    deltas, weights = task.losses[one] - task.losses[other], task.tokens
    center = float(deltas.sum() / weights.sum())
    residuals = deltas - center * weights
    return center, float(np.sqrt((residuals**2).sum()) / weights.sum())


def cases_of(task: Task, chosen: Mapping[int, str], by: str = "cut") -> Iterator[Case]:
    """`by`: what is compared with the training at the rank, `cut` (inside the training) or `end`."""
    found = best(task, chosen)
    for kind, rank, seed in sorted(found):
        if kind != by:
            continue
        top = task.rows[next(number for key, number in found.items() if key[0] == "top" and key[2] == seed)].loss
        margin = default_margin(LOSSES.get(task.name, "loss"), top, [top])
        delta, error = difference(task, found[by, rank, seed], found["direct", rank, seed])
        yield Case(task.name, rank, seed, delta, error, margin, delta / gain(task))


def from_top(task: Task, chosen: Mapping[int, str], kinds: Sequence[str]) -> dict[tuple[str, int], list[float]]:
    """By kind and rank, the differences from the whole top of every seed."""
    found = best(task, chosen)
    tops = {seed: task.rows[number].loss for (kind, _, seed), number in found.items() if kind == "top"}
    result: dict[tuple[str, int], list[float]] = {}
    for (kind, rank, seed), number in sorted(found.items()):
        if kind in kinds:
            result.setdefault((kind, rank), []).append(task.rows[number].loss - tops[seed])
    return result


def table(tasks: Sequence[Task], chosen: Mapping[int, str], kinds: Mapping[str, str]) -> str:
    """Mean differences from the whole top, a row for each task and kind, a column for each rank."""
    lines = ["| task | | " + " | ".join(f"rank {rank}" for rank in RANKS) + " |", "|---|---|" + "---|" * len(RANKS)]
    for task in tasks:
        values = from_top(task, chosen, tuple(kinds))
        for kind, text in kinds.items():
            cells = [f"{mean(values[kind, rank]):+.4f}" if (kind, rank) in values else "–" for rank in RANKS]
            if any(cell != "–" for cell in cells):
                lines.append(f"| {task.name} | {text} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(tasks: Sequence[Task], chosen: Mapping[int, str]) -> Figure:
    """What each way loses against the whole top, as a share of what training gains: means over tasks and seeds."""
    lost = {
        kind: [
            mean([mean(from_top(task, chosen, (kind,))[kind, rank]) / gain(task) for task in tasks]) for rank in RANKS
        ]
        for kind in KINDS
    }
    rows = tuple((KINDS[kind], *(round(100 * share, 3) for share in shares)) for kind, shares in lost.items())
    return Figure(
        name="squeeze",
        title=f"What a low rank loses against rank 64, as a share of what training gains: {len(tasks)} judged tasks",
        alt="; ".join(
            f"{row[0]}: " + ", ".join(f"rank {r} {share}%" for r, share in zip(RANKS, row[1:], strict=True))
            for row in rows
        ),
        x=rank_axis(RANKS),
        y=Axis("lost, % of the gain"),
        series=tuple(
            Series(
                KINDS[kind], RANKS, tuple(100 * share for share in shares), tone="accent" if kind == "cut" else number
            )
            for number, (kind, shares) in enumerate(lost.items())
        ),
        columns=("", *(f"rank {rank}" for rank in RANKS)),
        rows=rows,
    )


def gain(task: Task) -> float:
    (base,) = [row.loss for row in task.rows if row.kind == "base"]
    return base - mean([row.loss for key, row in best_rows(task.rows).items() if key[0] == "top"])


def judgement(cases: Sequence[Case]) -> str:
    held = sum(case.holds for case in cases)
    shown_worse = sum(case.difference - 1.96 * case.error > case.margin / 2 for case in cases)
    better = sum(case.difference < 0 for case in cases)
    verdict = "The rule is met" if held >= STORY * len(cases) else "The rule is not met"
    return (
        f"In {held} of {len(cases)} cases ({held / len(cases):.0%}) the cut is no worse, by half a margin, than the training at its rank and the rank's own best "
        f"learning rate; in {better} its loss is lower, in {shown_worse} it is shown to be worse. {verdict} ({STORY:.0%})."
    )


def counts(by_kind: Mapping[str, Sequence[Case]]) -> str:
    """In how many cases each way is no worse than the training at the rank, and how it differs, as a share of what training gains."""
    lines = [
        "| rank | | no worse by half a margin | smallest, median and largest difference, % of the gain |",
        "|---|---|---|---|",
    ]
    for rank in RANKS:
        for kind, cases in by_kind.items():
            of_rank = [case for case in cases if case.rank == rank]
            shares = np.quantile([100 * case.share for case in of_rank], (0, 0.5, 1))
            held = sum(case.holds for case in of_rank)
            lines.append(
                f"| {rank} | {KINDS[kind]} | {held} of {len(of_rank)} | {', '.join(f'{share:+.1f}' for share in shares)} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    chosen = {
        int(rank): kind for rank, kind in json.loads((options.folder / "choice.json").read_text())["chosen"].items()
    }
    choosing, judged = ([one for name in names if (one := read(options.folder, name))] for names in (CHOOSE, JUDGE))
    cases = [case for task in judged for case in cases_of(task, chosen)]
    worst = [
        f"{case.task}, rank {case.rank}, seed {case.seed}: {case.difference:+.4f} ± {case.error:.4f}, margin {case.margin:.4f}"
        for case in cases
        if not case.holds
    ]
    ways = {
        "direct": KINDS["direct"],
        **{key: key.replace("_", " ") for key in VARIANTS},
        "end": KINDS["end"],
        "recovered": KINDS["recovered"],
    }
    at_the_end = [case for task in judged for case in cases_of(task, chosen, "end")]
    parts = [
        judgement(cases),
        counts({"cut": cases, "end": at_the_end}),
        "Where it does not hold: " + ("; ".join(worst) or "nowhere") + ".",
        table(judged, chosen, KINDS),
        table(choosing, {}, ways),
    ]
    parts += [f"Chosen: {chosen}. {machine_text(judged[0].machine)}."]
    print("\n\n".join(parts))
    (options.folder.parent / "squeeze.svg").write_text(svg_file(picture(judged, chosen)))


if __name__ == "__main__":
    main()
