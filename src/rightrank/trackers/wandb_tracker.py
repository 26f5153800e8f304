"""Weights & Biases: one run a trial, in a group. Offline unless there is a key; `wandb sync` sends it later.

`WANDB_PROJECT`, `WANDB_DIR`, `WANDB_MODE` and `WANDB_ENTITY` mean what they always do.
"""

from __future__ import annotations

import os
from typing import Literal

import wandb

from rightrank.trackers.tracked import TrackedRun


class WandbTracker:
    """Writes through the client, which sends when it can."""

    def __init__(self) -> None:
        self._project = os.environ.get("WANDB_PROJECT", "rightrank")
        known = "WANDB_MODE" in os.environ or wandb.login(prompt=False)
        self._mode: Literal["offline"] | None = None if known else "offline"  # else it would ask, and wait

    def write(self, run: TrackedRun) -> None:
        with wandb.init(
            project=self._project,
            group=run.group,
            id=f"{run.group}-{run.key}",
            name=run.name,
            job_type="decision" if run.key == "decision" else "trial",
            config=dict(run.config),
            mode=self._mode,
            reinit="finish_previous",
            resume="allow",
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
        ) as opened:
            for step, values in run.steps.items():
                opened.log(dict(values), step=step)
            if run.items:
                names = list(run.items)
                rows = [[number, *scores] for number, scores in enumerate(zip(*run.items.values(), strict=True))]
                opened.log({"items": wandb.Table(columns=["item", *names], data=rows)})
            opened.summary.update(dict(run.summary))
            if run.failed:
                opened.finish(exit_code=1)
