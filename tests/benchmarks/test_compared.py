"""Test the stored errors of `compare`, and a short form of their simulation."""

from __future__ import annotations

import json

import numpy as np
from benchmarks.compared import calibration, zeros_and_ones


def test_the_stored_error_is_at_most_five_percent() -> None:
    stored = json.loads(calibration.OUT.read_text(encoding="utf-8"))
    assert stored["summary"] == calibration.summarize(stored["cases"])
    assert stored["summary"]["simulated"]["false_not_worse"] <= 0.05
    assert stored["summary"]["real"]["false_not_worse"] <= 0.05


def test_a_pair_at_the_margin_is_rarely_called_not_worse() -> None:
    def draw(generator: np.random.Generator) -> tuple[calibration.Floats, calibration.Floats, float]:
        return 0.01 + generator.normal(0, 0.1, 100), np.ones(100), 0.01

    verdicts = calibration.count_verdicts(draw, 0, 600)
    assert verdicts["not_worse"] <= 0.08
    assert verdicts["worse"] <= 0.08
    assert verdicts["cannot_tell"] >= 0.85


def test_the_stored_error_of_zeros_and_ones_is_at_most_five_percent() -> None:
    summary = json.loads(zeros_and_ones.OUT.read_text(encoding="utf-8"))["summary"]
    assert summary["score test"]["false_not_worse"] <= 0.05
    assert summary["score test"]["false_not_worse_highest"] <= 0.07
    stored = zeros_and_ones.compute_error_rates("score test", 36, 0.1, 0.0)
    assert max(stored) <= 0.07
