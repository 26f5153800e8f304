"""Does the half-width that `select --dry-run` expects match the one that the run finds?

    python -m benchmarks.preflight.calibrate                        # judges, and writes calibration.json
    python -m benchmarks.preflight.calibrate --add NAME=RUN ...     # adds the cases of run folders to cases.json first
    python -m benchmarks.preflight.calibrate --grids                # adds those of the stored grids, with bases.json
    python -m benchmarks.preflight.calibrate --base NAME MODEL DATA --layers 28,29 --seq-len 48 --eval-items 96

A case is a decision on one choice of a grid's seeds: the widest `difference_high - difference` of its ranks, and what could be
known before, the number of validation examples, of seeds, and the spread of the base's own losses. The fit is the median of
the cases with one seed (spread) and, at that spread, of those with several (seed ratio), each task with the same weight. It is
judged on each grid by the fit to all other grids, and by the fit to the grids of other tasks. `within` counts predictions within
a factor of 1.5.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import machine
from benchmarks.results import store
from rightrank.decision import precision
from rightrank.decision.precision import NoiseKind, StoredNoise, base_spread, expected_precision
from rightrank.decision.rule import decide
from rightrank.decision.table import Cell, ScoreTable

HERE = Path(__file__).parent
CASES, BASES, OUT = HERE / "cases.json", HERE / "bases.json", HERE / "calibration.json"
GRIDS = HERE.parent / "selection"
FACTOR = 1.5
COLUMNS = ("other_grids", "other_tasks", "in_use")
RATIOS = np.geomspace(1e-4, 1.0, 161)
Case = dict[str, Any]
Cells = dict[tuple[int, float, int], list[float]]


def half_width(cells: Cells, tokens: Sequence[float], metric: str) -> float | None:
    """The widest of a decision; None where fewer than two ranks have a whole training."""
    weights = np.asarray(tokens, dtype=np.float64)
    sign = -1.0 if metric == "accuracy" else 1.0
    table = {
        key: Cell(str(key), sum(scores) / weights.sum(), sign * np.asarray(scores, dtype=np.float64), weights)
        for key, scores in cells.items()
    }
    if len({rank for rank, _, _ in table}) < 2:
        return None
    kind = "accuracy" if metric == "accuracy" else "token_loss"
    found = decide(ScoreTable(metric, metric == "accuracy", table, kind=kind), 0.01)
    return max(
        one.difference_high - one.difference
        for one in found.ranks
        if one.rank not in (0, found.reference_rank) and one.difference is not None and one.difference_high is not None
    )


def cases_of(
    name: str, kind: NoiseKind, cells: Cells, tokens: Sequence[float], base: float, steps: int
) -> Iterator[Case]:
    """One case for each choice of the seeds that every rank has."""
    metric = "accuracy" if kind == "scores" else "loss"
    ranks = {rank for rank, _, _ in cells}
    seeds = sorted({s for s in {seed for _, _, seed in cells} if {r for r, _, seed in cells if seed == s} == ranks})
    for count in range(1, len(seeds) + 1):
        for chosen in itertools.combinations(seeds, count):
            found = half_width({key: cell for key, cell in cells.items() if key[2] in chosen}, tokens, metric)
            if found is not None:
                yield {
                    "grid": name,
                    "task": name.split("_")[0],
                    "kind": kind,
                    "seeds": list(chosen),
                    "steps": steps,
                    "examples": len(tokens),
                    "base_spread": round(base, 5),
                    "half_width": round(found, 6),
                }


def cases_of_grids() -> Iterator[Case]:
    """Of the stored grids of `benchmarks/selection`; the base's losses are those of bases.json."""
    bases = json.loads(BASES.read_text(encoding="utf-8"))
    for file in ("real_grids.json", "seeded_grids.json"):
        for curve in json.loads((GRIDS / file).read_text(encoding="utf-8"))["curves"]:
            name, tokens = curve["id"], curve["item_tokens"]
            cells = {
                (int(rank), float(rate), int(seed)): losses
                for rank, by_rate in curve["item_losses"].items()
                for rate, by_seed in by_rate.items()
                for seed, losses in by_seed.items()
            }
            base = next(bases[key] for key in (name, *ALIKE.get(name, ())) if key in bases)
            kind: NoiseKind = "classes" if max(tokens) == 1 else "tokens"
            yield from cases_of(name, kind, cells, tokens, base_spread(base["losses"], base["tokens"]), _steps(curve))


