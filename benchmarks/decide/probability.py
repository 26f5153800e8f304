"""Fit how much the choice of the learning rate adds to the noise of a difference between ranks, and choose the default confidence.

    python -m benchmarks.decide.probability            # fits, writes probability.json and probability.svg
    python -m benchmarks.decide.probability --picture  # draws probability.svg from probability.json

The decision knows the noise of seeds and examples from `benchmarks/selection/noise_model.py`, where each rank has the learning rate that is best
over all seeds. A selection chooses the learning rates on one or two seeds. The component `learning_rates` of `NoiseComponents` is the variance
that this adds, in units of the variance between examples. It is the one that minimizes the Brier score of the stated probabilities on stored
grids of at least 400 steps, separately for losses and accuracies.

A case is a choice of one to three seeds of a grid, and a margin. The decision states a probability for each rank from the validation split. It
comes true if the rank, at the learning rate that the decision names, is within the margin of the best rank and learning rate in the mean of the
other seeds on the test split. Every grid is judged by the component that is fitted to the other grids.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import describe_machine
from benchmarks.selection.tables import GridCurve, read_grids
from rightrank.decision.evidence import NOISE, Evidence
from rightrank.decision.rule import DEFAULT_CONFIDENCE, compare_ranks, find_unexplained_rank
from rightrank.decision.table import Cell, ScoreTable
from rightrank.schema.metrics import infer_metric_kind

HERE = Path(__file__).parent
GRIDS = HERE.parent / "selection"
FILES = ("grids/*.json.xz", "locked/*.json.xz", "seeded_grids.json.xz", "wide/*.json.xz")
RESULT, PICTURE = HERE / "probability.json", HERE / "probability.svg"
MARGINS = (0.005, 0.02, 0.05)
BINS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
SEEDS = (1, 2, 3)
FITTED_SEEDS = (1, 2)  # three are left out of only five grids
COMPONENTS = (0.0, 0.002, 0.004, 0.006, 0.008, 0.01, 0.012, 0.014, 0.016, 0.018, 0.02, 0.025, 0.03, 0.04)
CONFIDENCES = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9)
ANSWERED = 0.8  # the share of two-seed cases that the confidence must answer; the largest such confidence is chosen
MIXTURES = tuple(np.round(np.arange(0.0, 0.6, 0.02), 2).tolist())

Values = Mapping[tuple[int, float, int], float]  # by rank, learning rate and seed, oriented: lower is better


@dataclass(frozen=True)
class Case:
    """The probabilities that a decision states, and what the other seeds show."""

    grid: str
    kind: str  # losses or accuracies
    seeds: int
    margin: float
    stated: Mapping[int, Sequence[float]]  # by rank, for each of `COMPONENTS`
    excess: Mapping[int, float]  # by rank: how much worse than the best rank and learning rate
    right: int  # the smallest rank that is within the margin at any learning rate
    is_doubted: bool  # whether a larger rank is worse for no apparent reason (`find_unexplained_rank`)

    def answer(self, confidence: float, component: int) -> int | None:
        return min((rank for rank, likely in self.stated.items() if likely[component] >= confidence), default=None)

    def list_events(self, component: int) -> list[tuple[float, bool]]:
        """List each rank's stated probability, and whether it came true."""
        return [(likely[component], self.excess[rank] <= self.margin) for rank, likely in self.stated.items()]


