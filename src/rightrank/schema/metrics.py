"""Metrics: their names, directions, kinds, default margins and noise.

A metric is named by a built-in name or by a function.

loss                            nats per token (per example for a classification, per pair for preference pairs)
accuracy, macro_f1              for a classification
reward_accuracy, reward_margin  for preference pairs
exact_match, f1, rougeL         of the text that the model generates for a prompt
MODULE:FUNCTION                 a Python function; MODULE may be a file, and `NAME=` before it gives it another name

A function may begin with `max:` or `min:`, which says whether higher or lower is better if the name does not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, TypeAlias, cast

from rightrank.schema.errors import ResultsError, suggest_name

Checkpoint: TypeAlias = Literal["last", "best"]  # the evaluation of a training that counts

LOWER_IS_BETTER = frozenset({
    # losses and perplexities
    "loss", "nll", "nll_loss", "negative_log_likelihood", "cross_entropy", "cross_entropy_loss", "ce_loss", "bce_loss",
    "log_loss", "logloss", "mlm_loss", "lm_loss", "hinge_loss", "hamming_loss", "zero_one_loss", "mse_loss", "l1_loss",
    "perplexity", "ppl", "word_perplexity", "byte_perplexity", "token_perplexity", "bits_per_byte", "bpb", "bpc",
    "bits_per_character",
    # errors
    "error", "error_rate", "classification_error", "wer", "cer", "ter", "mer", "wil", "der", "eer", "mse", "rmse", "mae",
    "mape", "smape", "rmsle", "msle", "mean_squared_error", "root_mean_squared_error", "mean_absolute_error",
    "mean_absolute_percentage_error", "mean_squared_log_error", "median_absolute_error", "max_error",
    "mean_squared_error_loss", "brier_score", "brier_score_loss", "ece", "expected_calibration_error", "calibration_error",
    "inaccuracy", "word_error_rate", "character_error_rate",
    # images
    "fid", "fid_score", "kid", "lpips",
})  # fmt: skip

HIGHER_IS_BETTER = frozenset({
    # classification
    "accuracy", "acc", "acc_norm", "balanced_accuracy", "balanced_accuracy_score", "accuracy_score", "mean_accuracy",
    "token_accuracy", "mean_token_accuracy", "binary_accuracy", "multiclass_accuracy", "categorical_accuracy",
    "sparse_categorical_accuracy", "top1", "top5", "top1_accuracy", "top5_accuracy", "top_1_accuracy", "top_5_accuracy",
    "top_1_acc", "top_5_acc", "acc1", "acc5", "acc_top1", "acc_top5", "acc@1", "acc@5", "accuracy_top1", "accuracy_top5",
    "f1", "f1_score", "f1_macro", "f1_micro", "f1_weighted", "macro_f1", "micro_f1", "weighted_f1", "precision", "recall",
    "precision_macro", "recall_macro", "precision_micro", "recall_micro", "precision_weighted", "recall_weighted",
    "macro_precision", "macro_recall", "overall_accuracy", "overall_f1", "overall_precision", "overall_recall",
    "precision_score", "recall_score", "sensitivity", "specificity", "auc", "roc_auc", "roc_auc_score", "auroc", "auprc",
    "pr_auc", "average_precision", "average_precision_score", "mcc", "matthews_correlation", "matthews_corrcoef",
    "cohen_kappa", "cohen_kappa_score",
    # regression and correlation
    "r2", "r2_score", "explained_variance", "explained_variance_score", "pearson", "pearsonr", "pearson_corrcoef",
    "spearman", "spearmanr", "spearman_corrcoef", "combined_score", "d2_tweedie_score",
    # generated text
    "exact_match", "em", "bleu", "sacrebleu", "chrf", "chrf++", "meteor", "rouge1", "rouge2", "rougel", "rougelsum",
    "rouge_1", "rouge_2", "rouge_l", "cider", "nist", "spice", "bleu1", "bleu2", "bleu3", "bleu4", "google_bleu", "bleurt",
    "comet", "bertscore", "bertscore_f1", "pass@1", "pass@5", "pass@10", "pass@100", "pass_at_1", "pass_at_10",
    "win_rate", "winrate", "success_rate", "mc1", "mc2", "mmlu", "gsm8k", "humaneval", "mbpp", "hellaswag",
    # preference pairs and reinforcement learning
    "reward", "mean_reward", "episode_reward", "episode_return", "return", "ep_rew_mean", "rewards_accuracies",
    "rewards_margins", "reward_accuracy", "reward_margin",
    # images and retrieval
    "map", "map50", "map_50", "map50_95", "map_75", "miou", "iou", "mean_iou", "jaccard", "jaccard_score", "dice",
    "dice_score", "psnr", "ssim", "ms_ssim", "inception_score", "clip_score", "mrr", "ndcg", "ndcg@10", "recall@1",
    "recall@5", "recall@10", "hit_rate", "pq",
})  # fmt: skip

_SPLITS = r"(?:(?:eval|test|val|validation|valid|dev|held_?out|metrics|summary)_)*"
_ENDINGS = r"(?:_epoch|_dataloader_idx_\d+)*"
_NAME = re.compile(rf"{_SPLITS}(.+?){_ENDINGS}")


def infer_direction(name: str) -> bool | None:
    """Return True if higher is better, False if lower is better, None if the name does not tell.

    The names above are recognized, also after the name of a held-out split (`eval_loss`, `val/acc`, `test.f1`), with Lightning's
    endings (`val_loss_epoch`) and lm-evaluation-harness' filter (`exact_match,strict-match`).
    """
    normalized_name = re.sub(r"[\s_/\-.]+", "_", name.lower().partition(",")[0]).strip("_")
    matched = _NAME.fullmatch(normalized_name)
    canonical_name = matched[1] if matched else normalized_name
    if canonical_name in LOWER_IS_BETTER:
        return False
    return True if canonical_name in HIGHER_IS_BETTER else None


def format_unknown_direction(name: str) -> str:
    """Return the beginning of an error message about a metric whose direction is unknown."""
    return f"metric {name!r}: its name does not tell whether higher or lower is better"


SpecKind: TypeAlias = Literal["loss", "classes", "pairs", "text", "function"]

BUILT_IN_METRICS: dict[str, SpecKind] = {
    "loss": "loss",
    "accuracy": "classes",
    "macro_f1": "classes",
    "reward_accuracy": "pairs",
    "reward_margin": "pairs",
    "exact_match": "text",
    "f1": "text",
    "rougeL": "text",
}
_NAMED = re.compile(r"([A-Za-z_][\w-]*)=(.+)", re.DOTALL)
_FUNCTION = re.compile(r"[^:]+:[A-Za-z_]\w*")
METRIC_FORMS = f"{', '.join(BUILT_IN_METRICS)}, MODULE:FUNCTION (after max: or min: if its name has no direction)"


class MetricSpec(NamedTuple):
    """A metric and how it is computed."""

    name: str  # the name in every record
    kind: SpecKind
    target: str = ""  # the function
    higher_is_better: bool | None = None  # as given; None: inferred from the name

    @property
    def is_eval_metric(self) -> bool:
        """Return whether every held-out evaluation computes this metric. Others need generated answers or predicted classes."""
        return self.kind in ("loss", "pairs") or self.name == "accuracy"


def _parse_metric(text: str) -> MetricSpec:
    direction_prefix, _, unsigned_text = text.partition(":")
    if direction_prefix in ("max", "min") and ":" in unsigned_text:
        return _parse_metric(unsigned_text)._replace(higher_is_better=direction_prefix == "max")
    name_match = _NAMED.fullmatch(text)
    name, target_text = (name_match[1], name_match[2]) if name_match else (None, text)
    if target_text in BUILT_IN_METRICS and (name is None or name == target_text):
        return MetricSpec(target_text, BUILT_IN_METRICS[target_text])
    if name in BUILT_IN_METRICS:
        raise ValueError(f"metric {text!r}: {name!r} is a built-in metric; give your metric another name")
    target = target_text.strip()
    if not _FUNCTION.fullmatch(target):
        raise ValueError(
            f"metric {text!r} is unknown{suggest_name(target_text, BUILT_IN_METRICS)}; the metrics are: {METRIC_FORMS}"
        )
    return MetricSpec(name or target.rpartition(":")[2], "function", target)


def parse_metrics(*texts: str) -> tuple[MetricSpec, ...]:
    """Parse the names of metrics; the first one decides.

    Raises:
        ValueError: an unknown metric, or two with the same name.
    """
    specs = tuple(_parse_metric(text) for text in texts)
    names = [spec.name for spec in specs]
    duplicate = next((name for name in names if names.count(name) > 1), None)
    if duplicate is not None:
        raise ValueError(
            f"metrics: {duplicate!r} is given twice; give each metric once, under different names (NAME=…)"
        )
    return specs


LossKind: TypeAlias = Literal["token_loss", "pair_loss", "loss"]  # per label token, per preference pair, per example
MetricKind: TypeAlias = LossKind | Literal["perplexity", "accuracy", "other"]

LOSS_KINDS: tuple[LossKind, ...] = ("token_loss", "pair_loss", "loss")
Margin: TypeAlias = float | str  # a number in the metric's unit, or a share of the gain over the base such as "1%"

DEFAULT_SHARE = 0.01  # of the gain over the base
# Margins without a base, and so without a gain, in the metric's unit.
LOSS_MARGIN = 0.005  # nats
SCORE_MARGIN = 0.005  # half a point of a score that is a fraction; of a percentage, a hundred times as much
OTHER_GAIN = 0.01  # of the best value of a metric that is neither: a smaller gain of one number over another is none
MISSING_BASE = (
    "without a result of the base there is no gain to take a share of, and only losses and shares of right answers have a default margin; "
    "add rank 0, or give a margin in the metric's unit"
)

_PERPLEXITY = re.compile(r"perplexity|\bppl\b")
_ACCURACY = re.compile(
    r"acc\b|accuracy|\bf1\b|\bem\b|exact match|pass 1|pass@|win ?rate|mmlu|gsm8k|humaneval|\bmath\b|correct|precision|recall|auc"
)


def infer_metric_kind(name: str, higher_is_better: bool, loss: LossKind = "token_loss") -> MetricKind:
    """Return the kind of metric that the name denotes; a loss is of the kind `loss`."""
    words = re.sub(r"[_/\-.]+", " ", name.lower())
    if not higher_is_better:
        if _PERPLEXITY.search(words):
            return "perplexity"
        return loss if re.search(r"loss|nll|nats", words) else "other"
    return "accuracy" if _ACCURACY.search(words) else "other"


def has_percentages(values: list[float]) -> bool:
    """Return whether accuracies are on a scale of 0 to 100."""
    return max(values) > 1 + 1e-9  # a fraction is at most 1


def parse_margin(margin: Any) -> Any:
    """Convert the text of a number to a number, and leave a share such as "1%" as text.

    Raises:
        ValueError: A text that is neither, or a margin that is not above 0.
    """
    if margin is None:
        return None
    text = str(margin).strip()
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        number = math.nan
    if isinstance(margin, bool) or not 0 < number < math.inf or (text.endswith("%") and number >= 100):
        raise ValueError(
            f"margin: got {margin!r}; give a share of the gain such as 1% (below 100%), or a number above 0 in the metric's unit"
        )
    return f"{number:g}%" if text.endswith("%") else number


def get_margin_share(margin: Margin | None) -> float | None:
    """Return the share of the gain that a margin is, the default if it is None; None for a number in the metric's unit."""
    if margin is None:
        return DEFAULT_SHARE
    return float(margin.removesuffix("%")) / 100 if isinstance(margin, str) else None


