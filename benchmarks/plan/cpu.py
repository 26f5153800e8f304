"""Compare the plan with the CPU's tensor memory: five real architectures in a small size, an encoder, 15 ways to train.

    python -m benchmarks.plan.cpu [--out benchmarks/plan/results/cpu.json] [--bits]

Prints the error of every case and the largest of all. The exit status is 1 if the largest is above 3%. `--bits` runs only the
cases in 4 and 8 bits, which need bitsandbytes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine
from benchmarks.plan.architectures import SMALL_CONFIGS
from benchmarks.plan.measure import measure
from rightrank.planning.planner import plan_config
from rightrank.schema.settings import PlanSettings

LIMIT = 0.03
SELECT: dict[str, Any] = {"packed": True, "loss": "chunked", "optim": "adamw_fused"}
CASES: list[dict[str, Any]] = [
    {},
    {"batch_size": 8, "seq_len": 64},
    {"ranks": (64,)},
    {"target_modules": "attention"},
    {"padding": True},
    {"gradient_checkpointing": True},
    {"loss": "chunked", "optim": "adamw_fused"},
    {"loss": "chunked", "optim": "adamw_fused", "gradient_checkpointing": True},
    {"attn_implementation": "eager"},
    {"use_dora": True, "target_modules": "attention"},
    SELECT,
    SELECT | {"adapters_per_pass": 2},
    SELECT | {"adapters_per_pass": 4, "batch_size": 2},
    SELECT | {"adapters_per_pass": 2, "gradient_checkpointing": True},
    {"packed": True, "optim": "adamw_fused", "num_labels": 3, "padding": True, "adapters_per_pass": 2},
]
BITS: list[dict[str, Any]] = [
    {"load_in_4bit": True},
    {"load_in_4bit": True, "gradient_checkpointing": True},
    SELECT | {"load_in_4bit": True, "adapters_per_pass": 2},
    {"load_in_8bit": True},
]
QUANTISED = ("llama", "gpt2", "mistral")
LANGUAGE = ("llama", "qwen", "gpt2", "mistral", "moe")
ATTENTION = {"gpt2": ["c_attn"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--bits", action="store_true")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    for name in QUANTISED if chosen.bits else (*LANGUAGE, "bert"):
        if chosen.only and chosen.only != name:
            continue
        for case in BITS if chosen.bits else CASES:
            if (name == "bert") <= ("num_labels" in case):
                rows.append(compare(name, SMALL_CONFIGS[name], case))
                print(format_line(rows[-1]), flush=True)
    print(describe_machine())
    worst = max(abs(row["error"]) for row in rows)
    print(f"{len(rows)} cases, worst error {worst:.2%}")
    if chosen.out is not None:
        chosen.out.write_text(
            json.dumps({"machine": describe_machine(), "worst": worst, "cases": rows}, indent=1) + "\n"
        )
    return int(worst > LIMIT)


def compare(name: str, make: Any, case: dict[str, Any]) -> dict[str, Any]:
    values = {"device": "cpu", "dtype": "float32", "batch_size": 4, "seq_len": 128, "ranks": (16,)} | case
    if values.get("target_modules") == "attention":
        values["target_modules"] = ATTENTION.get(name, ["q_proj", "v_proj"])
    if name == "moe":
        values["exclude_modules"] = ["shared_expert_gate"]
    settings = PlanSettings(**values)
    begun = time.perf_counter()
    plan = plan_config(make(), name, settings)
    seconds = time.perf_counter() - begun
    row = plan.ranks[0]
    measured = measure(make(), settings, row.rank)
    return {
        "architecture": name,
        "case": case,
        "predicted": row.peak_bytes,
        "measured": measured.peak_bytes,
        "error": row.peak_bytes / measured.peak_bytes - 1,
        "plan_seconds": round(seconds, 2),
    }


def format_line(row: dict[str, Any]) -> str:
    case = ", ".join(f"{key}={value}" for key, value in row["case"].items()) or "defaults"
    return f"{row['architecture']:8} {row['predicted']:>12,} {row['measured']:>12,} {row['error']:+7.2%}  {case}"


if __name__ == "__main__":
    sys.exit(main())
