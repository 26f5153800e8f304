"""Provide training functions that several tests share."""

from __future__ import annotations

import random
from collections.abc import Mapping

from rightrank.runs.calls import TrialResult, TrialTask

EXAMPLE_SCORES = [random.Random(0).gauss(0, 1) for _ in range(40)]


def score_pair(task: TrialTask) -> TrialResult:
    """Return scores that rise up to rank 4; examples vary 100 times as much as ranks."""
    gain = min(task.rank, 4) * 0.01 - (0.02 if task.learning_rate > 2e-3 else 0)
    noise = random.Random(task.rank)
    scores = [ease + gain + noise.gauss(0, 1e-4) for ease in EXAMPLE_SCORES]
    return TrialResult(metrics={"reward": sum(scores) / len(scores)}, example_scores=scores)


def compute_loss(task: TrialTask) -> Mapping[str, float]:
    return {"loss": 1 + 1 / task.rank + (0.2 if task.learning_rate > 2e-3 else 0)}
