"""Run `SmallestAdapter` in axolotl: `plugins: [rightrank.trainers.axolotl.SmallestAdapterPlugin]` and `rightrank_margin: 0.005` in its configuration.

At the end of the training the plug-in saves the adapter and the held-out rows. A fresh process measures them after axolotl has unloaded the
model: it needs no layers that fused kernels replaced, and the memory is free. axolotl calls `post_train` twice, but `post_train_unload` once.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel
from transformers import TrainerCallback

from rightrank.trainers.smallest import SmallestAdapter
from rightrank.trainers.truncation_run import RESUME_FILE


class SmallestAdapterArguments(BaseModel):
    """The settings in axolotl's configuration."""

    rightrank_margin: float | None = None
    rightrank_ranks: list[int] | None = None


class SmallestAdapterPlugin(BasePlugin):  # type: ignore[misc]
    """Find the smallest adapter within the margin after axolotl's training, and write it to `<output_dir>/rightrank/`."""

    def get_input_args(self) -> str:
        """Return the import path of the settings class."""
        return "rightrank.trainers.axolotl.SmallestAdapterArguments"

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[TrainerCallback]:
        """Return the callback that checks the training at its beginning and saves what the measurement needs."""
        return [SmallestAdapter(trainer, margin=cfg.rightrank_margin, ranks=cfg.rightrank_ranks, measure=False)]

    def post_train_unload(self, cfg: Any) -> None:
        """Measure in a fresh process. A failure is logged in one line, and the training's own result is unaffected."""
        folder = Path(cfg.output_dir) / "rightrank"
        if (folder / "cache" / RESUME_FILE).is_file() and os.environ.get("RANK", "0") == "0":
            subprocess.run([sys.executable, "-m", "rightrank", "resume", str(folder)], check=False)
