"""axolotl's plug-in: `plugins: [rightrank.interop.axolotl.SmallestAdapterPlugin]` and `rightrank_margin: 0.005` in its configuration.

The end of the training keeps the adapter and the held-out rows. They are measured when axolotl has unloaded the model, in a fresh process:
there no fused kernel hides the adapter's layers, and the memory is free. axolotl calls `post_train` twice, `post_train_unload` once.
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

from rightrank.interop.smallest import SmallestAdapter
from rightrank.interop.truncation_run import RESUME_FILE


class SmallestAdapterArguments(BaseModel):
    """What axolotl's configuration may say."""

    rightrank_margin: float | None = None
    rightrank_ranks: list[int] | None = None


class SmallestAdapterPlugin(BasePlugin):  # type: ignore[misc]
    """Finds the smallest adapter within the margin once axolotl has trained: `<output_dir>/rightrank/`."""

    def get_input_args(self) -> str:
        """Where axolotl finds the fields of its configuration."""
        return "rightrank.interop.axolotl.SmallestAdapterArguments"

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[TrainerCallback]:
        """The callback that refuses what cannot work at the training's begin, and keeps what is measured."""
        return [
            SmallestAdapter(trainer.eval_dataset, margin=cfg.rightrank_margin, ranks=cfg.rightrank_ranks, measure=False)
        ]

    def post_train_unload(self, cfg: Any) -> None:
        """Measure in a fresh process; what fails is a line, and the training's own result is safe."""
        folder = Path(cfg.output_dir) / "rightrank"
        if (folder / "cache" / RESUME_FILE).is_file() and os.environ.get("RANK", "0") == "0":
            subprocess.run([sys.executable, "-m", "rightrank.interop.smallest", str(folder)], check=False)
