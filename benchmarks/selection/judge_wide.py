"""Judge once on the wide grids: the value of more held-out examples, and the decision by probability (`wide/README.md`).

python -m benchmarks.selection.judge_wide --commit COMMIT_THEY_WERE_TRAINED_FROM    # writes judged_wide.json and its picture
python -m benchmarks.selection.judge_wide --rehearse FOLDER                         # the same on grids of that folder; writes nothing
python -m benchmarks.selection.judge_wide --table                                   # prints judged_wide.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import describe_machine
from benchmarks.results import read_bytes, read_json
from benchmarks.selection import compare
from rightrank.decision.rule import decide_table
from rightrank.decision.table import Cell, ScoreTable
from rightrank.schema.metrics import MetricKind, infer_metric_kind
from rightrank.schema.trials import Floats

FOLDER = compare.HERE / "wide"
JUDGED = compare.HERE / "judged_wide.json"
PICTURE = compare.HERE / "answered_against_too_small.svg"
MARGINS = (0.005, 0.02, 0.05)
SEEN, TRUTH = (0, 1, 2), (3, 4, 5)
FEW = 200
ROTATED = (200, 500)  # examples for each seed of a rotating split
CONFIDENCES = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
RESAMPLES = 2000
ANSWERS = "answers"  # scored by exact match
BINS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)

CellKey = tuple[int, float]


@dataclass(frozen=True)
class WideGrid:
    """Oriented values (lower is better) of every test example for every adapter."""

    name: str
    metric: str  # loss, or accuracy for any share of correct answers
    values: Mapping[tuple[int, float, int], Floats]  # by rank, learning rate and seed: [examples], times the weight
    weights: Floats  # [examples] tokens, or ones
    checkpoints: Mapping[str, Any]
    losses: Mapping[str, Any]

    @property
    def kind(self) -> MetricKind:
        return infer_metric_kind(
            self.metric, self.metric != "loss", "token_loss" if (self.weights != 1).any() else "loss"
        )

    @cached_property
    def half_a(self) -> Any:
        return np.arange(0, len(self.weights), 2)

    @cached_property
    def half_b(self) -> Any:
        return np.arange(1, len(self.weights), 2)

    @property
    def ranks(self) -> list[int]:
        return sorted({rank for rank, _, _ in self.values})

    @property
    def keys(self) -> list[CellKey]:
        return sorted({(rank, rate) for rank, rate, _ in self.values})

    def compute_mean(self, key: CellKey, seeds: Sequence[int], examples: Any) -> float:
        """Average over the examples, then over the seeds; infinite if a training diverged."""
        weight = self.weights[examples].sum()
        seed_means = [self.values[*key, seed][examples].sum() / weight for seed in seeds if (*key, seed) in self.values]
        return float(np.mean(seed_means)) if len(seed_means) == len(seeds) else math.inf

    def compute_means(self, seeds: Sequence[int], examples: Any) -> dict[CellKey, float]:
        return {key: self.compute_mean(key, seeds, examples) for key in self.keys}

    @cached_property
    def truth(self) -> dict[CellKey, float]:
        return self.compute_means(TRUTH, self.half_b)

    def build_table(self, seeds: Sequence[int], examples: Any) -> ScoreTable:
        """Return the table that `decide` reads for these seeds and examples."""
        weights = self.weights[examples]
        cells = {}
        for (rank, rate, seed), values in self.values.items():
            if seed in seeds:
                sums = values[examples]
                mean = float(sums.sum() / weights.sum())
                value = -mean if self.metric != "loss" else mean
                cells[rank, rate, seed] = Cell(
                    f"{rank}-{rate:g}-{seed}", value, sums, weights, score_range=0.0 if self.metric == "loss" else 1.0
                )
        return ScoreTable(self.metric, self.metric != "loss", cells, kind=self.kind)


def find_arrays(file: Path) -> Path:
    """Return the file with the values of all test examples of a grid."""
    return file.with_name(file.name.partition(".")[0] + ".npz")


def read_grid(file: Path) -> WideGrid:
    """Read the grid from a JSON file and the `.npz` file next to it."""
    (curve,) = read_json(file)["curves"]
    arrays = np.load(find_arrays(file))
    name = file.name.partition(".")[0]
    by_score = curve["higher_is_better"] or name == ANSWERS
    rows = -arrays["scores"] / 1000 if by_score else arrays["losses"] / 1000
    tokens = arrays["tokens"].astype(float)
    values = {
        (int(rank), float(rate), int(seed)): row
        for (rank, rate, seed), row in zip(arrays["cells"].tolist(), rows, strict=True)
    }
    weights = np.ones_like(tokens) if by_score else tokens
    return WideGrid(name, "accuracy" if by_score else "loss", values, weights, curve["checkpoints"], curve["losses"])


def find_best_by_rank(means: Mapping[CellKey, float]) -> dict[int, CellKey]:
    """Return each rank's best learning rate."""
    return {rank: min((key for key in means if key[0] == rank), key=lambda key: means[key]) for rank, _ in means}


