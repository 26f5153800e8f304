"""Measure time and memory of a pass (forward and backward) by number of arms, rank, and length of examples.

    python -m benchmarks.engine.growth MODEL DATA [--layers 28,29] [--out growth.json]

One value varies at a time; the others stay at 1 arm, rank 16 and unchanged examples (up to 128 tokens). Seconds are processor
seconds of the process on one thread, the minimum of three passes; memory is the growth of the peak resident set over the
process before the pass.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.engine.common import describe_machine, make_runtime
from rightrank.schema.trials import Arm
from rightrank.train.device import read_peak_bytes, reset_peak_memory
from rightrank.train.multi_lora import ArmBatch, MultiLora
from rightrank.train.runtime import Runtime

PASSES = 3


def measure(runtime: Runtime, ranks: list[int], indices: list[int]) -> dict[str, float]:
    with MultiLora(runtime.model, runtime.settings) as multi_lora:
        for number, rank in enumerate(ranks):
            arm = Arm(rank=rank, learning_rate=1e-3, lora_alpha=32.0, seed=0, steps=1)
            multi_lora.add(f"g{number}", arm, runtime.make_config(arm))
        batch = runtime.make_batch("train", indices)
        arm_batches = [ArmBatch(f"g{number}", batch, 1.0, None) for number in range(len(ranks))]
        runtime.accumulate_gradients(multi_lora, arm_batches)  # Prefix, gradients and allocator now exist.
        times: list[float] = []
        reset_peak_memory(runtime.loaded.device)
        for _ in range(PASSES):
            begun = time.process_time()
            runtime.accumulate_gradients(multi_lora, arm_batches)
            times.append(time.process_time() - begun)
        peak = read_peak_bytes(runtime.loaded.device)
    return {"arms": len(ranks), "rank": ranks[0], "tokens": batch.tokens, "seconds": min(times), "peak_bytes": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--layers", default="28,29")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path, default=Path("bench-work"))
    arguments = parser.parse_args()
    layers = tuple(int(layer) for layer in arguments.layers.split(","))
    runtime = make_runtime(
        arguments.model, arguments.data, 1, arguments.work, layers_to_transform=layers, max_eval_examples=8
    )
    usual = runtime.plan_batches(0)[0]
    by_length = np.argsort(runtime.data.splits["train"].lengths, kind="stable").tolist()
    begins = [int(share * len(by_length)) for share in (0.05, 0.5, 0.95)]
    lengths = [by_length[begin : begin + 8] for begin in begins]
    result: dict[str, Any] = {
        "machine": describe_machine(),
        "arms": [measure(runtime, [16] * arms, usual) for arms in (1, 2, 4, 8)],
        "rank": [measure(runtime, [rank], usual) for rank in (1, 4, 16, 64, 256)],
        "length": [measure(runtime, [16], indices) for indices in lengths],
    }
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