def resample_cases(outcomes: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the share of all cases, with a 95% interval that resamples grids; with few grids it contains Wilson's interval of as many cases as grids."""
    sums = np.array([[sum(values), len(values)] for values in outcomes.values()])
    picks = np.random.default_rng(0).integers(len(sums), size=(10_000, len(sums)))
    low, high = np.quantile(sums[picks, 0].sum(1) / sums[picks, 1].sum(1), (0.025, 0.975))
    share, count, z = float(sums[:, 0].sum() / sums[:, 1].sum()), len(sums), 1.96
    centre, half = (
        (share + z**2 / (2 * count)) / (1 + z**2 / count),
        z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / (1 + z**2 / count),
    )
    if count < 5:
        low, high = min(low, centre - half), max(high, centre + half)
    return {"true": round(share, 3), "low": round(float(low), 3), "high": round(float(high), 3)}


def read_test_means(curve: GridCurve, path: Path) -> Values:
    """Read the oriented means on the test split."""
    sign = -1.0 if curve.higher_is_better else 1.0
    if "trained" in curve.tests:
        grid = curve.tests["trained"]
        return {
            (rank, rate, seed): sign * grid[rank][rate][seed]
            for rank in grid
            for rate in grid[rank]
            for seed in grid[rank][rate]
        }
    with np.load(path.with_name(path.name.partition(".")[0] + ".npz")) as arrays:
        rows = -arrays["scores"] if curve.higher_is_better else arrays["losses"]
        weights = np.ones(rows.shape[1]) if curve.higher_is_better else arrays["tokens"].astype(float)
        means = (rows / 1000).sum(axis=1) / weights.sum()
        return {
            (int(rank), float(rate), int(seed)): float(mean)
            for (rank, rate, seed), mean in zip(arrays["cells"].tolist(), means, strict=True)
        }


def build_cells(curve: GridCurve) -> dict[tuple[int, float, int], Cell]:
    """Build the cells of the validation split."""
    count = len(next(iter(curve.items.values())))
    weights = np.asarray(curve.item_tokens or np.ones(count), dtype=float)
    sign = -1.0 if curve.higher_is_better else 1.0
    return {
        key: Cell(
            "", float(np.sum(scores) / weights.sum()), sign * np.asarray(scores), weights, float(curve.higher_is_better)
        )
        for key, scores in curve.items.items()
    }


def iterate_cases(curve: GridCurve, tests: Values) -> Iterator[Case]:
    """Yield every choice of seeds at every margin."""
    all_cells = build_cells(curve)
    weights = next(iter(all_cells.values())).weights
    kind = infer_metric_kind(curve.metric, curve.higher_is_better, "token_loss" if (weights != 1).any() else "loss")
    for chosen in (seeds for size in SEEDS for seeds in combinations(curve.seeds, size)):
        unseen = [seed for seed in curve.seeds if seed not in chosen]
        cells = {key: cell for key, cell in all_cells.items() if key[2] in chosen}
        table = ScoreTable(curve.metric, curve.higher_is_better, cells, kind=kind)
        evidence = Evidence(table)
        if not unseen or evidence.lacks_uncertainty:
            continue
        true = {
            (rank, rate): float(np.mean([tests.get((rank, rate, seed), math.inf) for seed in unseen]))
            for rank, rate, _ in all_cells
        }
        by_component = [Evidence(table) for _ in COMPONENTS]
        for component_evidence, component in zip(by_component, COMPONENTS, strict=True):
            component_evidence.noise = replace(NOISE, learning_rates=component)
        best = min(true.values())
        for margin in MARGINS:
            tested = compare_ranks(evidence, margin)
            yield Case(
                grid=curve.name,
                kind="accuracies" if curve.higher_is_better else "losses",
                seeds=len(chosen),
                margin=margin,
                stated={
                    rank: [likely for e in by_component if (likely := e.compute_probability(rank, margin)) is not None]
                    for rank in evidence.contenders
                },
                excess={rank: true[rank, row.learning_rate] - best - 1e-9 for rank, row in evidence.contenders.items()},
                right=min(rank for (rank, _), loss in true.items() if loss - best <= margin + 1e-9),
                is_doubted=find_unexplained_rank(tested) is not None,
            )


def read_cases() -> list[Case]:
    """Return the cases of every stored grid."""
    paths = [path for pattern in FILES for path in sorted(GRIDS.glob(pattern))]
    curves = [(curve, path) for path in paths for curve in read_grids(path)]
    return [case for curve, path in curves for case in iterate_cases(curve, read_test_means(curve, path))]


def average_grids(values: Sequence[tuple[str, float]]) -> float:
    """Average within grids, then over grids."""
    by_grid: dict[str, list[float]] = {}
    for grid, value in values:
        by_grid.setdefault(grid, []).append(value)
    return float(np.mean([np.mean(grid_values) for grid_values in by_grid.values()]))


def compute_brier_score(cases: Sequence[Case], component: int) -> float:
    return average_grids(
        [(case.grid, (likely - is_true) ** 2) for case in cases for likely, is_true in case.list_events(component)]
    )


def fit_component(cases: Sequence[Case]) -> int:
    """Return the index of the component with the lowest mean Brier score of one and two seeds."""
    by_seeds = [[case for case in cases if case.seeds == seeds] for seeds in FITTED_SEEDS]
    scores = [sum(compute_brier_score(group, index) for group in by_seeds) for index in range(len(COMPONENTS))]
    return int(np.argmin(scores))


def compute_mixture_score(cases: Sequence[Case]) -> float:
    """Compute the Brier score of (1 - e) p + e q, with e and q fitted to the other grids."""

    def list_rows(grids: set[str]) -> np.ndarray[Any, Any]:
        rows = [(likely, is_true) for case in cases if case.grid in grids for likely, is_true in case.list_events(0)]
        return np.array(rows, dtype=float)

    grids, scores = {case.grid for case in cases}, []
    for grid in sorted(grids):
        stated, true = list_rows(grids - {grid}).T
        fits = []
        for share in MIXTURES:
            constant = np.clip(np.mean(true - (1 - share) * stated) / share, 0, 1) if share else 0.0
            fits.append((float(np.mean(((1 - share) * stated + share * constant - true) ** 2)), share, constant))
        _, share, constant = min(fits)
        stated, true = list_rows({grid}).T
        scores.append(float(np.mean(((1 - share) * stated + share * constant - true) ** 2)))
    return float(np.mean(scores))


def measure_bins(cases: Sequence[Case], components: Mapping[str, int]) -> list[dict[str, Any]]:
    """Compare stated probabilities with the shares that came true. `components` has the index for each grid."""
    events = [(case.grid, *event) for case in cases for event in case.list_events(components[case.grid])]
    rows = []
    for low, high in pairwise(BINS):
        inside = [event for event in events if low <= event[1] < high or high == event[1] == 1.0]
        outcomes: dict[str, list[float]] = {}
        for grid, _, is_true in inside:
            outcomes.setdefault(grid, []).append(float(is_true))
        if inside:
            stated, interval = float(np.mean([likely for _, likely, _ in inside])), resample_cases(outcomes)
            holds = interval["low"] <= stated <= interval["high"]
            rows.append({"stated": round(stated, 3), **interval, "count": len(inside), "holds": holds})
    return rows


def measure_answers(cases: Sequence[Case], components: Mapping[str, int], confidence: float) -> dict[str, float]:
    """Return the shares of cases that are answered, answered with too small a rank, and answered exactly."""
    answers = [(case, case.answer(confidence, components[case.grid])) for case in cases]
    return {
        "answered": average_grids([(case.grid, answer is not None) for case, answer in answers]),
        "too small": average_grids(
            [(case.grid, answer is not None and answer < case.right) for case, answer in answers]
        ),
        "exact": average_grids([(case.grid, answer == case.right) for case, answer in answers]),
        "regret": average_grids(
            [
                (case.grid, 0.0 if answer is None else max(0.0, case.excess[answer] - case.margin))
                for case, answer in answers
            ]
        ),
    }


def count_doubts(cases: Sequence[Case], components: Mapping[str, int]) -> dict[str, int]:
    """Count answers, and how many of them are too small."""
    answers = [
        answer < case.right
        for case in cases
        if (answer := case.answer(DEFAULT_CONFIDENCE, components[case.grid])) is not None
    ]
    return {"answers": len(answers), "too small": sum(answers)}


def measure(cases: Sequence[Case]) -> dict[str, Any]:
    """Fit the component and measure the probabilities and answers, each grid by the component of the other grids."""
    result: dict[str, Any] = {"grids": {}, "learning_rates": {}, "brier": {}, "bins": {}}
    components: dict[str, int] = {}
    for kind in ("losses", "accuracies"):
        of_kind = [case for case in cases if case.kind == kind]
        grids = sorted({case.grid for case in of_kind})
        components |= {grid: fit_component([case for case in of_kind if case.grid != grid]) for grid in grids}
        result["grids"][kind] = {grid: COMPONENTS[components[grid]] for grid in grids}
        result["learning_rates"][kind] = COMPONENTS[fit_component(of_kind)]
        for seeds in SEEDS:
            chosen = [case for case in of_kind if case.seeds == seeds]
            name = f"{kind}, {seeds} seed{'s' * (seeds > 1)}"
            scores = [
                (case.grid, (likely - is_true) ** 2)
                for case in chosen
                for likely, is_true in case.list_events(components[case.grid])
            ]
            result["brier"][name] = {
                "without": compute_brier_score(chosen, 0),
                "mixture": compute_mixture_score(chosen),
                "with": average_grids(scores),
                "by component": {f"{value:g}": compute_brier_score(chosen, i) for i, value in enumerate(COMPONENTS)},
            }
            result["bins"][name] = {
                "without": measure_bins(chosen, dict.fromkeys(grids, 0)),
                "with": measure_bins(chosen, components),
            }
    result["answers"] = {
        f"{seeds} seed{'s' * (seeds > 1)}": {
            name: {
                f"{confidence:g}": measure_answers([case for case in cases if case.seeds == seeds], indices, confidence)
                for confidence in CONFIDENCES
            }
            for name, indices in (("without", dict.fromkeys(components, 0)), ("with", components))
        }
        for seeds in SEEDS
    }
    by_confidence = result["answers"]["2 seeds"]["with"]
    result["confidence"] = max(c for c in CONFIDENCES if by_confidence[f"{c:g}"]["answered"] >= ANSWERED)
    result["larger rank worse"] = {
        f"{seeds} seed{'s' * (seeds > 1)}, {'doubted' if is_doubted else 'others'}": count_doubts(
            [case for case in cases if (case.seeds, case.is_doubted) == (seeds, is_doubted)], components
        )
        for seeds in SEEDS
        for is_doubted in (True, False)
    }
    return result


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw the probabilities of losses against the shares that came true, and answered against too small."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    bins, answers = figure.subplots(1, 2)
    for name, marker in (("without", "o"), ("with", "s")):
        rows = result["bins"]["losses, 1 seed"][name]
        true = [row["true"] for row in rows]
        errors = [[row["true"] - row["low"] for row in rows], [row["high"] - row["true"] for row in rows]]
        bins.errorbar(
            [row["stated"] for row in rows],
            true,
            errors,
            fmt=f"{marker}-",
            markersize=4,
            capsize=2,
            label=f"{name} the component",
        )
        for seeds, line in (("1 seed", "-"), ("2 seeds", "--")):
            by_confidence = result["answers"][seeds][name]
            shares = [[100 * row[column] for row in by_confidence.values()] for column in ("answered", "too small")]
            answers.plot(*shares, f"{marker}{line}", markersize=3, label=f"{seeds}, {name} the component")
    for seeds in ("1 seed", "2 seeds"):
        row = result["answers"][seeds]["with"][f"{result['confidence']:g}"]
        answers.plot(100 * row["answered"], 100 * row["too small"], "k*", markersize=9)
    bins.plot([0, 1], [0, 1], "k:", linewidth=1)
    bins.set(xlabel="stated probability", ylabel="share that came true", title="losses, one seed")
    answers.set(xlabel="answered, %", ylabel="answered with too small a rank, %")
    answers.set_title(
        f"confidence {CONFIDENCES[0]:g} (right) to {CONFIDENCES[-1]:g}; star: {result['confidence']:g}", fontsize=10
    )
    for axes in (bins, answers):
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def round_numbers(value: Any) -> Any:
    """Round all numbers to four digits after the point."""
    if isinstance(value, dict):
        return {key: round_numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [round_numbers(inner) for inner in value]
    return round(value, 4) if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", action="store_true")
    if not parser.parse_args().picture:
        result = {"machine": describe_machine(), **measure(read_cases())}
        RESULT.write_text(json.dumps(round_numbers(result), indent=1) + "\n", encoding="utf-8")
    draw(json.loads(RESULT.read_text(encoding="utf-8")), PICTURE)


if __name__ == "__main__":
    main()
