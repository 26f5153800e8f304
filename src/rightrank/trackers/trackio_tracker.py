"""Trackio: one run per trial, in a group; `trackio show` opens them.

`TRACKIO_DIR` and `TRACKIO_PROJECT` set the destination.
"""

from __future__ import annotations

import os

import trackio

from rightrank.trackers.tracked import TrackedRun


class TrackioTracker:
    """Writes into the local store and opens no dashboard."""

    def __init__(self) -> None:
        self._project = os.environ.get("TRACKIO_PROJECT", "rightrank")

    def write(self, run: TrackedRun) -> None:
        config = dict(run.config) | {f"summary/{n}": v for n, v in run.summary.items() if isinstance(v, str | None)}
        opened = trackio.init(
            project=self._project,
            name=f"{run.group}/{run.name}",
            group=run.group,
            config=config,
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        for step, values in run.steps.items():
            opened.log(dict(values), step=step)
        numbers = {n: v for n, v in run.summary.items() if isinstance(v, int | float)}
        if numbers:
            opened.log(numbers, step=max(run.steps, default=0))
        opened.finish()
