"""Fit a model of the noise of a difference between two ranks to the twelve long grids, and choose the confidence level.

    python -m benchmarks.selection.noise_model            # fits, writes noise_model.json
    python -m benchmarks.selection.noise_model --picture  # draws trade_off.svg from it

The variance of the mean difference of n seeds and N examples around that of all seeds and examples, in units of the variance between examples
(`spread`, of one seed), is

    seeds / n  +  crossed / (n·N)  +  examples / N

The three terms are the variance components of three seeds × examples, of each rank against the largest, at the learning rates that are best over
the seeds: averaged over ranks, then grids, then tasks. The degrees of freedom of Student's t maximize the likelihood of the differences that the other
seeds show on the other half of the examples. Every task is also predicted from the fit to the other tasks.

The trade-off: each choice of 1, 2 or 3 seeds of a grid answers on half of the examples with the smallest rank that has the
probability, with the components of the other tasks. The truth is the mean of the other seeds (for three seeds: of the same) on the other half.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise, product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from scipy.stats import t as student

from benchmarks.machine import describe_machine
from benchmarks.selection.tables import GridCurve, read_grids
from rightrank.decision import evidence as evidence_module
from rightrank.decision import seeds as seeds_module
from rightrank.decision.evidence import Evidence, compare_ranks
from rightrank.decision.rule import DEFAULT_CONFIDENCE
from rightrank.decision.seeds import NoiseComponents
from rightrank.decision.table import Cell, ScoreTable
from rightrank.decision.verdicts import find_unexplained_rank
from rightrank.schema.metrics import infer_metric_kind
from rightrank.schema.trials import Floats

HERE = Path(__file__).parent
FILES = ("seeded_grids.json.xz", "grids/*.json.xz", "locked/*.json.xz")
RESULT, PICTURE = HERE / "noise_model.json", HERE / "trade_off.svg"
MARGINS = (0.005, 0.02, 0.05)
CONFIDENCES = tuple(np.round(np.arange(0.5, 0.96, 0.05), 2).tolist())
ANSWERED = 0.85  # share of two-seed cases that the chosen confidence must answer; the largest such confidence is chosen
DEGREES = (2.0, 3.0, 4.0, 6.0, 8.0, 15.0, 30.0)


def read_long_grids() -> list[GridCurve]:
    """Read the long grids that have three seeds and example losses."""
    files = [path for pattern in FILES for path in sorted(HERE.glob(pattern))]
    return [curve for file in files for curve in read_grids(file) if curve.items and len(curve.seeds) > 2]


def get_task(name: str) -> str:
    return name.split("_")[0]


def iterate_differences(curve: GridCurve) -> Iterator[Floats]:
    """Yield [seeds, examples] loss differences of each rank from the largest, divided by the mean weight, at the best rates over the seeds."""
    best = {rank: min(curve.cells[rank], key=lambda lr: curve.loss(rank, lr)) for rank in curve.ranks}
    weights = np.asarray(curve.item_tokens or 1.0, dtype=float)
    sign = -1.0 if curve.higher_is_better else 1.0
    top = curve.ranks[-1]
    for rank in curve.ranks[:-1]:
        pairs = [
            (curve.items.get((rank, best[rank], seed)), curve.items.get((top, best[top], seed))) for seed in curve.seeds
        ]
        rows = [np.subtract(ours, theirs) for ours, theirs in pairs if ours is not None and theirs is not None]
        if len(rows) > 2:
            yield sign * np.array(rows) / weights.mean()


def estimate_components(rows: Floats) -> NoiseComponents:
    """Estimate the components from the mean squares of two crossed factors."""
    seeds, items = rows.shape
    by_seed, by_item = rows.mean(axis=1), rows.mean(axis=0)
    residuals = rows - by_seed[:, None] - by_item + rows.mean()
    crossed = float((residuals**2).sum()) / ((seeds - 1) * (items - 1))
    examples = float(by_item.var(ddof=1)) - crossed / seeds
    spread = float(rows.var(axis=1, ddof=1).mean())
    return NoiseComponents((float(by_seed.var(ddof=1)) - crossed / items) / spread, crossed / spread, examples / spread)


def average_components(components: Sequence[tuple[str, str, NoiseComponents]]) -> NoiseComponents:
    """Average ranks within grids, grids within tasks, then tasks, with equal weights."""

    def mean(name: str) -> float:
        tasks: dict[str, dict[str, list[float]]] = {}
        for task, grid, component in components:
            tasks.setdefault(task, {}).setdefault(grid, []).append(getattr(component, name))
        return float(
            np.mean([np.mean([np.mean(of_grid) for of_grid in of_task.values()]) for of_task in tasks.values()])
        )

    return NoiseComponents(*(max(mean(name), 0.0) for name in ("seeds", "crossed", "examples")))


def fit_components(curves: Sequence[GridCurve]) -> tuple[NoiseComponents, dict[str, NoiseComponents]]:
    """Return the components fitted to all grids, and for each task those fitted to the other tasks."""
    components = [
        (get_task(curve.name), curve.name, estimate_components(rows))
        for curve in curves
        for rows in iterate_differences(curve)
    ]
    tasks = sorted({task for task, _, _ in components})
    return average_components(components), {
        task: average_components([curve for curve in components if curve[0] != task]) for task in tasks
    }


@dataclass(frozen=True)
class Case:
    """The decision's probabilities from one choice of seeds and one half of the examples, and the truth from the other half."""

    task: str
    grid: str
    seeds: int
    examples: int
    margin: float
    probabilities: dict[int, float]
    picks: dict[int, float]  # rank → its true difference from the best rank
    is_doubted: bool  # whether a larger rank is worse for no apparent reason (`find_unexplained_rank`)

    @property
    def right(self) -> int:
        return min(rank for rank, worse in self.picks.items() if worse <= self.margin + 1e-9)

    def answer(self, confidence: float) -> int | None:
        return min((rank for rank, likely in self.probabilities.items() if likely >= confidence), default=None)


