"""What the plan does alike for many small selections of the tests: one model and one setting are traced once."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rightrank.plugins.plan import planner
from rightrank.plugins.plan.estimate import Estimator


def remember(patch: pytest.MonkeyPatch) -> None:
    """From now on, keep the traces and the estimators that were made."""
    trace, known, made = Estimator._trace, {}, {}

    def remembered(self: Estimator, rank: int, training: bool) -> Any:
        settings = self.settings.model_dump(mode="json") | {"ranks": None, "memory_bytes": None}  # of one rank's trace
        key = self._config.to_json_string(), json.dumps(settings), rank, training
        if key not in known:
            known[key] = trace(self, rank, training)
        return known[key]

    def estimator(config: Any, settings: Any, *progress: Any) -> Estimator:
        if progress:  # of `plan`
            return Estimator(config, settings, *progress)
        key = config.to_json_string(), json.dumps(settings.model_dump(mode="json"))
        if key not in made:
            made[key] = Estimator(config, settings)
        return made[key]

    patch.setattr(Estimator, "_trace", remembered)
    patch.setattr(planner, "Estimator", estimator)
