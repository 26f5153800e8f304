"""Measure what the locked rule needs beyond the stored losses: test losses of what is handed over, and its truncations.

    python -m benchmarks.early_rates.complete BASES DATA WORK OUT

reads the grids in `grids/` and the adapters in WORK, and writes `OUT/GRID.completed.npz` with `records`, `validation` and `test` as in `train.py`:
for ranks 64 and 16 what each learning rate hands over, and the truncations (kind `truncated`) of what the rule hands over at a quarter and at an eighth.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.early_rates.grids import BASELINE, JUDGED, RATES, TOP
from benchmarks.early_rates.lock import GRIDS, read_lock
from benchmarks.early_rates.rules import RULE_HANDOVER, GridTable, Key, choose_by_rule, read_table
from benchmarks.early_rates.train import SEED, Adapter, load_adapters, load_grid
from benchmarks.learning_rate.train_grids import (
    BATCH,
    TRUNCATED_RANKS,
    Task,
    evaluate,
    gather_moments,
    plan_batches,
    truncate,
)

MOMENT_STEPS_FRACTION = 0.1  # as in `rightrank.training.runtime`


def make_record(key: Key, **changes: Any) -> dict[str, Any]:
    kind, rank, rate, fraction = key
    return {"kind": kind, "rank": rank, "rate": rate, "fraction": fraction, "test": True} | changes


def truncate_adapter(task: Task, adapter: Adapter, steps: int) -> list[Adapter]:
    """Truncate by K-FAC, with moments of training rows that follow in the plan."""
    count = round(MOMENT_STEPS_FRACTION * steps)
    batches = plan_batches(task, SEED, steps + count)[steps:]
    assert all(len(batch) == BATCH for batch in batches)
    return truncate(task, adapter, gather_moments(task, adapter, batches), TRUNCATED_RANKS)


def complete_grid(table: GridTable, task: Task, folder: Path, out: Path) -> None:
    records: list[dict[str, Any]] = []
    adapters: list[Adapter] = []
    handed_over = [RULE_HANDOVER(table, rank, rate) for rank in (BASELINE, TOP) for rate in RATES]
    handed_over = [key for key in handed_over if key in table.losses and key not in table.test]
    records += [make_record(key) for key in handed_over]
    adapters += load_adapters(folder, records)
    chosen = {RULE_HANDOVER(table, TOP, choose_by_rule(table, fraction)) for fraction in (0.25, 0.125)}
    for key in sorted(chosen):
        (adapter,) = load_adapters(folder, [make_record(key)])
        cuts = truncate_adapter(task, adapter, table.grid.steps)
        records += [make_record(key, kind=f"truncated {key[0]}", rank=rank) for rank in TRUNCATED_RANKS]
        adapters += cuts
    order = sorted(range(len(records)), key=lambda index: records[index]["rank"])
    records, adapters = [records[index] for index in order], [adapters[index] for index in order]
    with torch.autocast("cpu", torch.bfloat16):
        validation, test = (evaluate(task, adapters, split)[0] for split in ("validation", "test"))
    temporary = out / f"{table.grid.name}.part.npz"
    np.savez_compressed(temporary, records=np.array(json.dumps(records)), validation=validation, test=test)
    temporary.rename(out / f"{table.grid.name}.completed.npz")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("bases", "data", "work", "out"):
        parser.add_argument(name, type=Path)
    options = parser.parse_args()
    if not read_lock()["rule"]:
        raise SystemExit("lock the rule first: python -m benchmarks.early_rates.lock rule")
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    for grid in JUDGED:
        path = GRIDS / f"{grid.name}.npz"
        if path.exists() and not (options.out / f"{grid.name}.completed.npz").exists():
            task = load_grid(grid, options.bases, options.data, options.work)
            complete_grid(read_table(path), task, options.work / grid.name, options.out)
            print(f"{grid.name}: completed", flush=True)


if __name__ == "__main__":
    main()
