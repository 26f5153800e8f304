"""Calculate (not measure) the hours of a selection on named GPUs. Writes results/hours.json and hours.md.

    python -m benchmarks.plan.hours

    hours = operations of the selection / (peak operations per second · utilisation · 3600)

The operations come from the plan: every operation of a traced step, times the steps and trainings of the strategy. An
evaluation takes half of them, or a third if blocks are recomputed. Peaks are the vendor's, for BF16 on tensor cores with FP32
accumulation and without sparsity. The utilisation, the fraction of the peak that the steps reach, is an assumption: lower for the small model,
whose kernels are short compared to their launches. Half of it doubles every number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.machine import describe_machine
from benchmarks.plan.architectures import FULL_CONFIGS
from benchmarks.results import store_result
from rightrank.planning.estimate import Estimator
from rightrank.report.format import format_duration
from rightrank.schema.settings import PlanSettings, SelectSettings
from rightrank.search.protocol import build_space
from rightrank.search.strategies import make_strategy
from rightrank.training.pace import RUN_EVALUATIONS

HERE = Path(__file__).parent
RESULT, PAGE = HERE / "results" / "hours.json", HERE / "hours.md"
UTILISATION = {"SmolLM2-135M": 0.1, "Llama-3.2-3B": 0.3, "Llama-3.1-8B": 0.3}  # assumed
GIB = 2**30
RUN: dict[str, Any] = {  # 2,000 examples of 512 tokens once, in batches of 8
    "ranks": (1, 4, 16, 64),
    "batch_size": 8,
    "seq_len": 512,
    "dtype": "bfloat16",
    "device": "cuda",
}
STEPS, EVAL_ITEMS, EVAL_POINTS = 250, 200, 4
MODELS: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {},
    "Llama-3.2-3B": {"gradient_checkpointing": True},
    "Llama-3.1-8B": {"gradient_checkpointing": True},
}
LOOP = {"packed": True, "loss": "chunked", "optim": "adamw_fused"}  # of `select`
# Peak TFLOP/s and memory in GiB, with the vendor's document.
GPUS: dict[str, tuple[float, float, str]] = {
    "H100 SXM": (989.4, 80, "NVIDIA H100 data sheet (1,979 with sparsity)"),
    "A100 80 GB": (312.0, 80, "NVIDIA A100 data sheet"),
    "L40S": (362.05, 48, "NVIDIA L40S data sheet"),
    "RTX 4090": (165.2, 24, "NVIDIA Ada GPU architecture white paper"),
    "L4": (121.0, 24, "NVIDIA L4 data sheet (242 with sparsity)"),
    "RTX 3090": (71.0, 24, "NVIDIA GA102 GPU architecture white paper"),
}


def plan_selection_cost(model: str) -> dict[str, Any]:
    """Return operations, trainings and memory of the selection."""
    settings = PlanSettings(**RUN | LOOP | MODELS[model])
    estimator = Estimator(FULL_CONFIGS[model](), settings)
    strategy = make_strategy("bracket", build_space(SelectSettings(ranks=settings.ranks), STEPS))
    cost, passes = strategy.estimate_cost(), 3 if settings.gradient_checkpointing else 2  # forward, again, and backward

    def operations(step: float, trainings: float, arms: int) -> float:
        ends = max(0.0, arms - 1 - trainings)
        evaluations = trainings * EVAL_POINTS + ends + RUN_EVALUATIONS
        return step * (trainings * STEPS + evaluations * EVAL_ITEMS / settings.batch_size / passes)

    steps = [estimator.get_step_trace(rank).flops for rank in settings.ranks]
    return {
        "expected_flops": operations(fmean(steps), cost.expected, strategy.estimate_arms()),
        "most_flops": operations(max(steps), cost.maximum, cost.max_arms),
        "expected_trainings": cost.expected,
        "most_trainings": cost.maximum,
        "needed_bytes": max(estimator.estimate(rank).needed_bytes for rank in settings.ranks),
        "gradient_checkpointing": MODELS[model].get("gradient_checkpointing", False),
    }


def format_cell(cost: Mapping[str, Any], gpu: str, utilisation: float) -> str:
    """Format `4 min, at most 9 min`, or a dash if the highest rank does not fit."""
    if cost["needed_bytes"] > GPUS[gpu][1] * GIB:
        return "–"
    speed = GPUS[gpu][0] * 1e12 * utilisation
    times = (format_duration(cost[name] / speed) for name in ("expected_flops", "most_flops"))
    return ", at most ".join(times)


def format_table(models: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield the lines of the table on the page."""
    yield f"| GPU (peak) | {' | '.join(models)} |"
    yield "|---" * (len(models) + 1) + "|"
    for gpu, (peak, _, _) in GPUS.items():
        cells = (format_cell(cost, gpu, UTILISATION[name]) for name, cost in models.items())
        yield f"| {gpu} ({peak:.0f} TFLOP/s) | {' | '.join(cells)} |"


def format_page(models: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    yield "# Hours of a selection on named GPUs\n"
    yield "**Calculated, not measured.** `python -m benchmarks.plan.hours` writes this page.\n"
    yield (
        f"Both answers by `bracket`, ranks {', '.join(map(str, RUN['ranks']))}, all linear modules, 2,000 examples of {RUN['seq_len']} "
        f"tokens once ({STEPS} steps of {RUN['batch_size']}), bfloat16. Hours are the plan's operations over the vendor's peak times "
        "an assumed utilisation, below; half of it doubles every number. A dash: the highest rank does not fit.\n"
    )
    yield from format_table(models)
    yield "\n| model | operations, expected | at most | trainings | memory of rank 64 | blocks recomputed | utilisation, assumed |"
    yield "|---|---|---|---|---|---|---|"
    for name, cost in models.items():
        yield (
            f"| {name} | {cost['expected_flops'] / 1e15:,.0f} PFLOP | {cost['most_flops'] / 1e15:,.0f} PFLOP | "
            f"{cost['expected_trainings']:.3g}, at most {cost['most_trainings']:.3g} | {cost['needed_bytes'] / GIB:.1f} GiB | "
            f"{'yes' if cost['gradient_checkpointing'] else 'no'} | {UTILISATION[name]:.0%} |"
        )
    yield "\n| GPU | memory | source of the peak, dense BF16 with FP32 accumulation |"
    yield "|---|---|---|"
    for gpu, (_, memory, source) in GPUS.items():
        yield f"| {gpu} | {memory:.0f} GiB | {source} |"


def main() -> None:
    models = {name: plan_selection_cost(name) for name in MODELS}
    store_result({**describe_machine(), "utilisation": UTILISATION, "run": RUN, "models": models}, RESULT)
    PAGE.write_text("\n".join(format_page(models)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