def find_smallest_rank(means: Mapping[CellKey, float], margin: float) -> CellKey:
    best = find_best_by_rank(means)
    lowest = min(means.values())
    return next(best[rank] for rank in sorted(best) if means[best[rank]] - lowest <= margin + 1e-9)


def compute_regret(grid: WideGrid, key: CellKey, margin: float) -> float:
    return max(0.0, grid.truth[key] - min(grid.truth.values()) - margin)


def compute_deviations(grid: WideGrid, count: int) -> list[float]:
    """Return the deviations of one-seed differences from the highest rank, relative to the other seeds and examples."""
    examples, deviations = grid.half_a[:count], []
    for seed in SEEN:
        rates = find_best_by_rank(grid.compute_means((seed,), grid.half_a))
        top = rates[max(grid.ranks)]
        for rank in grid.ranks[:-1]:
            difference = grid.compute_mean(rates[rank], (seed,), examples) - grid.compute_mean(top, (seed,), examples)
            true = grid.truth[rates[rank]] - grid.truth[top]
            if math.isfinite(difference) and math.isfinite(true):
                deviations.append(difference - true)
    return deviations


@dataclass(frozen=True)
class Case:
    """An answer with the truth."""

    grid: str
    margin: float
    seeds: int
    exact: bool
    too_small: bool
    regret: float
    answered: bool = True
    is_loss: bool = True


def build_case(grid: WideGrid, key: CellKey, margin: float, seeds: int, answered: bool = True) -> Case:
    true = find_smallest_rank(grid.truth, margin)[0]
    return Case(
        grid.name,
        margin,
        seeds,
        key[0] == true,
        key[0] < true,
        compute_regret(grid, key, margin),
        answered,
        grid.metric == "loss",
    )


Pick = Callable[[WideGrid, Sequence[int], Any, float], tuple[CellKey, bool]]  # with whether the pick is an answer


def pick_by_grid(grid: WideGrid, seeds: Sequence[int], examples: Any, margin: float) -> tuple[CellKey, bool]:
    return find_smallest_rank(grid.compute_means(seeds, examples), margin), True


def pick_always(rank: int) -> Pick:
    def pick(grid: WideGrid, seeds: Sequence[int], examples: Any, margin: float) -> tuple[CellKey, bool]:
        return find_best_by_rank(grid.compute_means(seeds, examples))[rank], True

    return pick


