"""TensorBoard: a folder of event files per trial, in `tensorboard/` of the run folder."""

from __future__ import annotations

import json
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from rightrank.trackers.tracked import TrackedRun


class TensorboardTracker:
    """Writes events through torch."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, run: TrackedRun) -> None:
        with SummaryWriter(str(self._folder / run.name)) as writer:
            for step, values in run.steps.items():
                for name, value in values.items():
                    writer.add_scalar(name, value, step)
            for name, scores in run.examples.items():
                for number, score in enumerate(scores):
                    writer.add_scalar(name, score, number)
            last = max(run.steps, default=0)
            for name, texts in (("config", run.config), ("summary", run.summary)):
                writer.add_text(name, f"```json\n{json.dumps(dict(texts), indent=1)}\n```", last)