def _steps(curve: Mapping[str, Any]) -> int:
    found: int = curve.get("steps") or curve["settings"]["max_steps"]
    return found


ALIKE = {
    "packages_20_steps": ("packages",),
    "packages_40_steps": ("packages",),
    "docstrings_40_steps": ("docstrings_demo",),
}
"""Grids with the same base and validation examples."""


def cases_of_run(name: str, folder: Path) -> Iterator[Case]:
    """Of the journal of a run, or of a grid in training."""
    lines = [json.loads(line) for line in (folder / "journal.jsonl").read_text(encoding="utf-8").splitlines()]
    trials = [line for line in lines if line["type"] == "trial_finished"]
    base = next(trial for trial in trials if trial["rank"] == 0)
    whole = [
        trial for trial in trials if trial["rank"] > 0 and trial["stop_at"] is None and trial["truncate_from"] is None
    ]
    tokens, steps = base["item_tokens"], max(trial["steps"] for trial in whole)
    cells = {(t["rank"], t["learning_rate"], t["seed"]): t["item_losses"] for t in whole}
    kind: NoiseKind = "classes" if max(tokens) == 1 else "tokens"
    if not name.endswith("_accuracy"):  # a grid whose losses are there already
        yield from cases_of(name, kind, cells, tokens, base_spread(base["item_losses"], tokens), steps)
    if base.get("item_correct"):
        correct = {(t["rank"], t["learning_rate"], t["seed"]): t["item_correct"] for t in whole}
        yield from cases_of(name, "scores", correct, tokens, 1.0, steps)


def fit(cases: Sequence[Case], kind: NoiseKind) -> StoredNoise:
    """The spread by the cases with one seed; the seed ratios by those with several, of losses together, each at its spread."""
    alike = ("scores",) if kind == "scores" else ("tokens", "classes")
    several = [case for case in cases if case["kind"] in alike and len(case["seeds"]) > 1]
    spreads = {one: _spread(cases, one) for one in {kind, *(case["kind"] for case in several)}}
    used = precision.STORED[kind]
    long = [case for case in several if case["steps"] >= precision.LONG_STEPS]
    short = [case for case in several if case["steps"] < precision.LONG_STEPS]
    return StoredNoise(
        spreads[kind],
        _ratio(long, spreads) if long else used.seed_ratio,
        _ratio(short, spreads) if short else used.short_seed_ratio,
    )


def _ratio(cases: Sequence[Case], spreads: Mapping[NoiseKind, float]) -> float:
    """At which the median of found over predicted is 1."""

    def cost(ratio: float) -> float:
        noises = [StoredNoise(spreads[case["kind"]], float(ratio), float(ratio)) for case in cases]
        errors = [_error(case, noise) for case, noise in zip(cases, noises, strict=True)]
        return abs(_weighted_median(errors, cases))

    return float(min(RATIOS, key=cost))


def _spread(cases: Sequence[Case], kind: NoiseKind) -> float:
    single = [case for case in cases if case["kind"] == kind and len(case["seeds"]) == 1]
    return math.exp(_weighted_median([_error(case, StoredNoise(1.0, 0.0, 0.0)) for case in single], single))


def _weighted_median(values: Sequence[float], cases: Sequence[Case]) -> float:
    """Each task has the same weight."""
    tasks = [case["task"] for case in cases]
    pairs = sorted(zip(values, [1 / tasks.count(task) for task in tasks], strict=True))
    half, seen = sum(weight for _, weight in pairs) / 2, 0.0
    for index, (value, weight) in enumerate(pairs):
        seen += weight
        if abs(seen - half) < 1e-9 and index + 1 < len(pairs):
            return (value + pairs[index + 1][0]) / 2
        if seen > half:
            return value
    return pairs[-1][0]


def _error(case: Case, noise: StoredNoise) -> float:
    """log(found / predicted)."""
    return math.log(case["half_width"] / predicted(case, noise))


def predicted(case: Case, noise: StoredNoise) -> float:
    seeds = len(case["seeds"])
    return expected_precision(
        case["kind"], case["base_spread"], case["examples"], seeds, case["steps"], noise
    ).half_width


