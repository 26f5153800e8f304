"""What an install weighs and how long the first answers take; prints Markdown.

    python -m benchmarks.first_minutes.measure MODEL_FOLDER ADAPTER_FOLDER > benchmarks/first_minutes/first_minutes.md

Weights are of a distribution and all that it requires, as installed where this runs. Times are the median of five fresh
processes, each with its files already in the system's cache; alternatives are measured between ours, in the same run.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from benchmarks.machine import machine

TIMES = 5
EXTRAS = ("", "gguf", "dev")
ALTERNATIVES = ("kneed", "optuna", "accelerate")
TABLE = "rank,value\n" + "".join(f"{2**k},{2 + 0.3 / 2**k:.4f}\n" for k in range(8))
KNEED = (
    "import csv; from kneed import KneeLocator; rows = list(csv.DictReader(open({table!r}))); "
    "print(KneeLocator([int(r['rank']) for r in rows], [float(r['value']) for r in rows], "
    "curve='convex', direction='decreasing').knee)"
)


def closure(name: str, extra: str = "") -> set[str]:
    """The installed distributions that `name[extra]` requires, itself included."""
    found: set[str] = set()
    waiting = [(name, extra)]
    while waiting:
        current, extras = waiting.pop()
        key = re.sub(r"[-_.]+", "-", current).lower()
        try:
            needs = distribution(current).requires or []
        except PackageNotFoundError:
            continue  # of another platform
        if key in found and not extras:
            continue
        found.add(key)
        waiting += [requirement for need in needs if (requirement := _required(need, extras))]
    return found


def _required(need: str, extra: str) -> tuple[str, str] | None:
    from packaging.requirements import Requirement

    parsed = Requirement(need)
    if parsed.marker is not None and not parsed.marker.evaluate({"extra": extra}):
        return None
    return parsed.name, next(iter(parsed.extras), "")


def megabytes(names: set[str]) -> float:
    """Of all files that the distributions say are theirs."""
    total = 0
    for name in names:
        for file in distribution(name).files or []:
            path = Path(str(file.locate()))
            total += path.stat().st_size if path.is_file() else 0
    return total / 1e6


def seconds(command: list[str]) -> float:
    """The median of fresh processes; the first, which fills the cache, is not counted."""
    times = []
    for _ in range(TIMES + 1):
        begun = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


def main(model: str, adapter: str) -> None:
    print("# The first minutes\n")
    facts = ", ".join(f"{name} {value}" for name, value in machine().items())
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(
        f"{facts}; load averages {load} at the start. Made by `python -m benchmarks.first_minutes.measure MODEL ADAPTER`.\n"
    )
    print("| install | packages | MB, dependencies included |\n|---|---|---|")
    for extra in EXTRAS:
        names = closure("rightrank", extra)
        print(f"| rightrank{f'[{extra}]' if extra else ''} | {len(names)} | {megabytes(names):,.0f} |")
    for name in ALTERNATIVES:
        names = closure(name)
        if names:
            print(f"| {name} | {len(names)} | {megabytes(names):,.0f} |")
    rightrank = [sys.executable, "-m", "rightrank"]
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "runs.csv"
        table.write_text(TABLE)
        commands = {
            "`import numpy`, to compare": [sys.executable, "-c", "import numpy"],
            "rightrank --help": [*rightrank, "--help"],
            "optuna --help": [sys.executable, "-c", "from optuna.cli import main; main()", "--help"],
            "rightrank decide runs.csv": [*rightrank, "decide", str(table)],
            "kneed on the same table (a script)": [sys.executable, "-c", KNEED.format(table=str(table))],
            "rightrank plan MODEL --ranks 8,16": [*rightrank, "plan", model, "--ranks", "8,16"],
            "rightrank inspect ADAPTER": [*rightrank, "inspect", adapter],
            "`import peft`, to compare": [sys.executable, "-c", "import peft"],
        }
        print("\n| first answer of | seconds |\n|---|---|")
        for name, command in commands.items():
            print(f"| {name} | {seconds(command):.2f} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:3])
