"""Judge the locked rule once on the judged grids: python -m benchmarks.early_rates.judge [--rehearse].

`--rehearse` runs the same code on design grids that `complete.py` has measured, and stores nothing.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.early_rates.grids import BASELINE, JUDGED, RATES, TOP
from benchmarks.early_rates.lock import GRIDS, HERE, RULE, read_lock
from benchmarks.early_rates.rules import (
    DIVERGED,
    RULE_HANDOVER,
    Floats,
    GridTable,
    HandOver,
    Key,
    choose_as_before,
    choose_by_rule,
    hand_over_last,
    read_table,
    tune_by_whole_trainings,
)
from benchmarks.learning_rate.lock import hash_file
from benchmarks.learning_rate.train_grids import TRUNCATED_RANKS

JUDGED_FILE = HERE / "judged.json"
MIN_GRIDS = 30
SHARE = 0.01  # the margin, as a share of the gain
OTHER_SHARES = (0.02, 0.05)
Z = 1.6449  # one-sided 95%


def read_completed(path: Path) -> GridTable:
    """Read a grid with the values that `complete.py` measured."""
    table = read_table(path)
    with np.load(path.with_suffix(".completed.npz")) as arrays:
        records = json.loads(str(arrays["records"]))
        rows = list(zip(records, arrays["validation"], arrays["test"], strict=True))
    losses, test, test_losses = dict(table.losses), dict(table.test), dict(table.test_losses)
    for record, on_validation, on_test in rows:
        key = record["kind"], record["rank"], record["rate"], record["fraction"]
        if not (on_validation == DIVERGED).any() and not (on_test == DIVERGED).any():
            losses[key], test_losses[key] = on_validation / 1000, on_test / 1000
            test[key] = float(test_losses[key].sum() / table.test_weights.sum())
    return replace(table, losses=losses, test=test, test_losses=test_losses)


def measure_upper_bound(contrast: Floats, weights: Floats) -> float:
    """Return the one-sided 95% upper bound of the weighted mean of a contrast that is summed over each example's labels."""
    mean = contrast.sum() / weights.sum()
    residuals = contrast - mean * weights
    return float(mean + Z * math.sqrt(len(weights) / (len(weights) - 1) * (residuals**2).sum()) / weights.sum())


def truncate_within(table: GridTable, whole: Key, share: float) -> Key:
    """Return the smallest truncation that keeps the gain but for `share`, testing downward on all validation examples."""
    base = table.losses[find_base(table, whole)]
    chosen = whole
    for rank in sorted(TRUNCATED_RANKS, reverse=True):
        key = f"truncated {whole[0]}", rank, whole[2], whole[3]
        if key not in table.losses:
            break
        contrast = (table.losses[key] - table.losses[whole]) - share * (base - table.losses[whole])
        if measure_upper_bound(contrast, table.weights) >= 0:
            break
        chosen = key
    return chosen


def find_base(table: GridTable, whole: Key) -> Key:
    """Return the base whose loss the training gained over: a zero update, with the trained classifier where there is one."""
    return ("head", TOP, whole[2], 1.0) if table.classes else ("base", 0, 0.0, 0.0)


def resample(values: Sequence[float]) -> dict[str, Any]:
    """Return mean and 95% interval over grids, median and worst."""
    array = np.array(values)
    picks = np.random.default_rng(0).integers(len(array), size=(10_000, len(array)))
    low, high = np.quantile(array[picks].mean(1), (0.025, 0.975))
    return {"mean": round(float(array.mean()), 5), "low": round(float(low), 5), "high": round(float(high), 5),
            "median": round(float(np.median(array)), 5), "worst": round(float(array.max()), 5), "grids": len(array)}  # fmt: skip


def measure_regret(table: GridTable, rate: float, hand_over: HandOver) -> float:
    """Return the test loss of what the rate hands over at rank 64 minus that of the best of the four rates."""
    finished = [table.test.get(hand_over(table, TOP, other), math.inf) for other in RATES]
    return table.test.get(hand_over(table, TOP, rate), table.base_test) - min(finished)


