"""The metrics whose direction is known from their name. Every other metric needs a direction from the user.

A name is looked up as a whole: parts of a name prove nothing (`accuracy_drop`, `brier_score`, `negative_log_likelihood`).
"""

from __future__ import annotations

import re

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


def direction(name: str) -> bool | None:
    """True if higher is better, False if lower is, None if it is not known.

    Known are the names above, after the name of a held-out split (`eval_loss`, `val/acc`, `test.f1`), with Lightning's
    endings (`val_loss_epoch`) and lm-evaluation-harness' filter (`exact_match,strict-match`).
    """
    plain = re.sub(r"[\s_/\-.]+", "_", name.lower().partition(",")[0]).strip("_")
    found = _NAME.fullmatch(plain)
    known = found[1] if found else plain
    if known in LOWER_IS_BETTER:
        return False
    return True if known in HIGHER_IS_BETTER else None


def unknown_direction(name: str) -> str:
    """What to do about a metric whose direction is not known, as the end of an error message."""
    return f"metric {name!r}: whether higher or lower is better is not known from its name"
