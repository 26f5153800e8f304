"""Everything that docs/explanation/engine.md tells, measured anew into `results/`, in some twenty minutes on two quiet cores (counted, not measured).

    python -m benchmarks.engine.measure MODEL DATA

One thread each: timings run one after the other on one core; beside them, on the other, what needs no clock (an arm of a pass trained
again alone). SFTTrainer is compared where TRL is installed.
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


def commands(model: str, data: str, work: Path) -> tuple[list[list[str]], list[list[str]]]:
    """What is timed, and what is not."""
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
        ["growth", *base, "--out", str(RESULTS / "growth.json")],
        ["profile_step", *base, "--steps", "3", "--out", str(RESULTS / "profile_float32.json")],
        ["profile_step", *base, "--steps", "3", "--dtype", "bfloat16", "--out", str(RESULTS / "profile_bfloat16.json")],
    ]
    untimed = [["certified", *base, "--out", str(RESULTS / "certified.json")]]
    for number, command in enumerate(timed + untimed):
        command += ["--work", str(work / str(number))]
    return timed, untimed


def start(command: list[str]) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    name, *rest = command
    return subprocess.Popen([sys.executable, "-W", "ignore", "-m", f"benchmarks.engine.{name}", *rest], env=environment)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--work", type=Path, default=Path("bench-work"))
    arguments = parser.parse_args()
    begun, failed = time.monotonic(), 0
    queues = commands(arguments.model, arguments.data, arguments.work)
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