def pick_by_decision(confidence: float | None = None) -> Pick:
    """Return a pick that uses the answer of `decide`, or its recommended rank if it is undecided."""

    def pick(grid: WideGrid, seeds: Sequence[int], examples: Any, margin: float) -> tuple[CellKey, bool]:
        options = {} if confidence is None else {"confidence": confidence}
        decision = decide_table(grid.build_table(seeds, examples), margin, **options)
        rank = decision.best_available_rank
        rates = {evidence.rank: evidence.learning_rate for evidence in decision.ranks}
        rate = rates.get(rank) or find_best_by_rank(grid.compute_means(seeds, examples))[rank][1]
        return (rank, rate), decision.rank is not None

    return pick


def iterate_cases(grids: Sequence[WideGrid], pick: Pick, count: int | None, seeds: int) -> Iterator[Case]:
    """Yield a case for every grid, margin and choice of seeds, on the first `count` examples of half A."""
    for grid in grids:
        for chosen in combinations(SEEN, seeds):
            for margin in MARGINS:
                key, answered = pick(grid, chosen, grid.half_a[:count], margin)
                yield build_case(grid, key, margin, seeds, answered)


def compute_share(cases: Sequence[Case], get_value: Callable[[Case], float]) -> dict[str, Any]:
    """Return the mean, with a 95% interval that resamples grids."""
    names = sorted({case.grid for case in cases})
    if not names:
        return {"mean": None, "cases": 0}
    sums = np.array([[sum(get_value(c) for c in cases if c.grid == n), sum(c.grid == n for c in cases)] for n in names])
    picks = np.random.default_rng(0).integers(len(names), size=(RESAMPLES, len(names)))
    means = sums[picks, 0].sum(1) / sums[picks, 1].sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    mean = sums[:, 0].sum() / sums[:, 1].sum()
    return {
        "mean": round(float(mean), 5),
        "low": round(float(low), 5),
        "high": round(float(high), 5),
        "cases": len(cases),
    }


def build_row(cases: Sequence[Case]) -> dict[str, Any]:
    """Return the shares exact, too small, answered, and too small among the answered, and the regret, separately for losses and shares."""
    answered = [case for case in cases if case.answered]
    return {
        "exact": compute_share(cases, lambda case: case.exact),
        "too small": compute_share(cases, lambda case: case.too_small),
        "answered": compute_share(cases, lambda case: case.answered),
        "too small of answered": compute_share(answered, lambda case: case.too_small),
        "regret, nats": compute_share([case for case in cases if case.is_loss], lambda case: case.regret),
        "regret, share of right answers": compute_share(
            [case for case in cases if not case.is_loss], lambda case: case.regret
        ),
    }


def measure_calibration(grids: Sequence[WideGrid], seeds: int) -> dict[str, Any]:
    """Compare the stated probabilities with how often the rank is within the margin of the best on other seeds and examples."""
    forecasts: list[tuple[str, float, bool]] = []
    for grid in grids:
        for chosen in combinations(SEEN, seeds):
            for margin in MARGINS:
                lowest = min(grid.truth.values())
                for evidence in decide_table(grid.build_table(chosen, grid.half_a), margin).ranks:
                    if evidence.rank > 0 and evidence.probability is not None and evidence.learning_rate is not None:
                        true = grid.truth[evidence.rank, evidence.learning_rate] - lowest <= margin
                        forecasts.append((grid.name, evidence.probability, true))
    bins = []
    for low, high in pairwise(BINS):
        inside = [item for item in forecasts if low <= item[1] < high or (high == 1.0 and item[1] == 1.0)]
        if inside:
            bins.append(
                {
                    "stated": round(float(np.mean([item[1] for item in inside])), 3),
                    "true": round(float(np.mean([item[2] for item in inside])), 3),
                    "count": len(inside),
                }
            )
    brier = float(np.mean([(probability - true) ** 2 for _, probability, true in forecasts])) if forecasts else None
    return {"brier": brier and round(brier, 4), "bins": bins, "count": len(forecasts)}


