"""Judge the locked grids, once: the primary endpoints of `README.md`.

python -m benchmarks.learning_rate.judge                 # writes judged.json; refuses while hashes differ or grids are missing
python -m benchmarks.learning_rate.judge --rehearse OUT  # the same on the files of a folder; writes nothing
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.learning_rate.lock import CODE, GRIDS, HERE, hash_file, read_lock
from benchmarks.learning_rate.policies import (
    PRIMARY,
    Choice,
    Key,
    Measured,
    SeedTable,
    resample_grids,
)

JUDGED = HERE / "judged.json"
MARGINS = (0.005, 0.02, 0.05)
MIN_GRIDS, MIN_CAUSAL, MIN_BASES, MIN_SEEDS = 8, 4, 3, 3
MAX_EXCESS, MAX_RANK, MAX_EXCEEDING = 0.01, 8, 0.05
BINS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
DIVERGED = 65535
CAUSAL_BASES = {
    "answers": "SmolLM2",
    "descriptions": "SmolLM2",
    "usages": "SmolLM2",
    "replies": "SmolLM2",
    "words": "Gemma",
    "dialogues": "Gemma",
}
ENCODER_BASES = {"roles": "MiniLM-L6", "word_classes": "MiniLM-L6", "speakers": "MiniLM-L3", "languages": "MiniLM-L3"}
BASES = CAUSAL_BASES | ENCODER_BASES


def read_seed(path: Path) -> SeedTable:
    """Read a file of `train_grids`."""
    name, _, seed = path.stem.rpartition("_")
    with np.load(path) as arrays:
        records = json.loads(str(arrays["records"]))
        weights = arrays["weights_validation"].astype(float), arrays["weights_test"].astype(float)
        groups = arrays["groups_validation"], arrays["groups_test"]
        validation, test = arrays["validation"], iter(arrays["test"])
    adapters = {}
    for record, losses in zip(records, validation, strict=True):
        kind = record["kind"].replace("long checkpoint", "long").replace("checkpoint", "trained")
        key = Key(
            kind,
            record["rank"],
            record["rate"],
            record.get("trained", record["steps"]) / record["steps"],
            record.get("with"),
        )
        scored, mean = convert_losses(losses, weights[0])
        on_test, test_mean = convert_losses(next(test), weights[1]) if record["test"] else (None, math.nan)
        adapters[key] = Measured(scored, mean, on_test, test_mean)
    return SeedTable(name, int(seed), adapters, weights[0], groups[0], weights[1], groups[1])


def convert_losses(
    thousandths: np.ndarray[Any, Any], weights: np.ndarray[Any, Any]
) -> tuple[np.ndarray[Any, Any], float]:
    """Return losses in nats, and their mean per label; infinite where one is not finite."""
    losses = thousandths / 1000
    return losses, math.inf if (thousandths == DIVERGED).any() else float(losses.sum() / weights.sum())


def find_refusal(files: Sequence[Path]) -> str | None:
    """Return why the judgement cannot be made now."""
    if JUDGED.exists():
        return "the grids have judged: judged.json is there"
    locks = read_lock()["grids"]
    differing = [file.name for file in files if locks.get(file.name, {}).get("sha256") != hash_file(file)]
    missing = [name for name in locks if not (GRIDS / name).exists()]
    if differing or missing:
        return f"files that differ from their locks: {differing}; locked files that are missing: {missing}"
    seeds: dict[str, int] = {}
    for file in files:
        seeds[file.stem.rpartition("_")[0]] = seeds.get(file.stem.rpartition("_")[0], 0) + 1
    complete = [name for name, count in seeds.items() if count >= MIN_SEEDS]
    causal, bases = [name for name in complete if name in CAUSAL_BASES], {BASES[name] for name in complete}
    if len(complete) < MIN_GRIDS or len(causal) < MIN_CAUSAL or len(bases) < MIN_BASES:
        return f"{len(complete)} grids with {MIN_SEEDS} seeds, {len(causal)} of them causal, on {len(bases)} bases: {MIN_GRIDS}, {MIN_CAUSAL} and {MIN_BASES} are needed"
    return None


def run_policy(name: str, tables: Sequence[SeedTable]) -> Iterator[tuple[SeedTable, float, Choice | None]]:
    """Yield the policy's choice for each seed and margin."""
    for table in tables:
        for margin in MARGINS:
            yield table, margin, PRIMARY[name](table, margin)


