"""Test which directions of metrics are inferred from names that public trackers and libraries log.

The kind, margin and published noise of a metric are tested too.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rightrank.schema.errors import ResultsError
from rightrank.schema.metrics import (
    BUILT_IN_METRICS,
    HIGHER_IS_BETTER,
    LOWER_IS_BETTER,
    MetricSpec,
    compute_margin,
    has_percentages,
    infer_direction,
    infer_metric_kind,
    parse_metrics,
)

# These names are logged by: transformers' Trainer and its example scripts, TRL, Lightning and torchmetrics, `evaluate`,
# scikit-learn, Keras, timm, Ultralytics, MMDetection, lm-evaluation-harness, HELM, ESPnet and NeMo, Stable-Baselines3, nanoGPT.
LOWER = """
loss eval_loss test_loss val_loss valid_loss validation_loss dev_loss val/loss test/loss eval/loss valid/loss val.loss
val_loss_epoch val_loss/dataloader_idx_0 metrics/eval_loss nll val_nll test/nll eval_nll_loss negative_log_likelihood
cross_entropy val_cross_entropy log_loss neg-log-loss:no val_bce_loss perplexity eval_perplexity val/perplexity ppl val_ppl
word_perplexity,none byte_perplexity,none bits_per_byte,none val/bpb bpb bpc test_error val_error error_rate wer eval_wer
test/wer val_wer cer eval_cer val/cer ter der eer mse val_mse rmse eval_rmse test_rmse mae val_mae test/mae mape smape
mean_squared_error mean_absolute_error root_mean_squared_error mean_absolute_percentage_error mean_squared_log_error
median_absolute_error max_error brier_score brier_score_loss ece expected_calibration_error hamming_loss zero_one_loss
hinge_loss fid kid lpips val_lpips inaccuracy word_error_rate fid_score eval_mse EVAL.LOSS Loss
""".replace("neg-log-loss:no", "").split()
HIGHER = [
    "accuracy",
    "eval_accuracy",
    "test_accuracy",
    "val_accuracy",
    "val/accuracy",
    "test/acc",
    "val_acc",
    "val_acc_epoch",
    "valid_acc",
    "acc",
    "acc,none",
    "acc_norm,none",
    "eval/acc_norm",
    "balanced_accuracy",
    "eval_balanced_accuracy",
    "token_accuracy",
    "eval_mean_token_accuracy",
    "val_sparse_categorical_accuracy",
    "val_categorical_accuracy",
    "val_binary_accuracy",
    "top1",
    "top5",
    "val_top1",
    "eval_top5",
    "acc1",
    "acc5",
    "val/acc1",
    "val/acc@1",
    "acc@5",
    "top_1_accuracy",
    "top_5_accuracy",
    "accuracy_top1",
    "metrics/accuracy_top1",
    "metrics/accuracy_top5",
    "f1",
    "eval_f1",
    "test_f1",
    "val/f1",
    "val_f1",
    "f1_score",
    "f1_macro",
    "f1_micro",
    "eval_f1_macro",
    "eval_f1_weighted",
    "macro_f1",
    "micro_f1",
    "weighted_f1",
    "eval_macro_f1",
    "precision",
    "recall",
    "eval_precision",
    "eval_recall",
    "val_precision",
    "val_recall",
    "test/precision",
    "test/recall",
    "eval_overall_f1",
    "eval_overall_accuracy",
    "eval_overall_precision",
    "eval_overall_recall",
    "roc_auc",
    "auc",
    "val_auc",
    "eval_auc",
    "auroc",
    "val/auroc",
    "test_auroc",
    "auprc",
    "average_precision",
    "val_average_precision",
    "mcc",
    "eval_matthews_correlation",
    "matthews_correlation",
    "cohen_kappa",
    "r2",
    "val_r2",
    "r2_score",
    "explained_variance",
    "pearson",
    "pearsonr",
    "eval_pearson",
    "spearmanr",
    "eval_spearmanr",
    "eval_combined_score",
    "exact_match",
    "eval_exact_match",
    "exact_match,strict-match",
    "exact_match,flexible-extract",
    "em",
    "bleu",
    "eval_bleu",
    "test_bleu",
    "sacrebleu",
    "chrf",
    "meteor",
    "eval_meteor",
    "rouge1",
    "rouge2",
    "rougeL",
    "rougeLsum",
    "eval_rouge1",
    "eval_rouge2",
    "eval_rougeL",
    "eval_rougeLsum",
    "test/rougeL",
    "cider",
    "nist",
    "google_bleu",
    "bleurt",
    "comet",
    "bertscore_f1",
    "pass@1",
    "pass@10",
    "pass_at_1",
    "win_rate",
    "eval_win_rate",
    "success_rate",
    "mc1",
    "mc2",
    "mmlu",
    "gsm8k",
    "humaneval",
    "reward",
    "eval_reward",
    "eval/reward",
    "rewards/accuracies",
    "eval_rewards/accuracies",
    "eval_rewards/margins",
    "episode_reward",
    "eval/mean_reward",
    "ep_rew_mean",
    "mAP",
    "val/mAP",
    "mAP50",
    "metrics/mAP50-95",
    "mIoU",
    "val_mIoU",
    "iou",
    "mean_iou",
    "val/iou",
    "jaccard",
    "dice",
    "val_dice",
    "psnr",
    "val/psnr",
    "ssim",
    "val/ssim",
    "mrr",
    "ndcg",
    "ndcg@10",
    "recall@1",
    "recall@10",
    "inception_score",
    "hit_rate",
    "reward_accuracy",
    "reward_margin",
]
UNKNOWN = [
    "value",
    "score",
    "eval_score",
    "energy_score",
    "toxicity_score",
    "latency_bench_s",
    "accuracy_drop",
    "1-acc",
    "pct_incorrect",
    "lossless_acc",
    "loss_drop",
    "lossless",
    "wins",
    "kl",
    "eval_kl",
    "objective/kl",
    "entropy",
    "eval_entropy",
    "grad_norm",
    "learning_rate",
    "epoch",
    "step",
    "eval_runtime",
    "eval_samples_per_second",
    "eval_steps_per_second",
    "total_flos",
    "eval_num_tokens",
    "completions/mean_length",
    "rewards/chosen",
    "rewards/rejected",
    "logps/chosen",
    "logps/rejected",
    "logits/chosen",
    "perplexity_gain",
    "acc_stderr,none",
    "exact_match_stderr,strict-match",
    "accuracy_std",
    "eval_loss_std",
    "error_free",
    "recall_loss",
    "f1_gap",
    "score_loss",
    "colour",
    "bias",
    "likelihood",
    "acc_error",
    "forgetting",
    "regretful",
    "fairness_auc_gap",
    "wer_reduction",
    "train_loss",
    "train/loss",
    "train_accuracy",
    "val",
    "eval",
    "test",
    "bleu_brevity_penalty",
    "toxicity",
    "bias_score",
    "latency",
    "throughput",
    "tokens_per_second",
    "memory",
    "num_params",
    "flops",
    "polite",
    "mae_improvement",
    "no_error",
]


def test_names_that_trackers_log() -> None:
    for names, higher in [(LOWER, False), (HIGHER, True), (UNKNOWN, None)]:
        assert {name: infer_direction(name) for name in names} == dict.fromkeys(names, higher)
        assert {name: infer_direction(name.upper()) for name in names} == dict.fromkeys(names, higher)


# Three libraries state these directions: torchmetrics by `higher_is_better`, scikit-learn by the sign of its scorers,
# and lm-evaluation-harness in its registry.
STATED = json.loads(Path(__file__).with_name("stated_directions.json").read_text())
# The documentation of TRL's DPO and GRPO trainers lists these metrics without a direction.
LOGGED_BY_TRL = [
    "global_step",
    "epoch",
    "num_tokens",
    "entropy",
    "learning_rate",
    "grad_norm",
    "logits/chosen",
    "logits/rejected",
    "logps/chosen",
    "logps/rejected",
    "rewards/chosen",
    "rewards/rejected",
    "step_time",
    "completions/mean_length",
    "completions/min_length",
    "completions/max_length",
    "completions/mean_terminated_length",
    "completions/min_terminated_length",
    "completions/max_terminated_length",
    "completions/clipped_ratio",
    "reward_std",
    "frac_reward_zero_std",
    "kl",
    "clip_ratio/region_mean",
    "clip_ratio/low_mean",
    "clip_ratio/low_min",
    "clip_ratio/high_mean",
    "clip_ratio/high_max",
]


def test_inferred_directions_agree_with_libraries() -> None:
    for prefix in ["", "eval_", "test/", "val_"]:
        for library in STATED:
            stated_directions = STATED[library]["names"]
            read = {name: infer_direction(prefix + name) for name in stated_directions}
            assert {
                name: higher for name, higher in read.items() if higher not in (None, stated_directions[name])
            } == {}
            assert sum(higher is not None for higher in read.values()) >= 10


def test_names_without_a_direction_are_unknown() -> None:
    for name in LOGGED_BY_TRL:
        assert infer_direction(name) is None
        assert infer_direction(f"eval_{name}") is None


def test_no_name_is_in_both_lists() -> None:
    assert not LOWER_IS_BETTER & HIGHER_IS_BETTER


def test_kind() -> None:
    for name, higher, kind in [
        ("eval_loss", False, "token_loss"),
        ("nll", False, "token_loss"),
        ("nats", False, "token_loss"),
        ("ppl", False, "perplexity"),
        ("eval_perplexity", False, "perplexity"),
        ("wer", False, "other"),
        ("accuracy", True, "accuracy"),
        ("bleu", True, "other"),
        ("accuracy", False, "other"),
        ("loss", True, "other"),
    ]:
        assert infer_metric_kind(name, higher) == kind


def test_values_above_one_are_percentages() -> None:
    assert not has_percentages([0.2, 1.0])
    assert has_percentages([0.9, 1.2])
    assert has_percentages([0.2, 1.6])


def test_the_margin_without_a_base_or_without_a_gain() -> None:
    for kind, reference, values, margin in [
        ("token_loss", 2.0, [2.0], 0.005),
        ("pair_loss", 0.5, [0.5], 0.005),
        ("perplexity", 8.0, [8.0], 0.04),
        ("accuracy", 0.8, [0.8], 0.005),
        ("accuracy", 80.0, [80.0], 0.5),
        ("other", 0.3, [0.3], 0.003),
        ("other", 27.0, [27.0], 0.27),
    ]:
        for gain in (-0.1, *([] if kind == "other" else [None])):
            assert compute_margin(None, kind, reference, values, gain) == pytest.approx(margin)
    with pytest.raises(ResultsError, match="only losses and shares of right answers have a default margin; add rank 0"):
        compute_margin(None, "other", 27.0, [27.0], None)


def test_a_metric_is_named_by_its_text() -> None:
    for text, spec in [
        *((name, MetricSpec(name, kind)) for name, kind in BUILT_IN_METRICS.items()),
        ("f1=f1", MetricSpec("f1", "text")),
        ("my.scores:bleu", MetricSpec("bleu", "function", "my.scores:bleu")),
        ("bleu4=my.scores:bleu", MetricSpec("bleu4", "function", "my.scores:bleu")),
        ("a-b= /tmp/a b.py:_one ", MetricSpec("a-b", "function", "/tmp/a b.py:_one")),
    ]:
        assert parse_metrics(text) == (spec,)


def test_an_invalid_metric_is_refused_in_one_line() -> None:
    for text, line in [
        ("accuracies", "metric 'accuracies' is unknown (did you mean 'accuracy'?); the metrics are: loss, accuracy,"),
        ("zzz", "metric 'zzz' is unknown; the metrics are: loss, accuracy, macro_f1,"),
        ("mine=f1", "metric 'mine=f1' is unknown"),
        ("f1=my.scores:f1", "metric 'f1=my.scores:f1': 'f1' is a built-in metric; give your metric another name"),
        ("bleu=module: ", "metric 'bleu=module: ' is unknown"),
        ("bleu=command:wc -l", "metric 'bleu=command:wc -l' is unknown"),
        ("module:", "metric 'module:' is unknown"),
        ("module:1x", "metric 'module:1x' is unknown"),
        (":f", "metric ':f' is unknown"),
    ]:
        with pytest.raises(ValueError, match=re.escape(line)):
            parse_metrics(text)


def test_metrics_keep_their_order_and_names() -> None:
    assert [spec.name for spec in parse_metrics("f1", "loss", "x=m:f")] == ["f1", "loss", "x"]
    assert parse_metrics("loss") == (MetricSpec("loss", "loss"),)
    twice = "metrics: 'f' is given twice; give each metric once, under different names (NAME=…)"
    with pytest.raises(ValueError, match=re.escape(twice)):
        parse_metrics("loss", "m:f", "n:f")


def test_which_metrics_every_evaluation_measures() -> None:
    eval_metrics = [spec.name for spec in parse_metrics(*BUILT_IN_METRICS) if spec.is_eval_metric]
    assert eval_metrics == ["loss", "accuracy", "reward_accuracy", "reward_margin"]
    assert not parse_metrics("m:f")[0].is_eval_metric


def test_separators_around_a_name_are_left_out() -> None:
    for name, higher in [("", None), ("___", None), ("/loss/", False), ("eval_", None), ("x acc", None)]:
        assert infer_direction(name) is higher
