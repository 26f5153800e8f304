"""What an install weighs and how long the first answers take; writes first_minutes.md beside this file.

    python -m benchmarks.first_minutes.measure                        # runs the demo first, and times it
    python -m benchmarks.first_minutes.measure --demo DIR             # with the folder of a demo that ran already
    python -m benchmarks.first_minutes.measure --gradience PROGRAM    # beside gradience, in an environment of its own

Weights are of a distribution and all that it requires, as installed where this runs; an extra of which something is not
installed is reported as such. Times are the median of five fresh processes, each with its files already in the system's
cache; alternatives are measured between ours, in the same run.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution, metadata, version
from pathlib import Path

from benchmarks.machine import machine, machine_text

PAGE = Path(__file__).parent / "first_minutes.md"
ROOT = Path(__file__).parents[2]
TIMES = 5
ALTERNATIVES = ("kneed", "optuna", "accelerate")
TABLE = "rank,eval_loss\n" + "".join(f"{2**k},{2 + 0.3 / 2**k:.4f}\n" for k in range(8))
MODEL_CLASS = "import torch; from transformers import LlamaForCausalLM"
KNEED = (
    "import csv; from kneed import KneeLocator; rows = list(csv.DictReader(open({table!r}))); "
    "print(KneeLocator([int(r['rank']) for r in rows], [float(r['eval_loss']) for r in rows], "
    "curve='convex', direction='decreasing').knee)"
)


OPTUNA = (
    "import csv, optuna; study = optuna.create_study(direction='minimize'); rows = list(csv.DictReader(open({table!r}))); "
    "space = {{'rank': optuna.distributions.IntDistribution(1, 512, log=True)}}; "
    "[study.add_trial(optuna.create_trial(params={{'rank': int(r['rank'])}}, distributions=space, value=float(r['eval_loss']))) "
    "for r in rows]; print(study.best_trial.params)"
)


def closure(name: str, extra: str = "") -> tuple[set[str], set[str]]:
    """The distributions that `name[extra]` requires on this platform, itself included: those installed, those missing."""
    found: set[str] = set()
    missing: set[str] = set()
    seen: set[tuple[str, str]] = set()
    waiting = [(name, extra)]
    while waiting:
        current, extras = waiting.pop()
        key = re.sub(r"[-_.]+", "-", current).lower()
        if (key, extras) in seen:
            continue
        seen.add((key, extras))
        try:
            needs = distribution(current).requires or []
        except PackageNotFoundError:
            missing.add(key)
            continue
        found.add(key)
        waiting += [requirement for need in needs for requirement in _required(need, extras)]
    return found, missing


def _required(need: str, extra: str) -> list[tuple[str, str]]:
    """The distribution that a requirement names, once for each extra of it; nothing where it is for others."""
    from packaging.requirements import Requirement

    parsed = Requirement(need)
    if parsed.marker is not None and not parsed.marker.evaluate({"extra": extra}):
        return []
    return [(parsed.name, ""), *((parsed.name, further) for further in sorted(parsed.extras))]


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


def weights() -> Iterator[str]:
    yield "| install | packages | MB, dependencies included |"
    yield "|---|---|---|"
    extras = ["", *(metadata("rightrank").get_all("Provides-Extra") or [])]
    for name, extra in [*(("rightrank", extra) for extra in extras), *((name, "") for name in ALTERNATIVES)]:
        found, missing = closure(name, extra)
        told = f"{name}[{extra}]" if extra else name
        size = f"{megabytes(found):,.0f}" if not missing else f"not installed here: {', '.join(sorted(missing))}"
        yield f"| {told} | {len(found | missing)} | {size} |"


def answers(model: Path, adapter: Path, gradience: str | None) -> Iterator[str]:
    rightrank = [sys.executable, "-m", "rightrank"]
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "runs.csv"
        table.write_text(TABLE)
        commands = {
            "`import numpy`, to compare": [sys.executable, "-c", "import numpy"],
            "rightrank --help": [*rightrank, "--help"],
            "optuna --help": [sys.executable, "-c", "from optuna.cli import main; main()", "--help"],
            "accelerate --help": [sys.executable, "-m", "accelerate.commands.accelerate_cli", "--help"],
            "rightrank decide runs.csv": [*rightrank, "decide", str(table)],
            "kneed on the same table (a script)": [sys.executable, "-c", KNEED.format(table=str(table))],
            "optuna, the best of the same table (a script)": [sys.executable, "-c", OPTUNA.format(table=str(table))],
            "rightrank plan MODEL --ranks 8,16": [*rightrank, "plan", str(model), "--ranks", "8,16"],
            "rightrank inspect ADAPTER": [*rightrank, "inspect", str(adapter)],
            "`import peft`, to compare": [sys.executable, "-c", "import peft"],
            "torch and the model's class, without which no step is traced": [sys.executable, "-c", MODEL_CLASS],
        }
        if gradience is not None:
            commands["gradience audit ADAPTER"] = [gradience, "audit", "--peft-dir", str(adapter)]
        yield "| first answer of | seconds |"
        yield "|---|---|"
        for name, command in commands.items():
            yield f"| {name} | {seconds(command):.2f} |"


def demo(folder: Path) -> str:
    """Runs the demo in a new folder; the line that says how long it took."""
    begun = time.perf_counter()
    command = [sys.executable, "-m", "rightrank", "demo", "--out", str(folder), "--quiet"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return f"| rightrank demo, once, the model's conversion included | {time.perf_counter() - begun:.0f} |"


def json_share() -> str:
    """Commands tried with --json, answers and failures, by the test of them."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/cli/test_json_outputs.py"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    passed, failed = (
        int(found[1]) if (found := re.search(rf"(\d+) {word}", said)) else 0 for word in ("passed", "failed")
    )
    if passed + failed == 0:
        raise RuntimeError(f"the test of --json did not run: {said[-500:]}")
    return f"`--json` over all commands, answers and failures: {passed} of {passed + failed} checks hold (`tests/cli/test_json_outputs.py`)."


def page(folder: Path, ready: bool, gradience: str | None) -> Iterator[str]:
    facts = machine_text(machine())
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    alternatives = ", ".join(f"{name} {version(name)}" for name in ALTERNATIVES)
    words = shlex.join(["python", "-m", "benchmarks.first_minutes.measure"])
    yield "# The first minutes\n"
    yield f"{facts}; {alternatives}; load averages {load} at the start. Made by `{words}`.\n"
    yield from weights()
    yield ""
    took = None if ready else demo(folder)
    yield from answers(folder / "base_model", folder / "run" / "adapter", gradience)
    if took is not None:
        yield took
    yield ""
    yield "None of the alternatives does what `demo` does, so it stands alone. A load average above 1 or 2 makes the seconds upper bounds."
    yield ""
    yield json_share()
    yield ""
    yield "[Where the time of `plan` goes](plan_time.md) · [how good the time is that `select` states before its start](expected_time.md)"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--demo", type=Path, help="folder of a demo that ran already")
    parser.add_argument("--gradience", help="the program of gradience")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lines = []
        for line in page(given.demo or Path(folder), given.demo is not None, given.gradience):
            print(line, flush=True)
            lines.append(line)
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
