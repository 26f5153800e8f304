"""Repeat all measurements of docs/explanation/engine.md and store them in `results/`; takes about fifteen minutes on two idle cores (estimated).

    python -m benchmarks.engine.measure MODEL DATA

Everything uses one thread. Timings run one after the other on one core. Work that needs no clock (training an arm of a pass again
alone) runs on the other core at the same time. SFTTrainer is compared if TRL is installed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[2]


def build_commands(model: str, data: str, work: Path) -> tuple[list[list[str]], list[list[str]]]:
    """Return the commands that are timed, and those that are not."""
    trl = ["--trl"] if find_spec("trl") else []
    base = [model, data]
    timed = [
        [
            "compare",
            *base,
            "--job",
            "one",
            "--steps",
            "8",
            "--rounds",
            "1",
            *trl,
            "--out",
            str(RESULTS / "one_arm.json"),
        ],
        ["compare", *base, "--job", "tail", "--steps", "6", "--rounds", "1", "--out", str(RESULTS / "tail.json")],
    ]
    untimed = [["certified", *base, "--out", str(RESULTS / "certified.json")]]
    for number, command in enumerate(timed + untimed):
        command += ["--work", str(work / str(number))]
    return timed, untimed


def start(command: list[str]) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    name, *arguments = command
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", f"benchmarks.engine.{name}", *arguments], env=environment
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--work", type=Path, default=Path("bench-work"))
    arguments = parser.parse_args()
    begun, failed = time.monotonic(), 0
    queues = build_commands(arguments.model, arguments.data, arguments.work)
    running: list[subprocess.Popen[bytes] | None] = [None, None]
    while any(queues) or any(running):
        for lane, queue in enumerate(queues):
            process = running[lane]
            if process is not None and process.poll() is not None:
                failed += process.returncode != 0
                running[lane] = process = None
            if process is None and queue:
                running[lane] = start(queue.pop(0))
        time.sleep(0.5)
    print(f"{time.monotonic() - begun:.0f} s, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
