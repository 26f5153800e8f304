"""What a metric's name says."""

from __future__ import annotations

import pytest

from rightrank.decision.metrics import MetricKind, default_margin, direction, is_percent, kind_of, published_deviation

DIRECTIONS: dict[bool | None, list[str]] = {
    False: [
        "loss", "eval_loss", "nll", "perplexity", "ppl", "eval/ppl", "error_rate", "wer", "cer", "rmse", "mse", "mae",
        "mape", "bits_per_byte", "bpb", "bpc", "regret", "forgetting", "score_loss", "acc-error", "EVAL.LOSS",
    ],
    True: [
        "acc", "eval_acc", "accuracy", "f1", "em", "exact_match", "pass@1", "pass_1", "win rate", "winrate", "mmlu",
        "gsm8k", "humaneval", "math", "correct", "precision", "recall", "auc", "bleu", "rouge-l", "meteor", "cider",
        "nist", "score", "reward", "return", "bench", "mcc", "matthews", "pearson", "spearman", "r2", "likelihood",
    ],
    None: ["value", "account", "temporal", "colour", "supplementary", "aftermath"],
}  # fmt: skip


@pytest.mark.parametrize(("name", "higher"), [(name, way) for way, names in DIRECTIONS.items() for name in names])
def test_direction(name: str, higher: bool | None) -> None:
    assert direction(name) is higher
    assert direction(name.upper()) is higher


@pytest.mark.parametrize(
    ("name", "higher", "kind"),
    [
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
    ],
)
def test_kind(name: str, higher: bool, kind: MetricKind) -> None:
    assert kind_of(name, higher) == kind


def test_percent_begins_above_what_a_fraction_can_be() -> None:
    assert not is_percent([0.2, 1.0])
    assert not is_percent([1.5])
    assert is_percent([0.2, 1.6])


@pytest.mark.parametrize(
    ("kind", "reference", "values", "margin", "deviation"),
    [
        ("token_loss", 2.0, [2.0], 0.005, 0.0003),
        ("perplexity", 8.0, [8.0], 0.04, 0.0003),
        ("accuracy", 0.8, [0.8], 0.005, 0.007),
        ("accuracy", 80.0, [80.0], 0.5, 0.7),
        ("loss", -2.0, [2.0], 0.02, 0.008),
        ("other", -50.0, [50.0], 0.5, 0.2),
    ],
)
def test_margin_and_published_noise(
    kind: MetricKind, reference: float, values: list[float], margin: float, deviation: float
) -> None:
    assert default_margin(kind, reference, values) == pytest.approx(margin)
    assert published_deviation(kind, reference, values) == pytest.approx(deviation)