def judge(cases: Sequence[Case]) -> dict[str, Any]:
    """Every case by the fit to the other grids, by the fit to the other tasks, and by the constants in use."""
    rows = []
    for case in cases:
        row = case | {"in_use": round(predicted(case, precision.STORED[case["kind"]]), 6)}
        for column, name in (("other_grids", "grid"), ("other_tasks", "task")):
            others = [one for one in cases if one[name] != case[name]]
            row[column] = round(predicted(case, fit(others, case["kind"])), 6)
        rows.append(row)
    return {"machine": machine(), "factor": FACTOR, "summary": _summary(rows), "cases": rows}


def _summary(rows: Sequence[Case]) -> dict[str, Any]:
    def share(chosen: Sequence[Case], column: str) -> dict[str, Any]:
        held = sum(abs(math.log(row["half_width"] / row[column])) <= math.log(FACTOR) for row in chosen)
        return {"cases": len(chosen), "within": held, "share": round(held / len(chosen), 3)}

    groups = {
        "all": list(rows),
        "loss, one seed": [row for row in rows if row["kind"] != "scores" and len(row["seeds"]) == 1],
        "loss, several seeds": [row for row in rows if row["kind"] != "scores" and len(row["seeds"]) > 1],
        "accuracy": [row for row in rows if row["kind"] == "scores"],
    }
    return {name: {column: share(chosen, column) for column in COLUMNS} for name, chosen in groups.items()}


def evaluate_base(model: str, data: Path, layers: str, seq_len: int, eval_items: int) -> dict[str, Any]:
    """The base's losses on the validation examples of a selection with these settings."""
    from rightrank.data.splits import load_data
    from rightrank.models.base_models import load_model
    from rightrank.schema.settings import make_settings
    from rightrank.train.runtime import Runtime
    from rightrank.train.tokens import encode

    settings = make_settings(
        {
            "layers_to_transform": layers.split(","),
            "seq_len": seq_len,
            "eval_items": eval_items,
            "device": "cpu",
            "cache_prefix": False,
        }
    )
    splits = load_data(data, settings)
    loaded = load_model(model, settings.dtype, settings.device, splits.classes)
    with tempfile.TemporaryDirectory() as cache:
        scores = Runtime(loaded, encode(splits, loaded, settings), settings, 1, Path(cache)).evaluate("selection")
    return {"losses": [round(loss, 4) for loss in scores.losses], "tokens": scores.tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--add", nargs="+", default=[], metavar="NAME=RUN")
    parser.add_argument("--grids", action="store_true")
    parser.add_argument("--base", nargs=3, metavar=("NAME", "MODEL", "DATA"))
    parser.add_argument("--layers", default="28,29")
    parser.add_argument("--seq-len", type=int, default=48)
    parser.add_argument("--eval-items", type=int, default=96)
    given = parser.parse_args()
    if given.base:
        name, model, data = given.base
        bases = json.loads(BASES.read_text(encoding="utf-8")) if BASES.exists() else {}
        bases[name] = evaluate_base(model, Path(data), given.layers, given.seq_len, given.eval_items)
        store_compact(bases, BASES)
        return
    cases: list[Case] = json.loads(CASES.read_text(encoding="utf-8")) if CASES.exists() else []
    added = list(cases_of_grids()) if given.grids else []
    for one in given.add:
        name, _, run = one.partition("=")
        added += cases_of_run(name, Path(run))
    if added:
        names = {case["grid"] for case in added}
        cases = [case for case in cases if case["grid"] not in names] + added
        store_compact(cases, CASES)
    fits = {kind: fit(cases, kind) for kind in precision.STORED}
    for kind, found in fits.items():
        print(f"{kind}: {found}; in use {precision.STORED[kind]}")
    result = judge(cases)
    print(json.dumps(result["summary"], indent=1))
    store(result, OUT)


def store_compact(value: Any, path: Path) -> None:
    """One line an entry."""
    if isinstance(value, dict):
        lines = [f"{json.dumps(name)}: {json.dumps(one)}" for name, one in value.items()]
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    else:
        path.write_text("[\n" + ",\n".join(json.dumps(one) for one in value) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
