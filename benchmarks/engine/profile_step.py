"""Where the time of a training step goes, by the kind of work.

    python -m benchmarks.engine.profile_step MODEL DATA [--layers 28,29] [--arms 1] [--dtype float32] [--steps 6]

Operators are distinguished by their shapes: a matrix product with a side of the arm's rank is an adapter's, one with a
side of the vocabulary is the head's, the others are the base's. What the operators don't account for is Python. Beside
it the rate of products of the base's shapes, and of one large product: what this processor can do.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.engine.common import machine, make_runtime
from rightrank.schema.events import Listener
from rightrank.schema.trials import Arm, Trial
from rightrank.train.loop import train_trials
from rightrank.train.trial import TrialFolders

RANK = 12  # a size that nothing else in the model has
MATMULS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::addmm_", "aten::baddbmm_")


def kind_of(name: str, shapes: list[Any], vocabulary: int) -> str:
    sizes = {size for shape in shapes if isinstance(shape, list) for size in shape if isinstance(size, int)}
    if name.startswith("aten::_fused_adam") or "foreach_norm" in name:
        return "optimizer"
    if name in MATMULS:
        return "adapter matmuls" if RANK in sizes else "head and loss" if vocabulary in sizes else "base matmuls"
    if "scaled_dot_product" in name or "flash_attention" in name:
        return "attention"
    if vocabulary in sizes or "nll_loss" in name:
        return "head and loss"
    if RANK in sizes:
        return "adapter, elementwise"
    return "elementwise and copies"


def measure(runtime: Any, arms: int, steps: int, folder: Path) -> dict[str, Any]:
    trials = [
        Trial(trial_id=f"p{i}", arm=Arm(rank=RANK, learning_rate=1e-4 * (i + 1), lora_alpha=32.0, seed=0, steps=steps))
        for i in range(arms)
    ]
    folders = lambda trial: TrialFolders(folder / f"{trial.trial_id}.ckpt", folder / trial.trial_id)  # noqa: E731
    runtime.evaluate("selection")
    list(train_trials(runtime, trials, None, folders, Listener(), arms))  # warm: prefix, allocator
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        begun = time.perf_counter()
        outcomes = list(train_trials(runtime, trials, None, folders, Listener(), arms))
        wall = time.perf_counter() - begun
    seconds: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages(group_by_input_shape=True):
        seconds[kind_of(event.key, event.input_shapes, runtime.model.config.vocab_size)] += (
            event.self_cpu_time_total / 1e6
        )
    seconds["Python and the rest"] = wall - sum(seconds.values())
    trained = sum(outcome.train_seconds for outcome in outcomes)
    return {
        "wall_seconds": wall,
        "train_seconds": trained,
        "share": {k: round(v / wall, 3) for k, v in sorted(seconds.items(), key=lambda kv: -kv[1])},
    }


def matmul_rates(runtime: Any, rows: int) -> dict[str, float]:
    """GFLOP/s of `rows` rows times each shape of the base's linear layers, and of a product of 2048 × 2048 matrices."""
    dtype = next(runtime.model.parameters()).dtype
    shapes = sorted({(one.out_features, one.in_features) for one in runtime.targets.modules})
    sizes = {f"{rows} x {i} x {o}": (rows, i, o) for o, i in shapes} | {"2048 x 2048 x 2048": (2048, 2048, 2048)}
    rates: dict[str, float] = {}
    for name, (m, k, n) in sizes.items():
        left, right = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
        times: list[float] = []
        for _ in range(6):
            begun = time.process_time()
            torch.nn.functional.linear(left, right)
            times.append(time.process_time() - begun)
        rates[name] = round(2 * m * k * n / min(times) / 1e9, 1)
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--layers", default=None)
    parser.add_argument("--arms", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path, default=Path("bench-work"))
    arguments = parser.parse_args()
    changes: dict[str, Any] = {"dtype": arguments.dtype, "eval_items": 2, "eval_points": 1, "ranks": (RANK,)}
    if arguments.layers:
        changes["layers_to_transform"] = tuple(int(part) for part in arguments.layers.split(","))
    runtime = make_runtime(arguments.model, arguments.data, arguments.steps, arguments.work, **changes)
    facts = {"machine": machine(), "arms": arguments.arms, "layers": arguments.layers, "dtype": arguments.dtype}
    rates = {"gflops": matmul_rates(runtime, 640)}
    text = json.dumps(facts | measure(runtime, arguments.arms, arguments.steps, arguments.work) | rates, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
