"""Lightning's callback: `lightning.Trainer(callbacks=[SmallestAdapter(held_out)])`, around a module that holds PEFT's model."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from peft import PeftModel

from rightrank.adapters.batch_scores import Batch, batch_loss
from rightrank.adapters.in_memory import require_end
from rightrank.adapters.preserved_state import as_it_came
from rightrank.adapters.processes import FAILURES
from rightrank.interop.end_run import Ending
from rightrank.interop.smallest import checked, keep_smallest
from rightrank.interop.squeeze import LiveCut, cut_sentence, cut_step, require_cut, squeeze
from rightrank.interop.trainer_rows import readable_copy
from rightrank.schema.errors import DataError, ModelError, SettingsError, first_line

log = logging.getLogger("rightrank")


class SmallestAdapter(Callback):
    """Finds the smallest adapter within the margin at the end of `fit`: `<default_root_dir>/rightrank/`.

    `held_out` has batches that the training does not see, dictionaries of tensors with `labels`; margin and metric are as for
    `rightrank.SmallestAdapter`. At the begin it raises `DataError` without batches, and `ModelError` for what cannot be truncated.
    """

    def __init__(self, held_out: Iterable[Batch], *, margin: float | None = None, metric: str = "loss") -> None:
        self._held_out, self._margin, self._metric = held_out, margin, metric
        self._started = time.monotonic()
        self.result: Ending | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        checked(self._margin, None, self._metric)
        model = _peft_model(pl_module)
        name = require_end(model)
        with as_it_came(model, name, self._held_out):
            self._held_out = list(readable_copy(self._held_out))
            if not self._held_out:
                raise DataError("SmallestAdapter has no held-out batches: give a loader of examples to hold out")
            batch_loss(model, self._held_out[0])
        self._started = time.monotonic()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        out, seconds = Path(trainer.default_root_dir) / "rightrank", time.monotonic() - self._started
        batches: Any = self._held_out, trainer.train_dataloader or ()
        try:
            model, margin = _peft_model(pl_module), self._margin
            self.result = keep_smallest(model, *batches, out=out, margin=margin, metric=self._metric, seconds=seconds)
        except FAILURES as error:
            log.warning("rightrank: no smaller adapter was looked for: %s", first_line(error))


class Squeeze(Callback):
    """Cuts the adapter at a part of `fit`, which continues at the lower rank: see `rightrank.Squeeze`.

    `max_steps` or `max_epochs` say how long the training is. At the begin it raises `SettingsError` where they don't, and `ModelError` for
    several processes and for what cannot be truncated.
    """

    def __init__(
        self, held_out: Iterable[Batch] = (), *, rank: int | None = None, at: float = 0.5, margin: float | None = None
    ) -> None:
        self._held_out, self._rank, self._at, self._margin = held_out, rank, at, margin
        self._step = 0
        self.cut: LiveCut | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        steps, self.cut = trainer.estimated_stepping_batches, None
        self._step = cut_step(self._at, int(steps) if steps != float("inf") else 0)
        model = _peft_model(pl_module)
        with as_it_came(model, require_cut(model, self._rank), self._held_out):
            has_batches = bool(list(islice(readable_copy(self._held_out), 1)))
        if len(trainer.optimizers) != 1 or (self._rank is None and not has_batches):
            raise SettingsError("Squeeze: give one optimizer, and a rank or held-out batches to measure truncations on")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self.cut is not None or trainer.global_step != self._step:
            return
        batches: Any = trainer.train_dataloader or ()
        optimizer, model = trainer.optimizers[0], _peft_model(pl_module)
        self.cut = squeeze(model, optimizer, batches, self._held_out, rank=self._rank, margin=self._margin)
        log.warning("rightrank: %s", cut_sentence(self.cut, self._step))


def _peft_model(module: LightningModule) -> Any:
    model = next((part for part in module.modules() if isinstance(part, PeftModel)), None)
    if model is None:
        raise ModelError("the LightningModule holds no PEFT model; wrap its model with get_peft_model")
    return model
