"""Other calculators on the same cases, each at its best settings, against PEFT's published peaks.

Each is installed from the index into a separate environment, since their pins conflict:

    python -m venv ENV && ENV/bin/pip install fitcheck-llm==0.3.1      # likewise canifinetune==0.4.1, peft-doctor==0.9.2
    python -m benchmarks.plan.others --fitcheck ENV/bin/fitcheck --canifinetune ... --peft-doctor ...

Two of them look the configuration up by hub name; without a network they find it in the hub's cache folder (HF_HOME).
Choices made in their favour: flash attention for fitcheck; for canifinetune the narrowest scope that holds the
targets, and its own safety margin left out; the exact parameter count, width and depth for peft-doctor.
`accelerate estimate-memory` knows no LoRA and no activations, and is left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import warnings
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from benchmarks.plan.published import PUBLISHED, reserved

MODEL = "meta-llama/Llama-3.2-3B"
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("fitcheck", "canifinetune", "peft-doctor"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    for case in PUBLISHED:
        found = {
            "rightrank plan": reserved(case, 768),
            "fitcheck-llm": fitcheck(chosen.fitcheck, case),
            "canifinetune": canifinetune(chosen.canifinetune, case),
            "peft-doctor": peft_doctor(chosen.peft_doctor),
        }
        errors = {name: size / case["reserved"] - 1 for name, size in found.items()}
        rows.append({**case, "found": found, "errors": errors})
        print(f"r={case['rank']} on {', '.join(case['target_modules'])}: {case['reserved'] / 1e9:.2f} GB")
        for name, size in found.items():
            print(f"    {name:15} {size / 1e9:6.2f} GB  {errors[name]:+.1%}")
    print(machine())
    if chosen.out is not None:
        chosen.out.write_text(json.dumps({"machine": machine(), "cases": rows}, indent=1) + "\n")


def fitcheck(program: Path, case: dict[str, Any]) -> int:
    targets = ",".join(case["target_modules"])
    shape = ["--batch-size", "4", "--seq-len", "768"]
    answer = run(
        program, MODEL, "--lora-r", str(case["rank"]), "--lora-targets", targets, *shape, "--flash-attn", "--json"
    )
    return round(answer["memory_mib"]["total"] * 2**20)


def canifinetune(program: Path, case: dict[str, Any]) -> int:
    scope = "conservative" if "q_proj" in case["target_modules"] else "all_linear"
    shape = ["--seq-len", "768", "--micro-batch-size", "4", "--lora-rank", str(case["rank"]), "--target-scope", scope]
    kind = ["--method", "lora", "--quantization", "none", "--optimizer", "adamw_torch", "--no-gradient-checkpointing"]
    answer = run(program, "estimate", "--model", MODEL, "--gpu-vram-gb", "48", *shape, *kind, "--json", "--offline")
    memory = answer["memory"]
    return round((memory["total_estimated_gb"] - memory["safety_margin_gb"]) * GIB)


def peft_doctor(program: Path) -> int:
    """It asks for neither rank nor targets."""
    size = ["--params-billion", "3.2127", "--hidden-size", "3072", "--num-layers", "28"]
    shape = ["--seq-len", "768", "--batch-size", "4", "--no-gradient-checkpointing"]
    answer = run(program, "estimate", "-m", "llama-3.2-3b", *size, *shape, "-o", "json")
    return round(answer["metadata"]["estimated_total_gb"] * GIB)


def run(program: Path, *arguments: str) -> dict[str, Any]:
    """The JSON object that a program prints, whatever it prints before it; statuses that mean "does not fit" are fine."""
    done = subprocess.run([str(program), *arguments], capture_output=True, text=True, check=False)
    answer: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    return answer


if __name__ == "__main__":
    main()
