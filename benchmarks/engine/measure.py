"""Repeat all measurements of README.md, one after the other with one thread, and store them in `results/`.

python -m benchmarks.engine.measure MODEL DATA    # about fifteen minutes on an idle core (estimated)
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[2]
JOBS = {"one_arm": "--job one --steps 8", "tail": "--job tail --steps 6"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--work", type=Path, default=Path("bench-work"))
    arguments = parser.parse_args()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    failed = 0
    for name, job in JOBS.items():
        words = [arguments.model, arguments.data, *job.split(), "--rounds", "1", "--out", str(RESULTS / f"{name}.json")]
        words += ["--trl"] if name == "one_arm" and find_spec("trl") else []
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.engine.compare", *words]
        failed += subprocess.run([*command, "--work", str(arguments.work / name)], env=environment).returncode != 0
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
