"""What a metric's name and values tell: its kind, its default margin, its published noise."""

from __future__ import annotations

import re
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

MetricKind: TypeAlias = Literal["token_loss", "loss", "perplexity", "accuracy", "other"]

TOKEN_LOSS_MARGIN = 0.005  # nats per token
ACCURACY_MARGIN = 0.005  # half a point, as a fraction
PERCENT_MARGIN = 0.5  # half a point, as a percentage
RELATIVE_MARGIN = 0.01  # of the reference, for every other metric

# Of preference pairs: how far an adapter moves from the base. They contradict no decision unless the user names them.
REPORTED_ONLY = ("reward_margin", "chosen_log_ratio")

# The standard deviation of one training over seeds, from published repeats of long trainings. It is in no interval: short
# trainings differ by up to a hundred times as much (benchmarks/decide). Loss: repeats of SFT test loss (tinker-cookbook, sft_sweep.md). Accuracy: GSM8K 0.3 to 1.4 points, CoLA 1.2, RTE 0.7 (Hu et al. 2021 and PEFT's method comparison).
# Other: BLEU 0.15%, METEOR 0.4%, CIDEr 0.8% of the value (Hu et al. 2021, table 3).
LOSS_SEED_DEVIATION = 0.0003
ACCURACY_SEED_DEVIATION = 0.007
RELATIVE_SEED_DEVIATION = 0.004

_PERPLEXITY = re.compile(r"perplexity|\bppl\b")
_ACCURACY = re.compile(
    r"acc\b|accuracy|\bf1\b|\bem\b|exact match|pass 1|pass@|win ?rate|mmlu|gsm8k|humaneval|\bmath\b|correct|precision|recall|auc"
)


def _words(name: str) -> str:
    return re.sub(r"[_/\-.]+", " ", name.lower())


def kind_of(name: str, higher_is_better: bool) -> MetricKind:
    """The kind of metric that the name denotes. A loss is taken to be per token."""
    words = _words(name)
    if not higher_is_better:
        if _PERPLEXITY.search(words):
            return "perplexity"
        return "token_loss" if re.search(r"loss|nll|nats", words) else "other"
    return "accuracy" if _ACCURACY.search(words) else "other"


def is_percent(values: list[float]) -> bool:
    """Whether accuracies are on a scale of 0 to 100."""
    return max(values) > 1 + 1e-9  # a fraction is at most 1


def span_of(kind: MetricKind, sums: ArrayLike, weights: ArrayLike = 1.0) -> float:
    """The range of one example's score; 0 for losses, which have no bound.

    Args:
        sums: [..., examples] scores times weights.
        weights: [examples]
    """
    if kind in ("token_loss", "loss", "perplexity"):
        return 0.0
    scores = np.abs(np.divide(sums, weights))
    if kind != "accuracy":
        return float(np.max(scores)) or 1.0
    # shares of a metric that is no mean of examples exceed 1 one by one, but not on average
    return 100.0 if is_percent([float(np.mean(scores))]) or (np.isin(scores, (0, 100)).all() and scores.any()) else 1.0


def default_margin(kind: MetricKind, reference: float, values: list[float]) -> float:
    """The default margin in the metric's unit: 0.005 nats per token, half a point of accuracy, else 1% of the reference.

    For a perplexity, 0.005 nats are half a percent of the reference. For a reference of 0, the margin is 1% of the largest
    value, or 0.01.
    """
    if kind == "token_loss":
        return TOKEN_LOSS_MARGIN
    if kind == "accuracy":
        return PERCENT_MARGIN if is_percent(values) else ACCURACY_MARGIN
    if kind == "perplexity":
        return abs(reference) * TOKEN_LOSS_MARGIN
    return RELATIVE_MARGIN * (abs(reference) or max(map(abs, values), default=0.0) or 1.0)


def published_deviation(kind: MetricKind, reference: float, values: list[float]) -> float:
    """The published standard deviation of one training over seeds, in the oriented unit (nats for a perplexity)."""
    if kind in ("token_loss", "perplexity"):
        return LOSS_SEED_DEVIATION
    if kind == "accuracy":
        return ACCURACY_SEED_DEVIATION * (100 if is_percent(values) else 1)
    return abs(reference) * RELATIVE_SEED_DEVIATION
