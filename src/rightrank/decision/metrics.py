"""What a metric's name and values say: its direction, its scale, its default margin, its published noise."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Literal, TypeAlias

MetricKind: TypeAlias = Literal["token_loss", "loss", "perplexity", "accuracy", "other"]

TOKEN_LOSS_MARGIN = 0.005  # nats a token
ACCURACY_MARGIN = 0.005  # half a point, as a fraction
PERCENT_MARGIN = 0.5  # half a point, as a percentage
RELATIVE_MARGIN = 0.01  # of the reference, for every other metric

# One training's standard deviation over seeds, from repeats that others published. A floor where a table holds one
# seed, never a measurement of it. Loss: repeats of SFT test loss at ordinary rates (tinker-cookbook, sft_sweep.md).
# Accuracy: GSM8K 0.3 to 1.4 points, CoLA 1.2, RTE 0.7 (Hu et al. 2021 and PEFT's method comparison). Other:
# BLEU 0.15%, METEOR 0.4%, CIDEr 0.8% of the value (Hu et al. 2021, table 3).
LOSS_SEED_DEVIATION = 0.0003
ACCURACY_SEED_DEVIATION = 0.007
RELATIVE_SEED_DEVIATION = 0.004

_LOWER = re.compile(
    r"loss|nll|perplexity|\bppl\b|error|\bwer\b|\bcer\b|rmse|\bmse\b|\bmae\b|mape|bits|bpb|bpc|regret|forget"
)
_PERPLEXITY = re.compile(r"perplexity|\bppl\b")
_ACCURACY = re.compile(
    r"acc\b|accuracy|\bf1\b|\bem\b|exact match|pass 1|pass@|win ?rate|mmlu|gsm8k|humaneval|\bmath\b|correct|precision|recall|auc"
)
_HIGHER = re.compile(
    r"bleu|rouge|meteor|cider|nist|score|reward|return|bench|mcc|matthews|pearson|spearman|r2|likelihood"
)


def _words(name: str) -> str:
    return re.sub(r"[_/\-.]+", " ", name.lower())


def direction(name: str) -> bool | None:
    """True where higher is better, False where lower is, None where the name doesn't tell."""
    words = _words(name)
    if _LOWER.search(words):
        return False
    return True if _ACCURACY.search(words) or _HIGHER.search(words) else None


def higher_is_better(name: str, lower: Collection[str] = ()) -> bool:
    """The same of a metric that a selection measures: a score where nothing says otherwise; `lower` names those that aren't."""
    return name not in lower and direction(name) is not False


def kind_of(name: str, higher_is_better: bool) -> MetricKind:
    """What kind of number a metric of this name is; a language model's loss is one a token."""
    words = _words(name)
    if not higher_is_better:
        if _PERPLEXITY.search(words):
            return "perplexity"
        return "token_loss" if re.search(r"loss|nll|nats", words) else "other"
    return "accuracy" if _ACCURACY.search(words) else "other"


def is_percent(values: list[float]) -> bool:
    """Whether accuracies are on a scale to 100."""
    return max(values) > 1.5


def default_margin(kind: MetricKind, reference: float, values: list[float]) -> float:
    """In the metric's own unit: 0.005 nats a token, half a point of accuracy, else 1% of the reference.

    A perplexity's is 0.005 nats too, so half a percent of the reference. 1% of nothing would be no margin: there it is
    1% of the largest value, or 0.01.
    """
    if kind == "token_loss":
        return TOKEN_LOSS_MARGIN
    if kind == "accuracy":
        return PERCENT_MARGIN if is_percent(values) else ACCURACY_MARGIN
    if kind == "perplexity":
        return abs(reference) * TOKEN_LOSS_MARGIN
    return RELATIVE_MARGIN * (abs(reference) or max(map(abs, values), default=0.0) or 1.0)


def published_deviation(kind: MetricKind, reference: float, values: list[float]) -> float:
    """The seed noise that a single training is taken to have, in the oriented unit (nats for a perplexity)."""
    if kind in ("token_loss", "perplexity"):
        return LOSS_SEED_DEVIATION
    if kind == "accuracy":
        return ACCURACY_SEED_DEVIATION * (100 if is_percent(values) else 1)
    return abs(reference) * RELATIVE_SEED_DEVIATION
