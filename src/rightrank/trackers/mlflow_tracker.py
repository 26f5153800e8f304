"""MLflow: one run per trial, tagged with its group.

`MLFLOW_TRACKING_URI` and `MLFLOW_EXPERIMENT_NAME` set the destination.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import mlflow
from mlflow.entities import Metric, Param, RunTag

from rightrank.trackers.tracked import TrackedRun

MAX_PER_REQUEST = {"metrics": 1000, "params": 100}  # limits of MLflow's server
MAX_PARAM_LENGTH = 6000  # characters


class MlflowTracker:
    """Writes one run at a time through the client; an active run of the process is left alone."""

    def __init__(self) -> None:
        self._client = mlflow.MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "rightrank")
        found = self._client.get_experiment_by_name(name)
        self._experiment: str = found.experiment_id if found is not None else self._client.create_experiment(name)

    def write(self, run: TrackedRun) -> None:
        tags = {"rightrank.group": run.group, "rightrank.trial_id": run.key}
        texts = {name: value for name, value in run.summary.items() if isinstance(value, str | None)}
        run_id = self._client.create_run(self._experiment, run_name=run.name, tags=tags).info.run_id
        params = [Param(name, str(value)[:MAX_PARAM_LENGTH]) for name, value in run.config.items() if value is not None]
        for start in range(0, len(params), MAX_PER_REQUEST["params"]):
            self._client.log_batch(run_id, params=params[start : start + MAX_PER_REQUEST["params"]])
        metrics = list(_metrics(run))
        for start in range(0, len(metrics), MAX_PER_REQUEST["metrics"]):
            self._client.log_batch(run_id, metrics=metrics[start : start + MAX_PER_REQUEST["metrics"]])
        self._client.log_batch(
            run_id, tags=[RunTag(name, str(value)[:MAX_PARAM_LENGTH]) for name, value in texts.items()]
        )
        self._client.set_terminated(run_id, "FAILED" if run.failed else "FINISHED")


def _metrics(run: TrackedRun) -> Iterator[Metric]:
    """The numbers by step; for numbers by example, the step is the example's index."""
    now = int(time.time() * 1000)
    for step, values in run.steps.items():
        yield from (Metric(name, float(value), now, step) for name, value in values.items())
    for name, scores in run.examples.items():
        yield from (Metric(name, score, now, number) for number, score in enumerate(scores))
    written = {name for values in run.steps.values() for name in values}
    last = max(run.steps, default=0)
    for name, number in run.summary.items():
        if isinstance(number, int | float) and name not in written:
            yield Metric(name, float(number), now, last)
