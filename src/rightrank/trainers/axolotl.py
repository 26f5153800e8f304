"""Run `SmallestAdapter` in axolotl: `plugins: [rightrank.trainers.axolotl.SmallestAdapterPlugin]` and `rightrank_margin: 0.005` in its configuration."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel
from transformers import TrainerCallback

from rightrank.schema.metrics import Margin
from rightrank.trainers.smallest import SmallestAdapter


class SmallestAdapterArguments(BaseModel):
    rightrank_margin: Margin | None = None
    rightrank_ranks: list[int] | None = None


class SmallestAdapterPlugin(BasePlugin):  # type: ignore[misc]
    """Find the smallest adapter within the margin after axolotl's training, and write it to `<output_dir>/rightrank/`."""

    def get_input_args(self) -> str:
        return "rightrank.trainers.axolotl.SmallestAdapterArguments"

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[TrainerCallback]:
        return [SmallestAdapter(trainer, margin=cfg.rightrank_margin, ranks=cfg.rightrank_ranks)]
