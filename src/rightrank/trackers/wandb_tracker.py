"""Weights & Biases: one run per trial, in a group. Without a key it works offline; `wandb sync` uploads later.

`WANDB_PROJECT`, `WANDB_DIR`, `WANDB_MODE` and `WANDB_ENTITY` have their usual meaning.
"""

from __future__ import annotations

import os
from typing import Literal

import wandb

from rightrank.trackers.tracked import TrackedRun


class WandbTracker:
    """Writes through the client, which uploads when it is online."""

    def __init__(self) -> None:
        self._project = os.environ.get("WANDB_PROJECT", "rightrank")
        known = "WANDB_MODE" in os.environ or wandb.login(prompt=False)
        # without a mode or a key, wandb would prompt and wait
        self._mode: Literal["offline"] | None = None if known else "offline"

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
            if run.examples:
                names = list(run.examples)
                rows = [[number, *scores] for number, scores in enumerate(zip(*run.examples.values(), strict=True))]
                opened.log({"items": wandb.Table(columns=["item", *names], data=rows)})
            opened.summary.update(dict(run.summary))
            if run.failed:
                opened.finish(exit_code=1)