def requires_base(margin: Margin | None, kind: MetricKind) -> bool:
    """Return whether a margin needs the base's result: a given share of the gain, or none for a metric without a default margin."""
    return isinstance(margin, str) or (margin is None and kind == "other")


def compute_margin(
    margin: Margin | None, kind: MetricKind, reference: float, values: Iterable[float], gain: float | None
) -> float:
    """Compute a margin in the metric's unit.

    Args:
        reference: The value from which a perplexity's margin is computed.
        values: All values, which tell a percentage from a fraction.
        gain: How much better the reference is than the base, in the metric's unit; None if no base was measured. Without a gain above 0,
            a share is as without a base.

    Raises:
        ResultsError: There is no base, and the margin needs it.
    """
    share = get_margin_share(margin)
    if share is None:
        return float(cast(float, margin))
    if gain is not None and gain > 0:
        return share * gain
    if gain is None and requires_base(margin, kind):
        raise ResultsError(f"margin {100 * share:g}%: {MISSING_BASE}")
    return compute_default_margin(kind, reference, values)


def compute_default_margin(kind: MetricKind, reference: float, values: Iterable[float]) -> float:
    """Compute the margin without a gain, in the metric's unit; arguments as in `compute_margin`."""
    if kind == "perplexity":
        return abs(reference) * LOSS_MARGIN
    if kind == "other":
        return abs(reference) * OTHER_GAIN
    return LOSS_MARGIN if kind in LOSS_KINDS else SCORE_MARGIN * (100 if has_percentages(list(values)) else 1)
