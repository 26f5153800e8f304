"""Run `SmallestAdapter` in Lightning: `lightning.Trainer(callbacks=[SmallestAdapter(held_out)])`, with a module that contains PEFT's model."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from peft import PeftModel

from rightrank.schema.errors import ModelError
from rightrank.schema.metrics import Margin
from rightrank.trainers.in_memory import log_failure
from rightrank.trainers.measurement import SmallestAdapterResult
from rightrank.trainers.smallest import keep_smallest, prepare_adapter
from rightrank.trainers.trainer_batches import Batch


class SmallestAdapter(Callback):
    """Find the smallest adapter within the margin at the end of `fit`, and write it to `<default_root_dir>/rightrank/`.

    `held_out` has batches that are not used for training: dictionaries of tensors with `labels`. Margin and metric are the same as for
    `rightrank.SmallestAdapter`. At the beginning it raises `DataError` if there are no batches, and `ModelError` if the adapter cannot be truncated.
    """

    def __init__(self, held_out: Iterable[Batch], *, margin: Margin | None = None, metric: str = "loss") -> None:
        self._held_out, self._margin, self._metric = held_out, margin, metric
        self._start_time = time.monotonic()
        self.result: SmallestAdapterResult | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        adapter, _ = prepare_adapter(_find_peft_model(pl_module), self._held_out, (), self._margin, self._metric)
        self._held_out, self._start_time = adapter.held_out, time.monotonic()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        out, seconds = Path(trainer.default_root_dir) / "rightrank", time.monotonic() - self._start_time
        batches: Any = self._held_out, trainer.train_dataloader or ()
        with log_failure("the search for a smaller adapter failed"):
            model, margin = _find_peft_model(pl_module), self._margin
            self.result = keep_smallest(model, *batches, out=out, margin=margin, metric=self._metric, seconds=seconds)


def _find_peft_model(module: LightningModule) -> Any:
    model = next((submodule for submodule in module.modules() if isinstance(submodule, PeftModel)), None)
    if model is None:
        raise ModelError("the LightningModule contains no PEFT model; wrap its model with get_peft_model")
    return model
