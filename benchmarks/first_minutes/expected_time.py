"""How good the time is that `select` states before its first training; writes expected_time.json and expected_time.md.

    python -m benchmarks.first_minutes.expected_time FOLDER     # of a demo that ran already: its model and its data

Each case is a whole selection. The stated time is for the trainings that the strategy expects; it is compared with the time taken
after scaling to the trainings that ran, and unscaled.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.watch import Watch

from benchmarks.machine import machine, machine_text
from benchmarks.results import store
from rightrank import select_rank
from rightrank.demo import DEMO_SETTINGS
from rightrank.report.format import duration
from rightrank.schema.events import Event, SelectionPlanned, TimeExpected
from rightrank.schema.settings import SelectSettings

HERE = Path(__file__).parent
CASES: dict[str, dict[str, Any]] = {
    "one layer, grid of two ranks, 60 steps": {
        "layers_to_transform": (29,), "strategy": "grid", "ranks": (4, 16), "learning_rates": (3e-3,), "max_steps": 60,
    },
    "six layers, 30 steps": {"layers_to_transform": (24, 25, 26, 27, 28, 29), "ranks": (4, 16), "max_steps": 30},
    "goal adapter, 60 steps": {"goal": "adapter", "max_steps": 60},
    "the demo": {},
}  # fmt: skip


def measured(model: Path, data: Path, changes: Mapping[str, Any]) -> dict[str, Any]:
    stated: list[float] = []
    costs: list[float] = []
    lines: list[str] = []
    begun: list[float] = []

    def note(event: Event) -> None:
        if isinstance(event, TimeExpected):
            stated.append(event.expected_seconds)
            begun.append(time.perf_counter())
        elif isinstance(event, SelectionPlanned):
            costs.append(event.expected_trainings)

    watching = Watch(note, lines.append)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        given = DEMO_SETTINGS.model_dump(include=DEMO_SETTINGS.model_fields_set)
        settings = SelectSettings(**given | dict(changes))
        selected = select_rank(str(model), data, Path(folder) / "run", settings=settings, callbacks=[watching])
    seconds = time.perf_counter() - begun[0]  # to the end, views and the test split included
    ran = selected.cost["trainings"]
    return {
        "line": next(line for line in lines if line.startswith("time: about")),
        "stated_seconds": stated[0],
        "expected_trainings": costs[0],
        "trainings": ran,
        "seconds": seconds,
        "stated_for_these": stated[0] / costs[0] * ran,
        "load": [load, os.getloadavg()[0]],
    }


def page(found: Mapping[str, Any]) -> Iterator[str]:
    facts = machine_text(found["machine"])
    yield "# The time that is stated before the start\n"
    yield f"{facts}, one thread. Made by `python -m benchmarks.first_minutes.expected_time FOLDER`.\n"
    yield "| selection of SmolLM2-135M | stated | trainings expected, run | taken | stated for as many, error | load, before and after |"
    yield "|---|---|---|---|---|---|"
    for name, case in found["cases"].items():
        error = case["stated_for_these"] / case["seconds"] - 1
        yield (
            f"| {name} | {duration(case['stated_seconds'])} | {case['expected_trainings']:.3g}, {case['trainings']:.3g} | "
            f"{duration(case['seconds'])} | {duration(case['stated_for_these'])}, {error:+.0%} | "
            f"{case['load'][0]:.1f}, {case['load'][1]:.1f} |"
        )
    yield "\nA machine that does other work meanwhile changes the time taken as much as the load changes."


def main() -> None:
    folder = Path(sys.argv[1])
    cases: dict[str, Any] = {}
    found = {"machine": machine(), "cases": cases}
    for name, changes in CASES.items():
        cases[name] = measured(folder / "base_model", folder / "docstrings.jsonl", changes)
        store(found, HERE / "expected_time.json")
        (HERE / "expected_time.md").write_text("\n".join(page(found)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
