"""Compare the decision with simple rules on published curves.

    python -m benchmarks.decide.published      # prints the tables, writes published.json

`published_curves.json` holds 56 curves with their sources. `acceptable_ranks` is a careful reader's judgement, not a
truth; `rising` follows a stated rule. With one number for each rank, every answer carries the flag `underpowered` or uses
a stated deviation.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine
from rightrank.decision.rule import decide_table
from rightrank.decision.table import build_table
from rightrank.schema.metrics import MetricKind, has_percentages, infer_metric_kind
from rightrank.schema.results import Decision
from rightrank.schema.trials import Arm, TrialFinished

HERE = Path(__file__).parent
CURVES = HERE / "published_curves.json"
ALWAYS = 16
# The standard deviation of one training over seeds, from published repeats of long trainings. Loss: repeats of SFT test loss
# (tinker-cookbook, sft_sweep.md). Accuracy: GSM8K 0.3 to 1.4 points, CoLA 1.2, RTE 0.7 (Hu et al. 2021 and PEFT's method
# comparison). Other: BLEU 0.15%, METEOR 0.4%, CIDEr 0.8% of the value (Hu et al. 2021, table 3).
LOSS_DEVIATION, ACCURACY_DEVIATION, RELATIVE_DEVIATION = 0.0003, 0.007, 0.004

Curve = dict[str, Any]


def read_curves() -> list[Curve]:
    loaded: list[Curve] = json.loads(CURVES.read_text(encoding="utf-8"))["curves"]
    return loaded


def decide_curve(curve: Curve) -> Decision:
    """Decide on one number for each rank, with the curve's stated deviation if there is one."""
    trials = [
        _make_trial(curve, rank, 0.0, value, curve["std"])
        for rank, value in zip(curve["ranks"], curve["values"], strict=True)
    ]
    return _decide(curve, trials)


def decide_grid(curve: Curve) -> Decision:
    """Decide on the complete rank × learning rate grid."""
    trials = [
        _make_trial(curve, int(rank), float(rate), value)
        for rank, rates in curve["lr_grid"].items()
        for rate, value in rates.items()
        if value is not None
    ]
    return _decide(curve, trials)


def _make_trial(
    curve: Curve, rank: int, rate: float, value: float, seed_deviation: float | None = None
) -> TrialFinished:
    fields = {
        "trial_id": f"{rank} {rate:g}" if rate else str(rank),
        "value": value,
        "metrics": {curve["metric"]: value},
    }
    arm = Arm(rank=rank, learning_rate=rate, lora_alpha=1, seed=0, steps=0)
    return TrialFinished(**arm.model_dump(), **fields, seed_deviation=seed_deviation)


def _decide(curve: Curve, trials: list[TrialFinished]) -> Decision:
    return decide_table(build_table(trials, curve["metric"], curve["higher_is_better"]), curve["margin"])


def orient_values(curve: Curve) -> dict[int, float]:
    sign = -1 if curve["higher_is_better"] else 1
    return {rank: sign * value for rank, value in zip(curve["ranks"], curve["values"], strict=True)}


def pick_fixed_rank(curve: Curve) -> int:
    """Return rank 16, or the nearest rank that was tried."""
    return min(curve["ranks"], key=lambda rank: (abs(math.log2(rank / ALWAYS)), rank))


def pick_best_rank(curve: Curve) -> int:
    by_rank = orient_values(curve)
    return min(by_rank, key=lambda rank: (by_rank[rank], rank))


def pick_within_standard_error(curve: Curve) -> int:
    """Return the smallest rank within one standard error of the best; the published noise replaces an error that is not stated."""
    by_rank = orient_values(curve)
    best = min(by_rank.values())
    kind = infer_metric_kind(curve["metric"], curve["higher_is_better"])
    error = curve["std"] or get_published_deviation(kind, best, curve["values"])
    return min(rank for rank, loss in by_rank.items() if loss <= best + error)


def get_published_deviation(kind: MetricKind, reference: float, values: list[float]) -> float:
    """Return the published standard deviation of one training over seeds, in the oriented unit (nats for a perplexity)."""
    if kind in ("token_loss", "perplexity"):
        return LOSS_DEVIATION
    if kind == "accuracy":
        return ACCURACY_DEVIATION * (100 if has_percentages(values) else 1)
    return abs(reference) * RELATIVE_DEVIATION


