"""Ray Tune's ASHA over rank × learning rate, on grids of finished runs.

`ray_asha` asks Ray Tune's own scheduler object, one trial after the other, without starting Ray. That this is what
`Tuner.fit` does with one trial at a time is checked by

    python -m benchmarks.selection.ray_asha --check 4

which runs both on as many planted grids and compares where every trial was stopped.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.machine import machine
from benchmarks.selection.baselines import Pick, Seen, seen_early, seen_loss, smallest_within
from benchmarks.selection.tables import GridCurve, read_grids

FACTOR = 4  # Ray Tune's default: a quarter of the trials continues
HERE = Path(__file__).parent

Cell = tuple[int, float]


def ray_asha(curve: GridCurve, margin: float, budget: float, generator: np.random.Generator) -> Pick:
    """Train cells in random order until the budget is spent. A stopped trial has no result."""
    seen: Seen = {}
    spent = 0.0
    report = scheduler(curve, int(generator.integers(2**31)))
    for cell in shuffled_cells(curve, generator):
        if spent >= budget:
            break
        part = run_trial(curve, cell, report)
        spent += part
        loss = seen_loss(curve, *cell)
        if part == 1.0 and loss is not None:
            seen[cell] = loss
    return Pick(*smallest_within(seen, margin), spent)


def shuffled_cells(curve: GridCurve, generator: np.random.Generator) -> list[Cell]:
    cells = [(rank, learning_rate) for rank in curve.ranks for learning_rate in curve.cells[rank]]
    return [cells[place] for place in generator.permutation(len(cells))]


def reports(curve: GridCurve, cell: Cell) -> list[tuple[float, float]]:
    """(part of a training, loss) that the trial of a cell reports, in turn."""
    parts = [(part, seen_early(curve, part, *cell)) for part in sorted(curve.checkpoints)]
    found = [(part, loss) for part, loss in parts if loss is not None]
    end = seen_loss(curve, *cell)
    return found if end is None else [*found, (1.0, end)]


def run_trial(curve: GridCurve, cell: Cell, report: Callable[[Cell, float, float], bool]) -> float:
    """The part of a training that the trial comes to."""
    reached = 0.0
    for part, loss in reports(curve, cell):
        reached = part
        if not report(cell, part, loss):
            break
    return reached


def scheduler(curve: GridCurve, seed: int) -> Callable[[Cell, float, float], bool]:
    """A function that reports a trial's loss to Ray Tune's ASHA and returns whether the trial continues."""
    from ray.tune.schedulers import TrialScheduler

    asha = make_asha(curve)
    asha.set_search_properties("loss", "min")
    trials: dict[Cell, SimpleNamespace] = {}
    np.random.seed(seed)  # Ray Tune draws its bracket from the global generator

    def report(cell: Cell, part: float, loss: float) -> bool:
        if cell not in trials:
            trials[cell] = SimpleNamespace(trial_id=f"{cell[0]}_{cell[1]}")
            asha.on_trial_add(None, trials[cell])
        result = {"loss": loss, "percent": round(100 * part)}
        if part == 1.0:
            asha.on_trial_complete(None, trials[cell], result)
            return False
        return bool(asha.on_trial_result(None, trials[cell], result) == TrialScheduler.CONTINUE)

    return report


def make_asha(curve: GridCurve) -> Any:
    """As it comes, with the first value during training as its grace period."""
    from ray.tune.schedulers import ASHAScheduler

    first = round(100 * min([*curve.checkpoints, 1.0]))
    return ASHAScheduler(time_attr="percent", max_t=100, grace_period=first, reduction_factor=FACTOR)


def tuned(curve: GridCurve, cells: Sequence[Cell]) -> dict[Cell, float]:
    """The part of a training that each cell comes to in a real `Tuner.fit`, one trial at a time, in the order of `cells`."""
    from ray import tune

    table = {repr(cell): reports(curve, cell) for cell in cells}

    def trainable(config: dict[str, str]) -> None:
        for part, loss in table[config["cell"]]:
            tune.report({"loss": loss, "percent": round(100 * part)})

    tuner = tune.Tuner(
        trainable,
        param_space={"cell": tune.grid_search([repr(cell) for cell in cells])},
        tune_config=tune.TuneConfig(
            metric="loss", mode="min", scheduler=make_asha(curve), max_concurrent_trials=1, reuse_actors=True
        ),
        run_config=tune.RunConfig(verbose=0),
    )
    found = tuner.fit()
    ended = {result.config["cell"]: result.metrics["percent"] / 100 for result in found}
    return {cell: ended[repr(cell)] for cell in cells}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", type=int, default=4, metavar="N", help="planted grids")
    parser.add_argument("--out", type=Path, default=HERE / "ray_check.json")
    options = parser.parse_args()
    import ray

    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    curves = read_grids(HERE / "planted_grids.json")
    step = math.ceil(len(curves) / options.check)
    checked: list[dict[str, object]] = []
    for number, curve in enumerate(curves[::step]):
        cells = shuffled_cells(curve, np.random.default_rng(number))
        report = scheduler(curve, number)
        ours = {cell: run_trial(curve, cell, report) for cell in cells}
        theirs = tuned(curve, cells)
        stopped = sum(part < 1 for part in theirs.values())
        checked.append({"grid": curve.name, "trials": len(cells), "stopped": stopped, "same": ours == theirs})
        print(json.dumps(checked[-1]), flush=True)
        found = {"machine": machine(), "ray": ray.__version__, "checked": checked}
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    ray.shutdown()


if __name__ == "__main__":
    main()