def judge_rate_rule(grids: Sequence[WideGrid]) -> dict[str, Any]:
    """Judge the choice of the highest rank's learning rate after an eighth of the steps, with and without a second comparison at a quarter."""
    plain, compared, changed, rows = [], [], 0, []
    for grid in grids:
        looks = grid.losses if grid.losses else grid.checkpoints
        top = str(max(grid.ranks))
        sign = -1.0 if grid.metric != "loss" and not grid.losses else 1.0
        for seed in SEEN:

            def at(fraction: str, seed: int = seed) -> dict[float, float]:
                return {float(r): sign * v[str(seed)] for r, v in looks[fraction][top].items() if str(seed) in v}  # noqa: B023

            eighth, quarter = at("0.125"), at("0.25")
            shared = sorted(set(eighth) & set(quarter))
            if len(shared) < 2:
                continue
            winner = min(shared, key=lambda rate: eighth[rate])
            chosen = winner
            lower = [rate for rate in shared if rate < winner]
            if min(shared, key=lambda rate: quarter[rate]) != winner and lower and quarter[lower[-1]] < quarter[winner]:
                chosen = lower[-1]
            best = min(grid.truth[int(top), rate] for rate in shared)
            plain.append(grid.truth[int(top), winner] - best)
            compared.append(grid.truth[int(top), chosen] - best)
            changed += chosen != winner
            rows.append((grid.name, compared[-1] - plain[-1]))
    names = sorted({name for name, _ in rows})
    by = {name: round(float(np.mean([d for n, d in rows if n == name])), 4) for name in names}
    return {"regret at an eighth": round(float(np.mean(plain)), 5), "with a quarter": round(float(np.mean(compared)), 5),
            "changed": changed, "of": len(plain), "change by grid": by}  # fmt: skip


def judge_rotation(grids: Sequence[WideGrid]) -> dict[str, Any]:
    """Compare seeds on separate examples with all seeds on the same examples, by the full grid's pick and its deviation."""
    result: dict[str, Any] = {}
    for count in ROTATED:
        for seeds in (2, 3):
            cases: dict[str, list[Case]] = {"same": [], "rotated": []}
            errors: dict[str, list[float]] = {"same": [], "rotated": []}
            for grid in grids:
                for chosen in combinations(SEEN, seeds):
                    folds = [grid.half_a[index * count : (index + 1) * count] for index in range(seeds)]
                    ways = {"same": [folds[0]] * seeds, "rotated": folds}
                    for design, seed_examples in ways.items():
                        means = {
                            key: float(np.mean([grid.compute_mean(key, (s,), examples) for s, examples in zip(chosen, seed_examples, strict=True)]))
                            for key in grid.keys
                        }  # fmt: skip
                        cases[design] += [
                            build_case(grid, find_smallest_rank(means, margin), margin, seeds) for margin in MARGINS
                        ]
                        rates = find_best_by_rank(grid.compute_means(chosen, grid.half_a))
                        top = rates[max(grid.ranks)]
                        errors[design] += [
                            means[rates[rank]] - means[top] - (grid.truth[rates[rank]] - grid.truth[top])
                            for rank in grid.ranks[:-1]
                        ]
            result[f"{seeds} seeds, {count} examples"] = {
                design: build_row(cases[design]) | {"deviation": round(_compute_rms(errors[design]), 5)}
                for design in cases
            }
    return result


def _compute_rms(values: Sequence[float]) -> float:
    return float(np.sqrt(np.mean(np.square([value for value in values if math.isfinite(value)]))))


