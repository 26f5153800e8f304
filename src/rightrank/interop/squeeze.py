"""`Squeeze`: train at the top, cut inside the training, with the Trainer of transformers or TRL.

    trainer.add_callback(Squeeze(margin=0.005))        # the rank whose truncation holds, measured half-way
    trainer.add_callback(Squeeze(rank=4, at=0.5))      # this rank

From the cut on the trainer trains the lower rank, with the schedule and the batches that it has and a fresh state of the optimizer: its checkpoints and
its result are adapters of that rank. To resume after the cut, load the model from the checkpoint: `PeftModel.from_pretrained(base, checkpoint, is_trainable=True)`.
What cannot work is refused before the first step.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import MethodType
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from torch.utils.data import Subset
from transformers import TrainerControl, TrainerState, TrainingArguments

from rightrank.adapters.batch_scores import Batch
from rightrank.adapters.in_memory import LiveAdapter, gather, require_end, save_trained
from rightrank.adapters.preserved_state import as_it_came
from rightrank.adapters.processes import is_sharded, world_size
from rightrank.adapters.resize import capped, write_truncated
from rightrank.data.splits import sample_indices
from rightrank.interop.end_run import Ending, measure
from rightrank.interop.smallest import SmallestAdapter, checked
from rightrank.interop.trainer_rows import MIN_EXAMPLES, Reader, readable_copy, sample_batches
from rightrank.models.adapter_reader import PREFIX, AdapterFolder, open_adapter
from rightrank.schema.errors import DataError, ModelError, SettingsError
from rightrank.train.multi_lora import find_lora_modules

log = logging.getLogger("rightrank")

# Against a training at the lower rank, at that rank's own best learning rate (docs/explanation/science.md, archive).
STUDY = "In a study, 35 of 45 such cuts ended no worse than a training at the low rank by half a margin; differences were -28% to +5% of what training gains"
RESUME = "give the trainer the model PeftModel.from_pretrained(base, {path}, is_trainable=True)"
LAYERWISE = ("layerwise", "lomo")  # in the names of optimizers that step inside the backward pass


@dataclass(eq=False, repr=False, kw_only=True)
class Squeeze(SmallestAdapter):
    """Cuts the adapter to a lower rank at a part of the training, which continues at that rank to its end.

    Args:
        eval_dataset, margin, ranks, metric, max_examples: of the measurement at the cut, as for `SmallestAdapter`.
        rank: The rank to cut to; None for the smallest whose truncation is worse by no more than the margin at the cut.
        at: Where, as a part of the training's steps.

    Attributes:
        cut: What was done; None before.

    Raises at the training's begin:
        ModelError: an adapter that cannot be truncated, several processes, or a compiled model.
        SettingsError: a value that is not allowed, or an optimizer that steps inside the backward pass.
        DataError: no held-out rows to measure on, where no rank is given.
    """

    _writes_run: ClassVar[bool] = False
    reads_between_steps: ClassVar[bool] = True
    rank: int | None = None
    at: float = 0.5
    measure: bool = field(default=True, init=False)
    cut: LiveCut | None = field(default=None, init=False)
    _step: int = field(default=0, init=False)

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Explain in one line why the model cannot load a checkpoint after the cut, until the training begins."""
        if hasattr(kwargs["model"], "load_adapter"):
            kwargs["model"].load_adapter = MethodType(load_or_explain, kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        vars(kwargs["model"]).pop("load_adapter", None)  # a checkpoint has been loaded by now
        model, self._is_training, self.cut = kwargs["model"], False, None
        self._step = cut_step(self.at, state.max_steps)
        if state.global_step >= self._step:
            return  # resumed after the cut
        require_cut(model, self.rank)
        optim = str(getattr(args.optim, "value", args.optim)).lower()
        if args.torch_compile or any(name in optim for name in LAYERWISE):
            what = "torch_compile" if args.torch_compile else f"optim {optim}"
            raise SettingsError(
                f"Squeeze: {what} holds the adapter's first shapes; leave it out, or use SmallestAdapter"
            )
        super().on_train_begin(args, state, control, **kwargs)

    def _rows_to_score(self, rows: Any, is_own: bool, reader: Reader) -> Subset[Any]:
        """Return the held-out rows; some of the training where the rank is given and nothing is measured, or none of a stream."""
        if self.rank is None:
            return super()._rows_to_score(rows, is_own, reader)
        return Subset(reader.rows, sample_indices(len(reader.rows), MIN_EXAMPLES))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self._is_training or state.global_step != self._step:
            return
        optimizer = kwargs["optimizer"]
        live = self._live(kwargs["model"], args, state)
        self.cut = cut_live(live, getattr(optimizer, "optimizer", optimizer), self.rank)
        if self.cut.rank < self.cut.from_rank:  # an adapter of another rank can't be loaded at the end
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None
        if state.is_world_process_zero:
            for line in [*self.cut.notes, cut_sentence(self.cut, self._step)]:
                log.warning("rightrank: %s", line)
            if self.cut.rank < self.cut.from_rank:
                log.warning(
                    "rightrank: to resume from a checkpoint after this step: %s", RESUME.format(path="checkpoint")
                )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._is_training = False
        if self.cut is not None and state.is_world_process_zero:
            top = self.cut.from_rank
            log.warning(
                "rank %d to step %d, then rank %d to step %d. %s. No top was trained to its end, so nothing certifies this result; SmallestAdapter in a "
                "training at rank %d certifies its truncations",
                top, self._step, self.cut.rank, state.global_step, STUDY, top,
            )  # fmt: skip


def load_or_explain(model: Any, path: str, *args: Any, **kwargs: Any) -> Any:
    """Load a checkpoint's adapter as PEFT does.

    Raises:
        ModelError: its factors have another shape than the model's.
    """
    try:
        return type(model).load_adapter(model, path, *args, **kwargs)
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        raise ModelError(
            f"{path}: its adapter has another rank than the model, as after a cut; to resume there: {RESUME.format(path=repr(str(path)))}"
        ) from None


def squeeze(
    model: Any,
    optimizer: torch.optim.Optimizer,
    train: Iterable[Batch] = (),
    held_out: Iterable[Batch] = (),
    *,
    rank: int | None = None,
    margin: float | None = None,
    metric: str = "loss",
) -> LiveCut:
    """Cut the adapter between two steps of a loop of your own, which then continues with the same model and optimizer.

    Args:
        model: PEFT's model, as it is in memory; of accelerate, `accelerator.unwrap_model(model)`.
        optimizer: That of the adapter; of accelerate, its `optimizer`.
        train: Batches of the training for second moments, dictionaries of tensors with `labels`: of a list a random sample is read, of a loader the
            first ones.
        held_out: Batches that the training did not see, to measure truncations on where no rank is given.
        rank: The rank to cut to; None for the smallest whose truncation is worse by no more than the margin.
        margin: As for `SmallestAdapter`; `metric` too.

    Raises:
        DataError: neither a rank nor held-out batches.
        ModelError: an adapter that cannot be truncated, several processes, or a compiled model.
        SettingsError: a value that is not allowed.
    """
    margin, name = checked(margin, None, metric).margin, require_cut(model, rank)
    with as_it_came(model, name, held_out, train):
        batches = list(readable_copy(held_out)), sample_batches(train)
        live = LiveAdapter(model, *batches, margin, name=name, metric=metric)
    if rank is None and not live.held_out:
        raise DataError("squeeze: give a rank, or held-out batches to measure truncations on")
    return cut_live(live, optimizer, rank)


def cut_step(at: float, steps: int) -> int:
    """The step after which a training of so many steps is cut.

    Raises:
        SettingsError: no step is left on one side.
    """
    if not 0 < at < 1 or not 0 < round(at * steps) < steps:
        raise SettingsError(
            f"Squeeze(at={at!r}) of {steps} steps: give a part between 0 and 1, and a training with steps on both sides of it"
        )
    return round(at * steps)


def cut_sentence(cut: LiveCut, step: int) -> str:
    """What was done at the cut, and what was measured there."""
    if cut.rank == cut.from_rank:
        return f"step {step}: no truncation holds, so the training continues at rank {cut.rank}"
    done = f"rank {cut.from_rank} to step {step}, then rank {cut.rank} ({cut.parameters:,} parameters)"
    if cut.measured is None:
        return f"{done}; the rank was given, and nothing was measured"
    answer = cut.measured.answer
    high = "" if answer.difference_high is None else f", at most {answer.difference_high:+.4f}"
    return (
        f"{done}; at the cut this truncation is worse by {answer.difference:+.4f}{high}, on {cut.measured.examples} examples, and the "
        f"margin is {answer.margin:g}"
    )


@dataclass(frozen=True, slots=True)
class LiveCut:
    """What a cut did."""

    from_rank: int
    rank: int  # `from_rank` where no truncation holds: nothing was cut
    parameters: int  # of the factors afterwards
    measured: Ending | None  # None where the rank was given
    notes: tuple[str, ...] = ()


def require_cut(model: Any, rank: int | None) -> str:
    """The name of the adapter that trains and can be cut to a rank; None: to one that is measured.

    Raises:
        ModelError: no truncation can be made of it, or several processes, or a sharded or compiled model, hold its shapes.
        SettingsError: not a whole number from 1 and below the adapter's rank.
    """
    if world_size() > 1 or is_sharded(model) or isinstance(model, torch._dynamo.OptimizedModule):
        raise ModelError(
            "several processes (DDP, FSDP, DeepSpeed) or a compiled model hold the adapter's first shapes: cut it in a training of one "
            "process that compiles none, or use SmallestAdapter"
        )
    name = require_end(model)
    top = model.peft_config[name].r
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or not 0 < rank < top):
        raise SettingsError(f"rank {rank!r}: give a whole number from 1 to {top - 1}, below the adapter's rank {top}")
    return name


