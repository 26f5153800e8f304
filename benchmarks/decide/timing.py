"""How long `rightrank decide` takes, Python's start included.

    python -m benchmarks.decide.timing      # prints, writes timing.json

Two tables: 10,000 rows of rank, learning rate, seed and value; 1,000 examples × 8 ranks × 5 seeds. Each is run five times; the
shortest wall time counts, and processor seconds beside it, since other work on the machine stretches the former.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.machine import machine

HERE = Path(__file__).parent
TIMES = 5


def many_rows(path: Path) -> None:
    generator = np.random.default_rng(0)
    lines = ["rank,lr,seed,value"]
    for number in range(10_000):
        rank, rate, seed = 2 ** (number % 10), 1e-5 * (1 + number // 10 % 10), number // 100
        lines.append(f"{rank},{rate:g},{seed},{2 + 0.5 / rank + 0.01 * generator.standard_normal():.6f}")
    path.write_text("\n".join(lines) + "\n")


def many_items(path: Path) -> None:
    generator = np.random.default_rng(0)
    level = 2 + 0.5 * generator.standard_normal(1000)
    lines = ["rank,seed,item,value"]
    for place in range(8):
        taste = 0.02 * generator.standard_normal(1000)
        for seed in range(5):
            values = level + taste + 0.02 * generator.standard_normal(1000) + 0.1 / 2**place
            lines += [f"{2**place},{seed},{item},{value:.6f}" for item, value in enumerate(values)]
    path.write_text("\n".join(lines) + "\n")


def measure(path: Path) -> dict[str, float]:
    walls, processors = [], []
    for _ in range(TIMES):
        before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        command = [sys.executable, "-m", "rightrank", "decide", str(path), "--json"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        walls.append(time.perf_counter() - begun)
        processors.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return {"wall_seconds": round(min(walls), 2), "processor_seconds": round(min(processors), 2)}


def main() -> None:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, write in (("10,000 rows", many_rows), ("1,000 items x 8 ranks x 5 seeds", many_items)):
            path = Path(folder) / "table.csv"
            write(path)
            found[name] = measure(path)
    result = {"machine": machine(), "load_at_end": round(os.getloadavg()[0], 1), "times": found}
    print(json.dumps(result, indent=1))
    (HERE / "timing.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
