"""Where the time of `rightrank plan` goes; writes plan_time.json and plan_time.md beside this file.

    python -m benchmarks.first_minutes.plan_time MODEL

Processor seconds (user and system) of fresh processes on one thread, the least of five: unlike wall seconds, they hardly depend on what
else the machine does. Every stage includes the ones above it. Garbage collection is off in all, as in the command.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.machine import machine, machine_text
from benchmarks.results import store

HERE = Path(__file__).parent
TIMES = 5
OFF = "import gc; gc.disable(); "
STAGES = {
    "python": "",
    "torch": "import torch",
    "transformers' model class": "from transformers import LlamaForCausalLM",
    "peft": "import peft",
    "rightrank's planner and settings": "import rightrank.plugins.plan.planner",
}
PLAN = (
    "from rightrank.plugins.plan.skeleton import read_config; from rightrank.plugins.plan.planner import plan_config; "
    "from rightrank.schema.plan_settings import PlanSettings; "
    "plan_config(read_config({model!r}, False), 'm', PlanSettings(ranks=[8, 16]))"
)


def processor_seconds(command: list[str]) -> float:
    """The least of some runs; the first fills the cache and is not counted."""
    times = []
    for _ in range(TIMES + 1):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(times[1:])


def measured(model: str) -> dict[str, float]:
    found: dict[str, float] = {}
    so_far = OFF
    for name, code in STAGES.items():
        so_far += code + "; " if code else ""
        found[name] = processor_seconds([sys.executable, "-c", so_far])
    planned = PLAN.format(model=model)
    found["the table of two ranks, in a step of Trainer"] = processor_seconds([sys.executable, "-c", so_far + planned])
    command = [sys.executable, "-m", "rightrank", "plan", model, "--ranks", "8,16"]
    found["the command"] = processor_seconds(command)
    return found


def page(found: Mapping[str, Any]) -> Iterator[str]:
    facts = machine_text(found["machine"])
    yield "# Where the time of `rightrank plan` goes\n"
    yield f"{facts}. Made by `python -m benchmarks.first_minutes.plan_time MODEL` (SmolLM2-135M, ranks 8 and 16).\n"
    yield "| up to and including | processor seconds | of these, this stage |"
    yield "|---|---|---|"
    before = 0.0
    for name, seconds in found["seconds"].items():
        yield f"| {name} | {seconds:.2f} | {seconds - before:.2f} |"
        before = seconds
    share = found["seconds"]["transformers' model class"] / before
    yield (
        f"\ntorch and the class of the model are {share:.0%}. A step can't be traced without them, so a plan in 3 s is out of reach on this machine: "
        "the class imports `transformers.modeling_utils`, which imports `torch.distributed.tensor`, `torch._dynamo`, `scipy` and `accelerate`."
    )


def main() -> None:
    found = {"machine": machine(), "load": os.getloadavg(), "seconds": measured(sys.argv[1])}
    store(found, HERE / "plan_time.json")
    (HERE / "plan_time.md").write_text("\n".join(page(found)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
