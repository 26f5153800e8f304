"""Measure how the time of a training step divides among kinds of work.

    python -m benchmarks.engine.profile_step MODEL DATA [--layers 28,29] [--arms 1] [--dtype float32] [--steps 6]

Operators are classified by their shapes: a matrix product with a side of the arm's rank belongs to an adapter, one with a
side of the vocabulary to the head, the others to the base model. Time without an operator is Python's. The result also has
the rate of products of the base model's shapes and of one large product, which shows what this processor can do, and the components
of one layer (`pieces`), forward and backward, each the minimum of several processor times, so that other work has little effect.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.engine.common import describe_machine, make_runtime
from rightrank.schema.events import Listener
from rightrank.schema.trials import Arm, Trial
from rightrank.train.batches import use_float32_attention, use_packed_attention
from rightrank.train.loop import train_trials
from rightrank.train.prefix import find_blocks
from rightrank.train.trial import TrialFolders

RANK = 12  # a size that no other dimension of the model has
MATMULS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::addmm_", "aten::baddbmm_")


def classify_operation(name: str, shapes: list[Any], vocabulary: int) -> str:
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
    runtime.evaluate("validation")
    list(train_trials(runtime, trials, None, folders, Listener(), arms))  # warms up prefix and allocator
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        begun = time.perf_counter()
        outcomes = list(train_trials(runtime, trials, None, folders, Listener(), arms))
        wall = time.perf_counter() - begun
    seconds: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages(group_by_input_shape=True):
        seconds[classify_operation(event.key, event.input_shapes, runtime.model.config.vocab_size)] += (
            event.self_cpu_time_total / 1e6
        )
    seconds["Python and the rest"] = wall - sum(seconds.values())
    trained = sum(outcome.train_seconds for outcome in outcomes)
    return {
        "wall_seconds": wall,
        "train_seconds": trained,
        "share": {k: round(v / wall, 3) for k, v in sorted(seconds.items(), key=lambda kv: -kv[1])},
    }


def time_components(runtime: Any, lengths: Sequence[int]) -> dict[str, float]:
    """Return the milliseconds of each component of a layer, forward and backward, on joined examples of these lengths.

    `products_at_peak` is the time of the layer's products at the rate of one large product.
    """
    config, dtype, rows = runtime.model.config, next(runtime.model.parameters()).dtype, sum(lengths)
    block = find_blocks(runtime.model)[1][0]
    layers = [layer for layer in block.modules() if isinstance(layer, torch.nn.Linear)]
    hidden_size, intermediate_size = config.hidden_size, config.intermediate_size
    count, head = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    heads = [torch.randn(1, rows, n, head).to(dtype) for n in (count, *[config.num_key_value_heads] * 2)]
    transposed = [tensor.transpose(1, 2).requires_grad_() for tensor in heads]
    inputs = {size: torch.randn(1, rows, size).to(dtype).requires_grad_() for size in (hidden_size, intermediate_size)}
    factors = [torch.randn(rows, RANK).to(dtype), torch.randn(rows, RANK).to(dtype)]

    def products() -> None:
        for layer in layers:
            y = torch.nn.functional.linear(inputs[layer.in_features].detach()[0], layer.weight)
            y @ layer.weight

    def adapters() -> None:
        for layer in layers:
            a, b = torch.zeros(RANK, layer.in_features).to(dtype), torch.zeros(layer.out_features, RANK).to(dtype)
            x, y = inputs[layer.in_features].detach()[0], torch.zeros(rows, layer.out_features, dtype=dtype)
            y.addmm_(x @ a.T, b.T)
            torch.addmm(x, y @ b, a), y.T @ factors[0], factors[1].T @ x

    def attention() -> None:
        with use_float32_attention() if dtype != torch.float32 else nullcontext():
            with use_packed_attention(lengths, torch.device("cpu")):
                y = ALL_ATTENTION_FUNCTIONS["sdpa"](block.self_attn, *transposed, None, is_causal=True)[0]
            y.backward(torch.ones_like(y))

    def backward(y: torch.Tensor) -> None:
        y.backward(torch.ones_like(y))

    peak = max(measure_matmul_rates(runtime, rows).values())
    work = sum(4 * rows * layer.weight.numel() for layer in layers)
    return {
        "products": _time_shortest(products),
        "products_at_peak": round(work / peak / 1e6, 2),
        "adapters": _time_shortest(adapters),
        "attention": _time_shortest(attention),
        "two_norms": 2 * _time_shortest(lambda: backward(block.input_layernorm(inputs[hidden_size]))),
        "activation": _time_shortest(
            lambda: backward(torch.nn.functional.silu(inputs[intermediate_size]) * inputs[intermediate_size])
        ),
    }


def _time_shortest(action: Callable[[], object], times: int = 12) -> float:
    durations = []
    for _ in range(times):
        begun = time.process_time()
        action()
        durations.append(time.process_time() - begun)
    return round(1000 * min(durations), 2)


def measure_matmul_rates(runtime: Any, rows: int) -> dict[str, float]:
    """Measure the GFLOP/s of `rows` rows times each shape of the base model's linear layers, and of a 2048 × 2048 product."""
    dtype = next(runtime.model.parameters()).dtype
    shapes = sorted({(module.out_features, module.in_features) for module in runtime.targets.modules})
    sizes = {f"{rows} x {i} x {o}": (rows, i, o) for o, i in shapes} | {"2048 x 2048 x 2048": (2048, 2048, 2048)}
    rates: dict[str, float] = {}
    for name, (m, k, n) in sizes.items():
        left_matrix, right_matrix = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
        times: list[float] = []
        for _ in range(6):
            begun = time.process_time()
            torch.nn.functional.linear(left_matrix, right_matrix)
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
    changes: dict[str, Any] = {"dtype": arguments.dtype, "max_eval_examples": 2, "num_evaluations": 1, "ranks": (RANK,)}
    if arguments.layers:
        changes["layers_to_transform"] = tuple(int(layer) for layer in arguments.layers.split(","))
    runtime = make_runtime(arguments.model, arguments.data, arguments.steps, arguments.work, **changes)
    facts = {
        "machine": describe_machine(),
        "arms": arguments.arms,
        "layers": arguments.layers,
        "dtype": arguments.dtype,
    }
    rows = [runtime.data.splits["train"][index].length for index in runtime.plan_batches(0)[0]]
    rates = {
        "gflops": measure_matmul_rates(runtime, 640),
        "rows": sum(rows),
        "ms_of_a_layer": time_components(runtime, rows),
    }
    text = json.dumps(facts | measure(runtime, arguments.arms, arguments.steps, arguments.work) | rates, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
