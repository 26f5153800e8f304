"""Compare the plan with CUDA's own counters. Not run yet: it needs a CUDA device, and bitsandbytes for the 4-bit cases.

    python -m benchmarks.plan.gpu [--out benchmarks/plan/results/gpu.json] [--dry-run]

Three architectures, each with other ranks, batches, lengths, types, checkpointing, padding, losses, 4-bit weights and
several adapters per pass. The exit status is 1 if any peak differs by more than 3% (allocated) or 5% (reserved): the worst case counts, not the
mean. `--dry-run` plans every case on meta tensors and measures nothing; a test runs this with small models.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe_machine
from benchmarks.plan.architectures import FULL_CONFIGS, SMALL_CONFIGS, Configs
from benchmarks.plan.measure import measure
from rightrank.planning.planner import plan_config
from rightrank.schema.results import Plan
from rightrank.schema.settings import PlanSettings

ALLOCATED_LIMIT, RESERVED_LIMIT = 0.03, 0.05
CONFIGS: Configs = {name: FULL_CONFIGS[name] for name in ("SmolLM2-135M", "Llama-3.2-3B")} | {
    "gpt2": SMALL_CONFIGS["gpt2"]
}
SELECT: dict[str, Any] = {"packed": True, "loss": "chunked", "optim": "adamw_fused"}
CASES: list[dict[str, Any]] = [
    {},
    {"ranks": (64,)},
    {"batch_size": 8, "seq_len": 256},
    {"seq_len": 500},
    {"padding": True},
    {"gradient_checkpointing": True},
    {"dtype": "float32"},
    {"loss": "chunked", "optim": "adamw_fused"},
    {"load_in_4bit": True},
    {"load_in_4bit": True, "gradient_checkpointing": True},
    SELECT,
    SELECT | {"gradient_checkpointing": True},
    SELECT | {"adapters_per_pass": 2},
    SELECT | {"adapters_per_pass": 4, "batch_size": 2},
    SELECT | {"adapters_per_pass": 2, "load_in_4bit": True},
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    if chosen.dry_run:
        for name, case, plan in dry_run(CONFIGS):
            print(f"{name:14} {plan.ranks[0].peak_bytes:>15,}  {case}", flush=True)
        return 0
    if not torch.cuda.is_available():
        print("there is no CUDA device here: nothing was measured")
        return 2
    rows = [compare(name, make, case) for name, make in CONFIGS.items() for case in CASES]
    print(describe_machine() | {"gpu": torch.cuda.get_device_name()})
    if chosen.out is not None:
        chosen.out.write_text(json.dumps({"machine": describe_machine(), "cases": rows}, indent=1) + "\n")
    worst = max(abs(row["allocated_error"]) for row in rows), max(abs(row["reserved_error"]) for row in rows)
    print(f"{len(rows)} cases, worst {worst[0]:.2%} allocated, {worst[1]:.2%} reserved")
    return int(worst[0] > ALLOCATED_LIMIT or worst[1] > RESERVED_LIMIT)


def dry_run(configs: Configs, **changes: Any) -> list[tuple[str, dict[str, Any], Plan]]:
    """Plan every case for CUDA, on any machine."""
    return [
        (name, case, plan_config(make(), name, build_settings(case | changes)))
        for name, make in configs.items()
        for case in CASES
    ]


def build_settings(case: dict[str, Any]) -> PlanSettings:
    return PlanSettings(**{"ranks": (16,), "batch_size": 4, "seq_len": 512} | case)


def compare(name: str, make: Callable[[], Any], case: dict[str, Any]) -> dict[str, Any]:
    """Compare the plan's peaks with the device's counters. A CPU does not count reserved memory."""
    settings = build_settings(case)
    row = plan_config(make(), name, settings).ranks[0]
    gc.collect()
    torch.cuda.empty_cache()
    measured = measure(make(), settings, row.rank)
    reserved = measured.reserved_bytes and row.peak_reserved_bytes / measured.reserved_bytes - 1
    result = {
        "model": name,
        "case": case,
        "predicted": [row.peak_bytes, row.peak_reserved_bytes],
        "measured": [measured.peak_bytes, measured.reserved_bytes],
        "allocated_error": row.peak_bytes / measured.peak_bytes - 1,
        "reserved_error": reserved,
    }
    print(f"{name:14} {result['allocated_error']:+.2%} allocated {reserved or 0:+.2%} reserved  {case}", flush=True)
    return result


if __name__ == "__main__":
    sys.exit(main())
