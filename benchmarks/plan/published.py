"""Compare the plan with PEFT's published peaks (huggingface/peft, method_comparison/MetaMathQA/results; torch 2.7, L40S).

    python -m benchmarks.plan.published [--out benchmarks/plan/results/published.json]

There are two predictions for each: the plan at its defaults for the published settings (batch 4, 768 tokens), and a closer
model of the published training loop, which pads rows of unequal length and keeps the logits until the next step. The length of its
longest batch is only given as "up to 768". The closer model is therefore shown for several lengths, so
that one can see at which length it matches, and whether that is the same for every row.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine
from benchmarks.plan.architectures import FULL_CONFIGS
from rightrank.planning.planner import plan_config
from rightrank.schema.settings import PlanSettings

# Maximum reserved bytes. The first is exact from the table; the others are rounded to 0.01 GB.
PUBLISHED: list[dict[str, Any]] = [
    {"rank": 32, "target_modules": ("q_proj", "v_proj"), "reserved": 22_292_725_760},
    {"rank": 64, "target_modules": ("q_proj", "v_proj"), "reserved": 22_550_000_000},
    {"rank": 10, "target_modules": ("gate_proj", "up_proj", "down_proj"), "reserved": 24_700_000_000},
]
LENGTHS = (704, 720, 736, 768)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = [compare(case) for case in PUBLISHED]
    worst = max(abs(row["error"]) for row in rows)
    print(describe_machine())
    print(f"worst error of the plan at its defaults: {worst:.2%}")
    if chosen.out is not None:
        chosen.out.write_text(
            json.dumps({"machine": describe_machine(), "worst": worst, "cases": rows}, indent=1) + "\n"
        )


def compare(case: dict[str, Any]) -> dict[str, Any]:
    default = predict_reserved(case, 768)
    row = {**case, "predicted": default, "error": default / case["reserved"] - 1, "closer": {}}
    print(
        f"r={case['rank']} on {', '.join(case['target_modules'])}: {case['reserved'] / 1e9:.2f} GB published, ", end=""
    )
    print(f"{default / 1e9:.2f} GB planned ({row['error']:+.2%})")
    for length in LENGTHS:
        closer = predict_reserved(case, length, padding=True)
        row["closer"][length] = closer
        print(f"    padded, {length} tokens: {closer / 1e9:.2f} GB ({closer / case['reserved'] - 1:+.2%})")
    return row


def predict_reserved(case: dict[str, Any], length: int, **closer: bool) -> int:
    values = {"target_modules": case["target_modules"], "ranks": (case["rank"],), "batch_size": 4, "seq_len": length}
    settings = PlanSettings(**values | {"dtype": "bfloat16"} | closer)
    return plan_config(FULL_CONFIGS["Llama-3.2-3B"](), "Llama-3.2-3B", settings).ranks[0].peak_reserved_bytes


if __name__ == "__main__":
    main()
