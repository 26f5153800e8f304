"""Fuzz every reader, guided by coverage, with atheris (libFuzzer), and store the findings and the number of inputs.

    python -m benchmarks.fuzz.run --minutes 30 --seed 0 --out benchmarks/fuzz/run.json

Needs `pip install atheris` in addition to the package (it is not in the extras, because it has wheels only for Linux). Every target gets
an equal share of the CPU minutes in a separate process; if it dies, that counts as a crash, and
another process continues with the remaining share. A finding is any error that is not ours, a message of more than a line,
more than 5 seconds of CPU, or more than 1 GiB. `--replay FILE` reads the inputs of a result again, without atheris.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine
from benchmarks.results import store_result

NOTE_EVERY = 200  # number of reads between two progress notes, since libFuzzer exits without notice
LARGEST_INPUT = 2**17
OWN_MUTATIONS = 0.7  # fraction of ours; the others are libFuzzer's
MOST_CRASHES = 20  # of one target
CLOCK_OVER_CPU = 20  # limit on wall time relative to CPU time, so that a stuck machine does not run forever
CRASH = "died-"
_PROGRESS = re.compile(r"cov: (\d+) ft: (\d+) corp: (\d+)")


def fuzz_target(name: str, seconds: int, seed: int, notes: Path) -> None:
    """`seconds` of CPU in the process of its own; never returns."""
    import atheris

    with atheris.instrument_imports(include=["rightrank"]):
        from benchmarks.fuzz.guard import check_read
        from benchmarks.fuzz.mutate import damage
        from benchmarks.fuzz.targets import TARGETS

    target = TARGETS[name]
    seeds = target.seeds()
    state: dict[str, Any] = {"reads": 0, "begun": time.time(), "finds": {}}
    cpu_begun = time.process_time()

    def note() -> None:
        progress = {
            "reads": state["reads"],
            "cpu_seconds": round(time.process_time() - cpu_begun),
            "seconds": round(time.time() - state["begun"]),
            "finds": state["finds"],
        }
        notes.write_text(json.dumps(progress), encoding="utf-8")

    def read_one(data: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            find = check_read(target.read, data, Path(folder))
        state["reads"] += 1
        if find is not None:
            key = f"{find.kind} {find.location}"
            entry = state["finds"].setdefault(key, {"times": 0, "what": find.message, "input": None})
            entry["times"] += 1
            text = base64.b64encode(data).decode()
            if entry["input"] is None or len(text) < len(entry["input"]):
                entry["input"] = text
        over = time.process_time() - cpu_begun >= seconds
        if over or find is not None or state["reads"] % NOTE_EVERY == 0:
            note()
        if over:
            os._exit(0)  # libFuzzer measures wall time; this process has nothing else to do.

    def mutate(data: bytes, largest: int, number: int) -> bytes:
        generator = random.Random(number)
        if generator.random() < OWN_MUTATIONS:
            return damage(data, generator, seeds)[:largest]
        return bytes(atheris.Mutate(data, largest))

    note()
    with tempfile.TemporaryDirectory() as corpus:
        for number, data in enumerate(seeds):
            (Path(corpus) / f"seed{number}").write_bytes(data)
        options = [f"-seed={seed + 1}", f"-max_len={LARGEST_INPUT}", "-timeout=120", "-rss_limit_mb=12000"]
        atheris.Setup(
            [sys.argv[0], *options, f"-artifact_prefix={notes.parent}/{CRASH}", corpus],
            read_one,
            custom_mutator=mutate,
        )
        atheris.Fuzz()


def run_target(name: str, seconds: int, seed: int, folder: Path) -> dict[str, Any]:
    """`seconds` of CPU for one target, begun again after each crash; its counts and its finds."""
    totals: dict[str, Any] = {"reads": 0, "cpu_seconds": 0, "seconds": 0, "crashes": 0, "features": 0, "finds": {}}
    while totals["cpu_seconds"] < seconds and totals["crashes"] < MOST_CRASHES:
        notes, log = folder / f"{name}.json", folder / f"{name}.log"
        child = [
            "--seed",
            str(seed + totals["crashes"]),
            "--child",
            name,
            str(seconds - totals["cpu_seconds"]),
            str(notes),
        ]
        command = [sys.executable, "-m", "benchmarks.fuzz.run", *child]
        with log.open("wb") as stream:
            try:
                status = subprocess.run(
                    command, stderr=stream, stdout=stream, check=False, timeout=CLOCK_OVER_CPU * seconds + 60
                ).returncode
            except subprocess.TimeoutExpired:
                status = -1
        _add(totals, json.loads(notes.read_text(encoding="utf-8")))
        progress = _PROGRESS.findall(log.read_text(encoding="utf-8", errors="replace"))
        totals["features"] = max([totals["features"], *(int(features) for _, features, _ in progress)])
        if status != 0:
            totals["crashes"] += 1
            _keep_crash(totals["finds"], status, folder, log)
            if status == -1:
                break
    return totals


def _add(totals: dict[str, Any], more: dict[str, Any]) -> None:
    for name in ("reads", "cpu_seconds", "seconds"):
        totals[name] += more[name]
    for key, find in more["finds"].items():
        entry = totals["finds"].setdefault(key, find | {"times": 0})
        entry["times"] += find["times"]


def _keep_crash(finds: dict[str, Any], status: int, folder: Path, log: Path) -> None:
    """Keep the input that ended the process if libFuzzer could store it."""
    last = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if "ERROR" in line]
    crash_file = next(iter(folder.glob(f"{CRASH}*")), None)
    text = None if crash_file is None else base64.b64encode(crash_file.read_bytes()).decode()
    if crash_file is not None:
        crash_file.unlink()
    finds[f"crash {status} {len(finds)}"] = {"times": 1, "what": last[-1][:200] if last else "", "input": text}


def replay(path: Path) -> dict[str, list[str]]:
    """Return the findings of a stored result that still occur."""
    from benchmarks.fuzz.guard import check_read
    from benchmarks.fuzz.targets import TARGETS

    still: dict[str, list[str]] = {}
    for name, target_result in json.loads(path.read_text(encoding="utf-8"))["targets"].items():
        for key, find in target_result["finds"].items():
            with tempfile.TemporaryDirectory() as folder:
                finding = check_read(TARGETS[name].read, base64.b64decode(find["input"]), Path(folder))
            if finding is not None:
                still.setdefault(name, []).append(f"{key} -> {finding.kind} {finding.location} {finding.message}")
    return still


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", help="names with commas between; default: all")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--replay", type=Path)
    parser.add_argument("--child", nargs=3, metavar=("TARGET", "SECONDS", "NOTES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:  # before our modules are imported, so that they are instrumented
        return fuzz_target(options.child[0], int(options.child[1]), options.seed, Path(options.child[2]))
    if options.replay:
        print(json.dumps(replay(options.replay), indent=1))
        return None
    from benchmarks.fuzz.targets import TARGETS

    names = options.targets.split(",") if options.targets else list(TARGETS)
    seconds = round(options.minutes * 60 / len(names))
    result: dict[str, Any] = {
        "machine": describe_machine(),
        "seed": options.seed,
        "minutes": options.minutes,
        "targets": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            result["targets"][name] = run_target(name, seconds, options.seed, Path(folder))
            store_result(result, options.out)
    print(json.dumps(result, indent=1))
    return None


if __name__ == "__main__":
    main()