def pick_knee(curve: Curve) -> int:
    """Return the knee over log2 rank (Satopää et al. 2011, the `kneed` package), or the highest rank without a knee."""
    from kneed import KneeLocator

    by_rank = orient_values(curve)
    log_ranks = [math.log2(rank) for rank in by_rank]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        knee = KneeLocator(log_ranks, list(by_rank.values()), curve="convex", direction="decreasing").knee
    return max(by_rank) if knee is None else round(2**knee)


def pick_most_gain(curve: Curve) -> int:
    """Return the smallest rank with 95% of the gain from the worst to the best value."""
    by_rank = orient_values(curve)
    best, worst = min(by_rank.values()), max(by_rank.values())
    return min(rank for rank, loss in by_rank.items() if worst - loss >= 0.95 * (worst - best))


RULES: dict[str, Callable[[Curve], int | None]] = {
    "rightrank": lambda curve: decide_curve(curve).rank,
    "always 16": pick_fixed_rank,
    "argmin": pick_best_rank,
    "one standard error": pick_within_standard_error,
    "Kneedle": pick_knee,
    "95% of the gain": pick_most_gain,
}


def score_rule(rule: Callable[[Curve], int | None], all_curves: list[Curve]) -> dict[str, float]:
    """Return the share of acceptable picks, and how many of the others are too low or too high."""
    picks = [(rule(curve), curve["acceptable_ranks"]) for curve in all_curves]
    named = [(pick, good) for pick, good in picks if pick is not None]
    return {
        "acceptable": sum(pick in good for pick, good in named),
        "too small": sum(pick < min(good) for pick, good in named),
        "too large": sum(pick > max(good) for pick, good in named),
        "of": len(picks),
    }


def count_rising(all_curves: list[Curve]) -> dict[str, int]:
    is_rising = {curve["id"]: decide_curve(curve).verdict == "rising" for curve in all_curves}
    return {
        "rise": sum(curve["rising"] for curve in all_curves),
        "said of those": sum(is_rising[curve["id"]] for curve in all_curves if curve["rising"]),
        "said of others": sum(is_rising[curve["id"]] for curve in all_curves if not curve["rising"]),
    }


def list_misses(all_curves: list[Curve]) -> list[dict[str, Any]]:
    return [
        {
            "id": curve["id"],
            "pick": decide_curve(curve).rank,
            "acceptable": curve["acceptable_ranks"],
            "values": dict(zip(map(str, curve["ranks"]), curve["values"], strict=True)),
            "margin": curve["margin"],
            "reader": curve["why"],
        }
        for curve in all_curves
        if decide_curve(curve).rank not in curve["acceptable_ranks"]
    ]


def judge_grids(all_curves: list[Curve]) -> dict[str, int]:
    """Count, with all learning rates in the table, acceptable picks and best learning rates at the edge."""
    with_grid = [curve for curve in all_curves if "lr_grid" in curve]
    decisions = [decide_grid(curve) for curve in with_grid]
    return {
        "grids": len(with_grid),
        "acceptable": sum(
            decision.rank in curve["acceptable_ranks"] for curve, decision in zip(with_grid, decisions, strict=True)
        ),
        "lr_edge": sum("lr_edge" in decision.flags for decision in decisions),
        "winner_gap": sum("selection_bias" in decision.flags for decision in decisions),
    }


def main() -> None:
    all_curves = read_curves()
    scores = {name: score_rule(rule, all_curves) for name, rule in RULES.items()}
    print(f"{'rule':20} acceptable  too small  too large   of {len(all_curves)}")
    for name, scores_by_rule in scores.items():
        print(
            f"{name:20} {scores_by_rule['acceptable']:10} {scores_by_rule['too small']:10} {scores_by_rule['too large']:10}"
        )
    result = {
        "machine": describe_machine(),
        "scores": scores,
        "rising": count_rising(all_curves),
        "grids": judge_grids(all_curves),
        "misses": list_misses(all_curves),
    }
    print(json.dumps({name: result[name] for name in ("rising", "grids", "misses")}, indent=1))
    (HERE / "published.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