def measure_difference(name: str, tables: Sequence[SeedTable]) -> dict[str, Any]:
    """Compare a policy with "16, rate tuned by whole trainings", by adapters on the test split."""
    baseline = "16, rate tuned by whole trainings"
    differences: dict[str, list[float]] = {}
    ranks, costs, failed = [], [], 0
    for (table, _, choice), (_, _, other) in zip(run_policy(name, tables), run_policy(baseline, tables), strict=True):
        if choice is None or other is None:
            failed += 1
            continue
        difference = table.adapters[choice.key].test_mean - table.adapters[other.key].test_mean
        differences.setdefault(table.grid, []).append(difference)
        ranks.append(choice.key.rank)
        costs.append(choice.trainings / other.trainings)
    by_grid = {grid: round(float(np.mean(values)), 5) for grid, values in sorted(differences.items())}
    return resample_grids(differences) | {
        "median rank": median(ranks),
        "cost": round(float(np.mean(costs)), 3),
        "failed": failed,
        "by grid": by_grid,
    }


def measure_exceeding(tables: Sequence[SeedTable]) -> dict[str, Any]:
    """Count the truncated adapters of `--goal adapter` that lose more than the margin on the test split, against the whole adapter."""
    exceeding: dict[str, list[float]] = {}
    for table, margin, choice in run_policy("adapter", tables):
        if choice is not None and choice.whole is not None and choice.key != choice.whole:
            difference = table.adapters[choice.key].test_mean - table.adapters[choice.whole].test_mean
            exceeding.setdefault(table.grid, []).append(float(difference > margin))
    values = [value for found in exceeding.values() for value in found]
    return resample_grids(exceeding) | {"share": round(float(np.mean(values)), 4), "truncated": len(values)}


def measure_calibration(tables: Sequence[SeedTable]) -> dict[str, Any]:
    """Compare the stated probability that a rank is enough with what other seeds show on the test split.

    It came true where the rank, at the learning rate that the decision names, is within the margin of the best rank and learning rate in the mean of the other seeds.
    """
    from benchmarks.learning_rate.stated import state_probabilities

    by_grid: dict[str, list[SeedTable]] = {}
    for table in tables:
        by_grid.setdefault(table.grid, []).append(table)
    stated: list[tuple[str, float, bool]] = []
    for grid, members in by_grid.items():
        for table in members:
            others = [member.trained() for member in members if member is not table]
            truth = {cell: float(np.mean([other[cell].test_mean for other in others])) for cell in table.trained()}
            for margin in MARGINS:
                for cell, probability in state_probabilities(table, margin).items():
                    stated.append((grid, probability, truth[cell] - min(truth.values()) <= margin))
    bins = []
    for low, high in pairwise(BINS):
        inside = [item for item in stated if low <= item[1] < high or high == item[1] == 1.0]
        if inside:
            outcomes: dict[str, list[float]] = {}
            for grid, _, is_true in inside:
                outcomes.setdefault(grid, []).append(float(is_true))
            mean, interval = float(np.mean([item[1] for item in inside])), resample_cases(outcomes)
            bins.append(
                {
                    "stated": round(mean, 3),
                    **interval,
                    "count": len(inside),
                    "holds": interval["low"] <= mean <= interval["high"],
                }
            )
    brier = float(np.mean([(probability - is_true) ** 2 for _, probability, is_true in stated])) if stated else math.nan
    return {"bins": bins, "brier": round(brier, 4), "count": len(stated)}


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


def judge(tables: Sequence[SeedTable]) -> dict[str, Any]:
    """Measure every primary endpoint and say which hold."""
    adapter, best = measure_difference("adapter", tables), measure_difference("best-adapter", tables)
    exceeding, calibration = measure_exceeding(tables), measure_calibration(tables)
    holds = {
        "a": adapter["high"] < MAX_EXCESS and adapter["cost"] <= 0.5 and adapter["median rank"] <= MAX_RANK,
        "b": best["mean"] < 0 and best["high"] < 0,
        "c": exceeding["share"] <= MAX_EXCEEDING,
        "d": len(calibration["bins"]) == len(BINS) - 1 and all(entry["holds"] for entry in calibration["bins"]),
    }
    return {"a: adapter minus 16 tuned": adapter, "b: best-adapter minus 16 tuned": best, "c: truncations beyond the margin": exceeding,
            "d: stated probabilities": calibration, "holds": holds}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", type=Path, metavar="OUT")
    options = parser.parse_args()
    files = sorted((options.rehearse or GRIDS).glob("*.npz"))
    if options.rehearse is None and (reason := find_refusal(files)) is not None:
        print(f"judge: {reason}")
        return 2
    result = judge([read_seed(file) for file in files])
    result |= {"date": datetime.now(UTC).date().isoformat(), "files": [file.name for file in files]}
    result["code"] = {name: hash_file(HERE / name) for name in CODE}
    if options.rehearse is None:
        JUDGED.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
