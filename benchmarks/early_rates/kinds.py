"""Measure scores by example where the judged grids have none: classifiers by accuracy, and preference pairs.

    python -m benchmarks.early_rates.kinds lock BASES DATA WORK      # once, before the first training
    python -m benchmarks.early_rates.kinds measure BASES DATA WORK   # the classifiers, from their stored adapters, then the pairs, trained here

WORK is that of `train.py`. Each `kinds/GRID.npz` has rows for the base, the adapter that the rule hands over, and its truncations:

    ranks                            0 is the base; the largest is the adapter that is handed over
    losses_validation, losses_test   [ranks, examples] in thousandths
    scores_validation, scores_test   [ranks, examples] of halves: 2 is right, 0 wrong, 1 a tie
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from benchmarks.early_rates.complete import truncate_adapter
from benchmarks.early_rates.grids import ALL, TOP, Grid
from benchmarks.early_rates.judge import find_base
from benchmarks.early_rates.lock import GRIDS, HERE
from benchmarks.early_rates.rules import RULE_HANDOVER, Key, choose_by_rule, read_table
from benchmarks.early_rates.train import load_grid, name_adapter, run_grid
from benchmarks.learning_rate.bases import GEMMA, SMOLLM2
from benchmarks.learning_rate.lock import hash_file
from benchmarks.learning_rate.train_grids import TRUNCATED_RANKS, Task, evaluate

KINDS = HERE / "kinds"
CLASSIFIERS = ("spam", "stress", "manual_sections", "periods", "books", "word_languages", "audiences", "opinion_topics")
PAIRS = tuple(
    Grid(f"{name}-pairs", base, train_rows=1440)
    for name, base in (
        ("pronunciations", SMOLLM2),
        ("hypernyms", SMOLLM2),
        ("german_words", GEMMA),
        ("emails", SMOLLM2),
        ("verses", SMOLLM2),
        ("english_words", GEMMA),
    )
)


def write_pairs(source: Path, pairs: Path) -> None:
    """Write preference pairs: a row's completion is preferred to that of the next row of another group."""
    with source.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    with pairs.open("w", encoding="utf-8") as file:
        for number, row in enumerate(rows):
            others = (rows[(number + offset) % len(rows)] for offset in range(1, len(rows)))
            other = next(o for o in others if o["completion"] != row["completion"] and o.get("group", o) != row.get("group", row))  # fmt: skip
            pair = {"prompt": row["prompt"], "chosen": row["completion"], "rejected": other["completion"]}
            file.write(json.dumps(pair | ({"group": row["group"]} if "group" in row else {})) + "\n")


def measure(task: Task, top_key: Key, base_key: Key, steps: int, folder: Path, out: Path) -> None:
    """Evaluate the base, the adapter that is handed over and its truncations, and store losses and scores."""
    top, base = (load_file(folder / name_adapter(dict(zip(("kind", "rank", "rate", "fraction"), key, strict=True)))) for key in (top_key, base_key))  # fmt: skip
    adapters = [base, *truncate_adapter(task, top, steps), top]
    arrays: dict[str, Any] = {"ranks": np.array([0, *TRUNCATED_RANKS, TOP])}
    for split in ("validation", "test"):
        losses, scores = evaluate(task, adapters, split)
        arrays[f"losses_{split}"], arrays[f"scores_{split}"] = losses, 2 * scores
        if task.is_preference:
            arrays[f"losses_{split}"][0], arrays[f"scores_{split}"][0] = (
                round(1000 * math.log(2)),
                1,
            )  # exact: no preference
    np.savez_compressed(out, **arrays)


def measure_grid(grid: Grid, bases: Path, data: Path, work: Path) -> None:
    begun = time.perf_counter()
    is_new = grid in PAIRS
    task = load_grid(grid, bases, data, work)
    print(f"{time.strftime('%H:%M:%S')} {grid.name}: {[len(rows) for rows in task.splits.values()]}, prepared in {time.perf_counter() - begun:.0f} s", flush=True)  # fmt: skip
    ALL[grid.name] = grid
    with torch.autocast("cpu", torch.bfloat16):
        if is_new:
            run_grid(grid, task, work, work)
        table = read_table((work if is_new else GRIDS) / f"{grid.name}.npz")
        top = RULE_HANDOVER(table, TOP, choose_by_rule(table))
        measure(task, top, find_base(table, top), grid.steps, work / grid.name, KINDS / f"{grid.name}.npz")
    print(f"  stored after {time.perf_counter() - begun:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subject", choices=("lock", "measure"))
    for name in ("bases", "data", "work"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--only", help="the name of one grid")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Mismatch dtype")
    files = {grid.name: options.data / f"{grid.name}.jsonl" for grid in PAIRS}
    if options.subject == "lock":
        for name, path in files.items():
            write_pairs(options.data / f"{name.removesuffix('-pairs')}.jsonl", path)
        hashes = {path.name: hash_file(path) for path in (HERE / "kinds.py", HERE / "shares.py", KINDS / "README.md", *files.values())}  # fmt: skip
        (KINDS / "lock.json").write_text(json.dumps(hashes, indent=1) + "\n")
        return
    for grid in (*(ALL[name] for name in CLASSIFIERS), *PAIRS):
        if options.only in (None, grid.name) and not (KINDS / f"{grid.name}.npz").exists():
            measure_grid(grid, options.bases, options.data, options.work)


if __name__ == "__main__":
    main()