def cut_live(live: LiveAdapter, optimizer: torch.optim.Optimizer, rank: int | None) -> LiveCut:
    """Cut a live adapter between two steps, to `rank`, or to the smallest rank whose truncation holds by the held-out batches.

    Raises:
        ModelError: the adapter cannot be truncated.
        NotFiniteError: a held-out loss is NaN or infinite.
    """
    measured = None
    with tempfile.TemporaryDirectory(prefix="rightrank-") as working:
        if rank is None:
            measured = measure(live, Path(working) / "run")
            rank, notes, lower = measured.answer.rank, measured.notes, measured.folder.adapter
            before = open_adapter(measured.folder.get_trial_folder(measured.answer.trained_id))
        else:
            before, lower = save_trained(live.model, live.name, Path(working) / "trained"), Path(working) / "lower"
            with as_it_came(live.model, live.name):
                gathered = gather(live)
            notes = gathered.notices
            write_truncated(before, lower, capped(before, rank, gathered.moments), gathered.moments)
        is_cut = rank < before.rank
        parameters = _replace(live, optimizer, open_adapter(lower)) if is_cut else before.trained
        return LiveCut(before.rank, rank, parameters, measured, notes)


@torch.no_grad()
def _replace(live: LiveAdapter, optimizer: torch.optim.Optimizer, after: AdapterFolder) -> int:
    """Put the factors of `after` in the place of those that train; returns their number of elements.

    lora_alpha stays, so that the scale of every module is that of the new rank. The optimizer's state of them starts afresh, which ends better than one that is
    projected on the new factors (docs/explanation/science.md, archive).
    """
    adapter, layers = live.name, find_lora_modules(live.model)
    lower, config = load_file(after.weights), live.model.peft_config[adapter]
    swap: Any = torch.utils.swap_tensors  # untyped in torch
    parameters = 0
    for module in after.modules:
        layer = layers[module.name]
        for side, factors in (("A", layer.lora_A), ("B", layer.lora_B)):
            parameter = factors[adapter].weight
            # Gradients have the old shape, as has the graph of a loss that the loop still holds.
            parameter.grad = None
            optimizer.state.pop(parameter, None)
            swap(parameter, torch.nn.Parameter(lower[f"{PREFIX}{module.name}.lora_{side}.weight"].to(parameter)))
            parameters += parameter.numel()
        layer.r[adapter], layer.lora_alpha[adapter], layer.scaling[adapter] = (
            module.rank,
            module.lora_alpha,
            module.scaling,
        )
        layer.lora_A[adapter].out_features = layer.lora_B[adapter].in_features = module.rank
    for name in ("r", "rank_pattern", "alpha_pattern", "init_lora_weights"):
        setattr(config, name, after.config[name])
    return parameters
