"""Exhaustive grids on real models and texts, in small form for replay.

A run folder of `rightrank select MODEL DATA --strategy grid` becomes one curve: every cell's value and example losses,
its value half of the way (a shorter horizon where the schedule is constant), and the top rank's adapters truncated to every
lower rank, evaluated here. A seed that is not finished is left out.

    python -m benchmarks.selection.real_grids RUN [RUN ...] --out benchmarks/selection/real_grids.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from rightrank.data.splits import load_data
from rightrank.models.base_models import load_base
from rightrank.runs.folder import RunFolder
from rightrank.runs.local import LocalExecutor
from rightrank.schema.events import JournalRecord, Listener, RunStarted
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import Arm, Trial, TrialDiverged, TrialFailed, TrialFinished, trial_id
from rightrank.train.runtime import Runtime
from rightrank.train.tokens import encode

DIGITS = 5


def curve_of_run(run: Path) -> dict[str, Any]:
    """The grid of a run folder; trials come from its journal, truncations from its adapters."""
    folder = RunFolder(run)
    records = folder.journal.read()
    started = records[0]
    assert isinstance(started, RunStarted)
    finished = [record for record in records if isinstance(record, TrialFinished)]
    seeds = whole_seeds(records)
    trained = [trial for trial in finished if trial.rank > 0 and trial.arm.is_direct and trial.seed in seeds]
    base = next(trial for trial in finished if trial.rank == 0)
    values = started.settings
    steps = trained[0].steps
    curve: dict[str, Any] = {
        "id": run.name.removeprefix("grid_"),
        "family": "real",
        "source": "benchmarks/selection/real_grids.py",
        "model": Path(str(values["model"])).name,
        "form": started.data.form,
        "settings": {name: value for name, value in values.items() if name not in ("model", "data")},
        "machine": machine(),
        "seeds": sorted(seeds),
        "ranks": sorted({trial.rank for trial in trained}),
        "higher_is_better": started.higher_is_better,
        "base": round(base.value, DIGITS),
        "item_tokens": base.item_tokens,
    }
    grid: dict[str, Any] = {}
    items: dict[str, Any] = {}
    half: dict[str, Any] = {}
    for trial in trained:
        place(grid, trial, round(trial.value, DIGITS))
        place(items, trial, [round(loss, 4) for loss in trial.item_losses])
        for point in trial.points:
            if point.step * 2 == steps:
                place(half, trial, round(point.value, DIGITS))
    cuts = truncated_values(folder, started, trained)
    curve |= {
        "seed_grid": grid,
        "lr_grid": {
            rank: {rate: round(sum(by_seed.values()) / len(by_seed), DIGITS) for rate, by_seed in by_rate.items()}
            for rank, by_rate in grid.items()
        },
        "checkpoints": {"0.5": half},
        "truncation_grid": cuts,
        "item_losses": items,
        "train_seconds": round(sum(trial.train_seconds for trial in trained), 1),
    }
    return curve


def whole_seeds(records: Sequence[JournalRecord]) -> set[int]:
    """The seeds that every rank and learning rate has an outcome of, diverged ones among them: means over seeds need all."""
    ended = [record for record in records if isinstance(record, TrialFinished | TrialDiverged | TrialFailed)]
    cells: dict[int, set[tuple[int, float]]] = {}
    for outcome in ended:
        if outcome.rank > 0:
            cells.setdefault(outcome.seed, set()).add((outcome.rank, outcome.learning_rate))
    every = set().union(*cells.values())
    return {seed for seed, found in cells.items() if found == every}


def place(grid: dict[str, Any], trial: TrialFinished, value: object) -> None:
    grid.setdefault(str(trial.rank), {}).setdefault(f"{trial.learning_rate:g}", {})[str(trial.seed)] = value


def truncated_values(folder: RunFolder, started: RunStarted, trained: list[TrialFinished]) -> dict[str, Any]:
    """Held-out values of the top rank's adapters truncated to every lower rank; the top itself among them."""
    values = {name: value for name, value in started.settings.items() if name not in ("model", "data")}
    settings = SelectSettings(**values | {"max_steps": 1})  # nothing is trained: no training batch is prepared
    splits = load_data(Path(str(started.settings["data"])), settings)
    loaded = load_base(str(started.settings["model"]), settings, splits.summary.classes)
    encoded = encode(splits, loaded, settings)
    steps = settings.training_steps(len(encoded.splits["train"]))
    top = max(trial.rank for trial in trained)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        runtime = Runtime(loaded, encoded, settings, steps, Path(temporary))
        executor = LocalExecutor(runtime, folder, Listener())
        for parent in (trial for trial in trained if trial.rank == top):
            place(found, parent, round(parent.value, DIGITS))
            for rank in sorted({trial.rank for trial in trained} - {top}):
                arm: Arm = parent.arm.model_copy(update={"rank": rank, "steps": 0, "truncate_from": parent.trial_id})
                trial = Trial(trial_id=trial_id(started.fingerprint, arm), arm=arm)
                for outcome in executor.run([trial], None):
                    if isinstance(outcome, TrialFinished):
                        place(found, outcome, round(outcome.value, DIGITS))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    known = json.loads(options.out.read_text())["curves"] if options.out.exists() else []
    curves = {curve["id"]: curve for curve in known}
    for run in options.runs:
        curve = curve_of_run(run)
        curves[curve["id"]] = curve
        print(curve["id"], json.dumps(curve["lr_grid"]), json.dumps(curve["truncation_grid"]), flush=True)
    options.out.write_text(json.dumps({"curves": list(curves.values())}, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