def build_table(curve: GridCurve, seeds: Sequence[int], items: Floats) -> ScoreTable:
    """Return the table of some seeds of a grid on some of its examples."""
    weights = np.asarray(curve.item_tokens or np.ones(len(next(iter(curve.items.values())))), dtype=float)[items]
    sign = -1.0 if curve.higher_is_better else 1.0
    cells = {}
    for (rank, lr, seed), scores in curve.items.items():
        if seed in seeds:
            sums = sign * np.asarray(scores, dtype=float)[items]
            cells[rank, lr, seed] = Cell("", float(sums.sum() / weights.sum()), sums, weights)
    return ScoreTable(
        curve.metric, curve.higher_is_better, cells, kind=infer_metric_kind(curve.metric, curve.higher_is_better)
    )


def iterate_cases(curve: GridCurve, splits: int = 2) -> Iterator[Case]:
    """Yield every choice of one to three seeds, on random halves of the examples in both directions."""
    count = len(next(iter(curve.items.values())))
    generator = np.random.default_rng(len(curve.name))
    for _ in range(splits):
        order = generator.permutation(count)
        for ours, theirs in ((order[: count // 2], order[count // 2 :]), (order[count // 2 :], order[: count // 2])):
            for size in (1, 2, 3):
                for seeds in combinations(curve.seeds[:3], size):
                    unseen_seeds = [seed for seed in curve.seeds if seed not in seeds] or curve.seeds
                    evidence = Evidence(build_table(curve, seeds, ours))
                    if evidence.probability_obstacle:
                        continue
                    chosen, true = build_table(curve, unseen_seeds, ours), build_table(curve, unseen_seeds, theirs)
                    losses = {}
                    for rank in evidence.contenders:
                        means = {
                            lr: np.mean([c.loss for c in by.values()])
                            for lr, by in chosen.get_cells_by_rate(rank).items()
                        }
                        best = min(means, key=lambda lr: means[lr])
                        losses[rank] = float(np.mean([c.loss for c in true.get_cells_by_rate(rank)[best].values()]))
                    picks = {rank: loss - min(losses.values()) for rank, loss in losses.items()}
                    for margin in MARGINS:
                        likely = {
                            rank: evidence.compute_probability(rank, margin) or 0.0 for rank in evidence.contenders
                        }
                        tested = compare_ranks(evidence, margin).apply_confidence(DEFAULT_CONFIDENCE)
                        doubted = find_unexplained_rank(tested) is not None
                        yield Case(get_task(curve.name), curve.name, size, len(ours), margin, likely, picks, doubted)


def predict_cases(curves: Sequence[GridCurve], by_task: dict[str, NoiseComponents]) -> list[Case]:
    """Return the cases of every grid, with the components fitted to the other tasks."""
    cases: list[Case] = []
    for curve in curves:
        noise = by_task[get_task(curve.name)]
        with patch.object(seeds_module, "NOISE", noise), patch.object(evidence_module, "NOISE", noise):
            cases += iterate_cases(curve)
    return cases


def compute_log_scores(curves: Sequence[GridCurve], by_task: dict[str, NoiseComponents]) -> dict[str, float]:
    """Map degrees of freedom to the mean log density of the other seeds' differences on the other half, given one seed on one half."""
    errors: dict[str, list[tuple[float, float]]] = {}
    for curve in curves:
        components = by_task[get_task(curve.name)]
        for rows in iterate_differences(curve):
            half = rows.shape[1] // 2
            for seed in range(len(rows)):
                other_seeds = [other_seed for other_seed in range(len(rows)) if other_seed != seed]
                for ours, theirs in ((slice(half), slice(half, None)), (slice(half, None), slice(half))):
                    a, b = rows[seed, ours], rows[other_seeds][:, theirs]
                    variance = a.var(ddof=1) * (
                        components.compute_ratio(1, a.size) + components.compute_ratio(len(other_seeds), b.shape[1])
                    )
                    errors.setdefault(get_task(curve.name), []).append(
                        (float(b.mean() - a.mean()), float(variance**0.5))
                    )

    def score(of_task: Sequence[tuple[float, float]], degrees: float) -> float:
        return float(np.mean([student.logpdf(error / scale, degrees) - np.log(scale) for error, scale in of_task]))

    return {
        f"{degrees:g}": float(np.mean([score(task_errors, degrees) for task_errors in errors.values()]))
        for degrees in DEGREES
    }


def summarize(cases: Sequence[Case]) -> dict[str, float]:
    """Summarize by number of seeds and confidence; grids have equal weights."""
    rows: dict[str, Any] = {}
    for seeds in (1, 2, 3):
        of_seeds = [case for case in cases if case.seeds == seeds]
        for confidence in CONFIDENCES:
            by_grid: dict[str, list[tuple[float, float, float, float]]] = {}
            for case in of_seeds:
                answer = case.answer(confidence)
                small, exact = (answer is not None and answer < case.right), answer == case.right
                worse = 0.0 if answer is None else max(0.0, case.picks[answer] - case.margin)
                by_grid.setdefault(case.grid, []).append((answer is not None, small, exact, worse))
            means = np.mean([np.mean(rows_of, axis=0) for rows_of in by_grid.values()], axis=0)
            rows[f"{seeds} seeds, {confidence:g}"] = dict(
                zip(("answered", "too small", "exact", "regret"), np.round(means, 4).tolist(), strict=True)
            )
        for rank in (16, 64):
            fixed = [
                (rank < case.right, rank == case.right, max(0.0, case.picks[rank] - case.margin)) for case in of_seeds
            ]
            rows[f"{seeds} seeds, always {rank}"] = dict(
                zip(("too small", "exact", "regret"), np.round(np.mean(fixed, axis=0), 4).tolist(), strict=True)
            )
    return rows


def compute_reliability(cases: Sequence[Case]) -> list[dict[str, float]]:
    """Return how often a rank is within the margin of the (noisy) truth, by its probability."""
    edges = (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
    events = [(p, case.picks[rank] <= case.margin) for case in cases for rank, p in case.probabilities.items()]
    rows = []
    for low, high in pairwise(edges):
        inside = [(p, is_within) for p, is_within in events if low <= p < high or high == p == 1.0]
        if inside:
            forecast, is_within = np.round(np.mean(inside, axis=0), 3).tolist()
            rows.append({"from": low, "to": high, "forecast": forecast, "held": is_within, "events": len(inside)})
    return rows


def count_doubts(cases: Sequence[Case]) -> dict[str, dict[str, int]]:
    """Count answers with and without a larger rank that is worse without a reason, and how many of them are too small."""
    rows: dict[str, dict[str, int]] = {}
    for seeds, is_doubted in product((1, 2, 3), (True, False)):
        answers = [
            (answer, case.right)
            for case in cases
            if case.seeds == seeds and case.is_doubted is is_doubted and (answer := case.answer(DEFAULT_CONFIDENCE))
        ]
        rows[f"{seeds} seeds, {'doubted' if is_doubted else 'others'}"] = {
            "answers": len(answers),
            "too small": sum(answer < right for answer, right in answers),
        }
    return rows


def draw_trade_off(rows: dict[str, Any], chosen: float, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for seeds, marker in ((1, "o"), (2, "s"), (3, "^")):
        points = [rows[f"{seeds} seeds, {confidence:g}"] for confidence in CONFIDENCES]
        shares = [[100 * point[name] for point in points] for name in ("answered", "too small")]
        (line,) = axes.plot(*shares, f"{marker}-", markersize=4, label=f"{seeds} seed{'s' * (seeds > 1)}")
        at = CONFIDENCES.index(chosen)
        axes.plot(
            shares[0][at], shares[1][at], marker, markersize=10, color=line.get_color(), label=f"the same at {chosen:g}"
        )
    axes.set_xlabel("answered, %")
    axes.set_ylabel("answered with too small a rank, %")
    axes.set_title("confidence .5 (right) to .95 (left), twelve long grids", fontsize=10)
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", action="store_true")
    if parser.parse_args().picture:
        stored = json.loads(RESULT.read_text())
        draw_trade_off(stored["trade_off"], stored["confidence"], PICTURE)
        return
    curves = read_long_grids()
    components, by_task = fit_components(curves)
    scores = compute_log_scores(curves, by_task)
    trade_off = summarize(cases := predict_cases(curves, by_task))
    allowed = [
        confidence for confidence in CONFIDENCES if trade_off[f"2 seeds, {confidence:g}"]["answered"] >= ANSWERED
    ]
    result = {
        "machine": describe_machine(),
        "grids": [curve.name for curve in curves],
        "parts": list_components(components),
        "parts without a task": {task: list_components(confidence) for task, confidence in by_task.items()},
        "log score by degrees": {name: round(score, 4) for name, score in scores.items()},
        "confidence": max(allowed),
        "trade_off": trade_off,
        "larger rank worse": count_doubts(cases),
        "reliability": {
            str(seeds): compute_reliability([case for case in cases if case.seeds == seeds]) for seeds in (1, 2, 3)
        },
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(
        json.dumps(
            {name: result[name] for name in ("parts", "log score by degrees", "trade_off", "reliability")}, indent=1
        )
    )


def list_components(components: NoiseComponents) -> dict[str, float]:
    return {name: round(getattr(components, name), 5) for name in ("seeds", "crossed", "examples")}


if __name__ == "__main__":
    main()
