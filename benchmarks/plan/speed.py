"""Measure time and memory of `plan` itself: a table of ten ranks, each model in a separate process.

    python -m benchmarks.plan.speed [--out benchmarks/plan/results/speed.json]

`table` is the table of ranks; `answer` is everything that the command prints, with the price of each axis and the largest
rank that fits; `process` is the complete command, including the import of torch, transformers and peft.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine
from benchmarks.plan.architectures import FULL_CONFIGS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.inside:
        print(json.dumps(measure_in_process(chosen.inside)))
        return
    rows = [measure_model(name) for name in FULL_CONFIGS]
    print(describe_machine())
    if chosen.out is not None:
        chosen.out.write_text(json.dumps({"machine": describe_machine(), "models": rows}, indent=1) + "\n")


def measure_model(name: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.plan.speed", "--inside", name]
    completed = subprocess.run(command, capture_output=True, text=True, check=True)
    row: dict[str, Any] = json.loads(completed.stdout.strip().splitlines()[-1])
    with tempfile.TemporaryDirectory() as folder:
        FULL_CONFIGS[name]().save_pretrained(folder)
        begun = time.perf_counter()
        plan = [sys.executable, "-m", "rightrank", "plan", folder, "--batch-size", "1", "--memory", "80GiB", "--json"]
        subprocess.run(plan, capture_output=True, check=False)
        row["process_seconds"] = round(time.perf_counter() - begun, 2)
    print(
        f"{name:14} table {row['table_seconds']:6.2f} s ({row['table_cpu_seconds']:.2f} s of one core), "
        f"answer {row['answer_seconds']:6.2f} s ({row['answer_cpu_seconds']:.2f}), process {row['process_seconds']:6.2f} s, {row['memory_mib']} MiB"
    )
    return row


def measure_in_process(name: str) -> dict[str, Any]:
    """Measure all linear modules and ten ranks in this process."""
    from rightrank.plugins.plan.planner import plan_config
    from rightrank.schema.plan_settings import PlanSettings

    warnings.simplefilter("ignore")
    values = {"ranks": (1, 2, 4, 8, 16, 32, 64, 96, 128, 192), "batch_size": 1, "seq_len": 512}
    settings = PlanSettings(**values)
    begun, cpu = time.perf_counter(), time.process_time()
    plan_config(FULL_CONFIGS[name](), name, settings)
    table, table_cpu = time.perf_counter() - begun, time.process_time() - cpu
    begun, cpu = time.perf_counter(), time.process_time()
    plan_config(FULL_CONFIGS[name](), name, PlanSettings(**values | {"memory_bytes": "80GiB"}))
    return {
        "model": name,
        "table_seconds": round(table, 2),
        "table_cpu_seconds": round(table_cpu, 2),
        "answer_seconds": round(time.perf_counter() - begun, 2),
        "answer_cpu_seconds": round(time.process_time() - cpu, 2),
        "memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


if __name__ == "__main__":
    main()
