"""The planted benchmark in short: the estimators keep what their docstrings claim, and energy does not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks.probe.planted import LEVELS, our_answers, table, write_cases

pytestmark = pytest.mark.trains


def exact(result: Mapping[str, Any], estimator: str, model: str, levels: tuple[float, ...]) -> float:
    return float(np.mean([result[estimator][f"{model} {level:g}"]["exact_percent"] for level in levels]))


def test_each_estimator_is_right_in_the_noise_that_it_presumes(tmp_path: Path) -> None:
    truth = write_cases(tmp_path / "planted", repeats=2)
    answers, _ = our_answers(tmp_path / "planted")
    result = table(truth, answers)
    assert max(LEVELS) > 0.6
    low = (0.0, 0.1, 0.3)
    for model in ("core", "factors", "matrix"):
        assert exact(result, "hard threshold (noise_rank)", model, low) == 100
        assert exact(result, "energy 0.9", model, (0.3, 0.6)) < 50
