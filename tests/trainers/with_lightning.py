"""Train with Lightning. It takes long to import, so only tests that need it import this module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import torch

from rightrank.trainers.lightning import SmallestAdapter

__all__ = ["SmallestAdapter", "fit_model"]


class Module(lightning.LightningModule):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(**batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([parameter for parameter in self.parameters() if parameter.requires_grad], lr=1e-2)


def fit_model(model: Any, callback: Any, batches: Any, out: Path) -> None:
    trainer = lightning.Trainer(
        max_steps=40, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback] if callback is not None else [], default_root_dir=out,
    )  # fmt: skip
    trainer.fit(Module(model), batches)
