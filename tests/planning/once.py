"""Cache the plans of many small selections in tests: each model and setting is traced once."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rightrank.planning import planner
from rightrank.planning.estimate import Estimator


def remember(patch: pytest.MonkeyPatch) -> None:
    """Cache traces and estimators from now on."""
    trace, estimators, traces = Estimator._trace, {}, {}

    def remembered(self: Estimator, rank: int, training: bool) -> Any:
        settings = self.settings.model_dump(mode="json") | {"ranks": None, "memory_bytes": None}  # of one rank's trace
        key = self._config.to_json_string(), json.dumps(settings), rank, training
        if key not in estimators:
            estimators[key] = trace(self, rank, training)
        return estimators[key]

    def estimator(config: Any, settings: Any) -> Estimator:
        key = config.to_json_string(), json.dumps(settings.model_dump(mode="json"))
        if key not in traces:
            traces[key] = Estimator(config, settings)
        return traces[key]

    patch.setattr(Estimator, "_trace", remembered)
    patch.setattr(planner, "Estimator", estimator)
