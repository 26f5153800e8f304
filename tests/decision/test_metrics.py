"""The kind of a metric, its margin and its published noise."""

from __future__ import annotations

import pytest

from rightrank.schema.metrics import MetricKind, default_margin, is_percent, kind_of, published_deviation


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
    assert is_percent([0.9, 1.2])
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