def judge(grids: Sequence[WideGrid]) -> dict[str, Any]:
    """Judge every endpoint of `wide/README.md`."""
    every = {"grids": [grid.name for grid in grids], "examples": {grid.name: len(grid.weights) for grid in grids}}
    ratio = {}
    for kind in ("loss", "accuracy"):
        of_kind = [grid for grid in grids if grid.metric == kind]
        few, many = ([value for grid in of_kind for value in compute_deviations(grid, count)] for count in (FEW, 10**9))
        by = {
            g.name: round(_compute_rms(compute_deviations(g, 10**9)) / _compute_rms(compute_deviations(g, FEW)), 3)
            for g in of_kind
        }
        ratio[kind] = {"200": round(_compute_rms(few), 5), "all of A": round(_compute_rms(many), 5), "ratio": round(_compute_rms(many) / _compute_rms(few), 3), "by grid": by}  # fmt: skip
    picks: dict[str, Pick] = {"the whole grid": pick_by_grid, "decide": pick_by_decision()}
    ranks = {rank for grid in grids for rank in grid.ranks}
    picks |= {f"always {rank}, rate tuned": pick_always(rank) for rank in (16, 64) if rank in ranks}
    rows = {
        f"{name}, {seeds} {'seed' if seeds == 1 else 'seeds'}, {'200' if count == FEW else 'all of A'}": build_row(
            list(iterate_cases(grids, pick, count, seeds))
        )
        for name, pick in picks.items()
        for seeds in (1, 2, 3)
        for count in (FEW, None)
    }
    curve = [
        {"confidence": confidence, "seeds": seeds, "examples": "200" if count == FEW else "all of A", **build_row(list(iterate_cases(grids, pick_by_decision(confidence), count, seeds)))}
        for confidence in CONFIDENCES
        for seeds in (1, 2, 3)
        for count in (FEW, None)
    ]  # fmt: skip
    return every | {
        "deviation": ratio,
        "picks": rows,
        "trade-off": curve,
        "calibration": {f"{seeds} seeds": measure_calibration(grids, seeds) for seeds in (1, 2)},
        "the rate": judge_rate_rule(grids),
        "rotation": judge_rotation(grids),
    }


def draw_trade_off(result: Mapping[str, Any], path: Path) -> None:
    """Plot the share answered against the share too small, one line for each number of seeds."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True)
    for axis, examples in zip(axes, ("200", "all of A"), strict=True):
        for seeds in (1, 2, 3):
            points = [p for p in result["trade-off"] if p["seeds"] == seeds and p["examples"] == examples]
            x = [point["answered"]["mean"] for point in points]
            y = [point["too small"]["mean"] for point in points]
            axis.plot(x, y, "o-", label=f"{seeds} seed{'s' if seeds > 1 else ''}")
        axis.set_title("200 examples" if examples == "200" else "about 2,000 examples")
        axis.set_xlabel("share of cases answered")
    axes[0].set_ylabel("share of cases too small")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def list_full_grids(folder: Path) -> tuple[list[Path], list[str]]:
    """Return the files of grids with every seed, and the names of the others."""
    files = sorted(folder.glob("*.json*"))
    ready = [file for file in files if not read_json(file)["curves"][0]["partial"]]
    return ready, [file.name.partition(".")[0] for file in files if file not in ready]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", help="that the grids were trained from")
    parser.add_argument("--rehearse", type=Path, metavar="FOLDER")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.build_table:
        print(json.dumps(json.loads(JUDGED.read_text()), indent=1))
        return 0
    if options.rehearse is None and JUDGED.exists():
        print(f"judge_wide: the wide grids judged on {json.loads(JUDGED.read_text())['date']}: they judge once")
        return 2
    files, partial = list_full_grids(options.rehearse or FOLDER)
    result = judge([read_grid(file) for file in files])
    if options.rehearse is not None:
        print(json.dumps(result, indent=1))
        return 0
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    head = {
        "machine": describe_machine(),
        "date": datetime.now(UTC).date().isoformat(),
        "judged by": commit,
        "trained from": options.commit,
        "sha256": {file.name: hashlib.sha256(read_bytes(file)).hexdigest() for f in files for file in (f, find_arrays(f))},
        "left out": partial,
    }  # fmt: skip
    JUDGED.write_text(json.dumps(head | result, indent=1) + "\n")
    draw_trade_off(result, PICTURE)
    print(json.dumps(result["picks"], indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