def judge(tables: Sequence[GridTable]) -> dict[str, Any]:
    rows: dict[str, dict[str, float]] = {}
    ranks: dict[str, int] = {}
    rates: dict[str, list[float]] = {}
    for table in tables:
        rate, early_rate = choose_by_rule(table), choose_by_rule(table, 0.125)
        whole = RULE_HANDOVER(table, TOP, rate)
        adapter = truncate_within(table, whole, SHARE)
        tuned = table.test[tune_by_whole_trainings(table, BASELINE, RULE_HANDOVER)]
        tuned_last = table.test[tune_by_whole_trainings(table, BASELINE, hand_over_last)]
        early = truncate_within(table, RULE_HANDOVER(table, TOP, early_rate), SHARE)
        gain = table.test[find_base(table, whole)] - table.test[whole]
        before = table.test.get(choose_as_before(table), table.base_test)
        last = table.test.get(hand_over_last(table, TOP, rate), table.base_test)
        ranks[table.grid.name] = adapter[1]
        best_rate = min(RATES, key=lambda other: table.test.get(RULE_HANDOVER(table, TOP, other), math.inf))
        rates[table.grid.name] = [rate, early_rate, best_rate]
        row = {
            "a: adapter minus 16 tuned, both hand over their best evaluation": table.test[adapter] - tuned,
            "a, the last evaluations: rank 64 minus 16 tuned": last - tuned_last,
            "adapter minus 16 tuned that hands over its last evaluation": table.test[adapter] - tuned_last,
            "b: regret of the rate at rank 64": measure_regret(table, rate, RULE_HANDOVER),
            "b, the last evaluations": measure_regret(table, rate, hand_over_last),
            "the rule minus the rule of before, rank 64": table.test[whole] - before,
            "d: the same at an eighth minus 16 tuned": table.test[early] - tuned,
            "16 tuned: best minus last evaluation": tuned - tuned_last,
            "truncation": table.test[adapter] - table.test[whole],
            "gain": gain,
        }
        if table.grid.is_repeated:
            row["c: the rule minus the rule of before, repeated rows"] = table.test[whole] - before
        for share in (SHARE, *OTHER_SHARES):
            key = truncate_within(table, whole, share)
            row[f"share of the gain lost at {share:.0%}"] = (table.test[key] - table.test[whole]) / gain
            row[f"rank at {share:.0%}"] = key[1]
        rows[table.grid.name] = row
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    summary = {name: resample([row[name] for row in rows.values() if name in row]) for name in names}
    families = {
        "causal, last block": [t for t in tables if not t.classes and t.grid.blocks == 1],
        "causal, last two blocks": [t for t in tables if t.grid.blocks == 2],
        "classifiers": [t for t in tables if t.classes],
        "repeated rows": [t for t in tables if t.grid.is_repeated],
        "no repeated rows": [t for t in tables if not t.grid.is_repeated],
    }
    a, b = summary["a: adapter minus 16 tuned, both hand over their best evaluation"], summary["b: regret of the rate at rank 64"]  # fmt: skip
    c = summary.get("c: the rule minus the rule of before, repeated rows", {"high": math.inf})
    kept = {f"{share:.0%}": count_exceeding(rows, share) for share in (SHARE, *OTHER_SHARES)}
    return {
        "holds": {"a": a["high"] < 0.01 and a["mean"] < 0.003, "b": b["mean"] <= 0.005 and b["worst"] <= 0.03, "c": c["high"] < 0},
        "summary": summary,
        "median rank": float(np.median(list(ranks.values()))),
        "rate within .005 of the best": f"{sum(row['b: regret of the rate at rank 64'] <= 0.005 for row in rows.values())} of {len(rows)}",
        "margin exceeded on the test split": kept,
        "families": {name: {key: resample([rows[t.grid.name][key] for t in members]) for key in names[:6]} for name, members in families.items() if members},
        "rates (rule, at an eighth, best)": rates,
        "by grid": {grid: {name: round(value, 5) for name, value in row.items()} for grid, row in rows.items()},
    }  # fmt: skip


def count_exceeding(rows: Mapping[str, Mapping[str, float]], share: float) -> str:
    lost = [row[f"share of the gain lost at {share:.0%}"] for row in rows.values() if row["gain"] > 0]
    return f"{sum(value > share for value in lost)} of {len(lost)}"


def find_refusal(names: Sequence[str]) -> str | None:
    """Return why the judgement cannot be made now."""
    lock = read_lock()
    if JUDGED_FILE.exists():
        return "the grids have judged: judged.json is there"
    if lock["rule"] != {name: hash_file(HERE / name) for name in RULE}:
        return "the rule differs from its lock"
    differing = [name for name in names if lock["grids"].get(f"{name}.npz", {}).get("sha256") != hash_file(GRIDS / f"{name}.npz")]  # fmt: skip
    return f"files that differ from their locks: {differing}" if differing else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", nargs="*", metavar="GRID")
    options = parser.parse_args()
    names = options.rehearse or [grid.name for grid in JUDGED if (GRIDS / f"{grid.name}.completed.npz").exists()]
    if options.rehearse is None and (reason := find_refusal(names)) is not None:
        print(f"judge: {reason}")
        return 2
    result = judge([read_completed(GRIDS / f"{name}.npz") for name in names])
    missing = [grid.name for grid in JUDGED if grid.name not in names]
    result |= {"date": datetime.now(UTC).date().isoformat(), "grids": len(names), "not trained in time": missing, "planned": MIN_GRIDS}  # fmt: skip
    if options.rehearse is None:
        JUDGED_FILE.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
