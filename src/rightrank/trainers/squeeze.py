"""Cut the adapter to a lower rank during the training, with the Trainer of transformers or TRL.

    trainer.add_callback(Squeeze(trainer, margin=0.005))        # the smallest rank within the margin, measured half-way
    trainer.add_callback(Squeeze(trainer, rank=4, at=0.5))      # a given rank

After the cut the trainer continues at the lower rank, with the same schedule and batches and a new optimizer state. Its checkpoints and its
result are adapters of that rank. To resume after the cut, load the model from the checkpoint:
`PeftModel.from_pretrained(base, checkpoint, is_trainable=True)`. Problems that can be detected early raise before the first step.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from types import MethodType
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from torch.utils.data import Subset
from transformers import TrainerControl, TrainerState, TrainingArguments

from rightrank.adapters.adapter_folders import PEFT_PREFIX
from rightrank.adapters.adapter_reader import AdapterFolder, open_adapter
from rightrank.adapters.resizing import cap_ranks, write_resized_adapter
from rightrank.data.sampling import sample_indices
from rightrank.schema.errors import DataError, ModelError, SettingsError
from rightrank.trainers.batch_scores import Batch
from rightrank.trainers.distributed import get_world_size, is_sharded
from rightrank.trainers.in_memory import (
    InMemoryAdapter,
    gather_adapter_moments,
    save_trained_adapter,
    validate_trained_adapter,
)
from rightrank.trainers.preserved_state import preserve_state
from rightrank.trainers.smallest import SmallestAdapter
from rightrank.trainers.trainer_rows import MIN_EXAMPLES, RowReader, copy_batches, sample_batches
from rightrank.trainers.truncation_run import TruncationResult, build_settings, measure_truncations
from rightrank.training.multi_lora import find_lora_modules

log = logging.getLogger("rightrank")

# Compared with a training at the lower rank and that rank's best learning rate (benchmarks/README.md, archive).
STUDY_RESULT = "In a study, 35 of 45 such cuts ended at most half a margin worse than a training at the low rank; differences were -28% to +5% of what training gains"
RESUME_ADVICE = "give the trainer the model PeftModel.from_pretrained(base, {path}, is_trainable=True)"
LAYERWISE_OPTIMIZERS = ("layerwise", "lomo")  # fragments of the names of optimizers that step inside the backward pass


@dataclass(eq=False, repr=False)
class Squeeze(SmallestAdapter):
    """Cut the adapter to a lower rank at a fraction of the training, which continues at that rank.

    Args:
        trainer: The trainer that the callback is added to.
        eval_dataset, margin, ranks, metric, max_examples: for the measurement at the cut, as for `SmallestAdapter`.
        rank: The rank to cut to; None for the smallest rank whose truncation loses no more than the margin at the cut.
        at: When to cut, as a fraction of the training's steps.

    Attributes:
        cut: The result of the cut; None before it.

    Raises at the beginning of the training:
        ModelError: an adapter that cannot be truncated, several processes, or a compiled model.
        SettingsError: an invalid value, or an optimizer that steps inside the backward pass.
        DataError: no held-out rows to measure on, if no rank is given.
    """

    _writes_run: ClassVar[bool] = False
    reads_between_steps: ClassVar[bool] = True
    _: KW_ONLY
    rank: int | None = None
    at: float = 0.5
    measure: bool = field(default=True, init=False)
    cut: RankCut | None = field(default=None, init=False)
    _step: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        """Replace the model's `load_adapter` until the training begins, to explain why a checkpoint after the cut cannot be loaded."""
        super().__post_init__()
        model: Any = self.trainer.model
        if hasattr(model, "load_adapter"):
            model.load_adapter = MethodType(load_or_explain, model)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        vars(kwargs["model"]).pop("load_adapter", None)  # If the training resumes, the checkpoint is loaded by now.
        model, self._is_training, self.cut = kwargs["model"], False, None
        self._step = compute_cut_step(self.at, state.max_steps)
        if state.global_step >= self._step:
            return  # The training resumes after the cut.
        require_cuttable(model, self.rank)
        optim = str(getattr(args.optim, "value", args.optim)).lower()
        if args.torch_compile or any(name in optim for name in LAYERWISE_OPTIMIZERS):
            option = "torch_compile" if args.torch_compile else f"optim {optim}"
            raise SettingsError(
                f"Squeeze: {option} does not allow the adapter's shapes to change; leave it out, or use SmallestAdapter"
            )
        super().on_train_begin(args, state, control, **kwargs)

    def _select_held_out_rows(self, reader: RowReader) -> Subset[Any]:
        """Return the held-out rows. If the rank is given, return a few training rows instead, or none for a stream."""
        if self.rank is None:
            return super()._select_held_out_rows(reader)
        return Subset(reader.rows, sample_indices(len(reader.rows), MIN_EXAMPLES))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self._is_training or state.global_step != self._step:
            return
        optimizer = kwargs["optimizer"]
        in_memory_adapter = self._build_in_memory_adapter(kwargs["model"], args, state)
        self.cut = cut_adapter(in_memory_adapter, getattr(optimizer, "optimizer", optimizer), self.rank)
        if (
            self.cut.rank < self.cut.top_rank
        ):  # Checkpoints before the cut have another rank and cannot be loaded later.
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None
        if state.is_world_process_zero:
            for line in [*self.cut.notes, format_cut(self.cut, self._step)]:
                log.warning("rightrank: %s", line)
            if self.cut.rank < self.cut.top_rank:
                log.warning(
                    "rightrank: to resume from a checkpoint after this step: %s",
                    RESUME_ADVICE.format(path="checkpoint"),
                )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._is_training = False
        if self.cut is not None and state.is_world_process_zero:
            top = self.cut.top_rank
            log.warning(
                "rank %d to step %d, then rank %d to step %d. %s. No adapter was trained at the higher rank to the end, so this result is not certified; "
                "SmallestAdapter in a training at rank %d certifies its truncations",
                top, self._step, self.cut.rank, state.global_step, STUDY_RESULT, top,
            )  # fmt: skip


def load_or_explain(model: Any, path: str, *args: Any, **kwargs: Any) -> Any:
    """Load a checkpoint's adapter as PEFT does, and explain a difference in rank.

    Raises:
        ModelError: the checkpoint's factors have another shape than the model's.
    """
    try:
        return type(model).load_adapter(model, path, *args, **kwargs)
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        raise ModelError(
            f"{path}: this adapter has another rank than the model, which happens after a cut; to resume from it: {RESUME_ADVICE.format(path=repr(str(path)))}"
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
) -> RankCut:
    """Cut the adapter between two steps of a custom training loop, which then continues with the same model and optimizer.

    Args:
        model: PEFT's model in memory. With accelerate, `accelerator.unwrap_model(model)`.
        optimizer: The adapter's optimizer. With accelerate, its attribute `optimizer`.
        train: Training batches for second moments, dictionaries of tensors with `labels`. A random sample of a list is read, or the first batches
            of a loader.
        held_out: Batches that were not used for training. Truncations are measured on them if no rank is given.
        rank: The rank to cut to; None for the smallest rank whose truncation loses no more than the margin.
        margin: As for `SmallestAdapter`.
        metric: As for `SmallestAdapter`.

    Raises:
        DataError: neither a rank nor held-out batches.
        ModelError: an adapter that cannot be truncated, several processes, or a compiled model.
        SettingsError: an invalid value.
    """
    margin, name = build_settings(margin, None, metric).margin, require_cuttable(model, rank)
    with preserve_state(model, name, held_out, train):
        batches = list(copy_batches(held_out)), sample_batches(train)
        in_memory_adapter = InMemoryAdapter(model, *batches, margin, name=name, metric=metric)
    if rank is None and not in_memory_adapter.held_out:
        raise DataError("squeeze: give a rank, or held-out batches to measure truncations on")
    return cut_adapter(in_memory_adapter, optimizer, rank)


def compute_cut_step(at: float, steps: int) -> int:
    """Return the step after which a training of `steps` steps is cut.

    Raises:
        SettingsError: no step would remain before or after the cut.
    """
    if not 0 < at < 1 or not 0 < round(at * steps) < steps:
        raise SettingsError(
            f"Squeeze(at={at!r}) of {steps} steps: give a fraction between 0 and 1, and a training with steps before and after the cut"
        )
    return round(at * steps)


def format_cut(cut: RankCut, step: int) -> str:
    """Return a sentence on the cut and the measurement there."""
    if cut.rank == cut.top_rank:
        return f"step {step}: no truncation is within the margin, so the training continues at rank {cut.rank}"
    change = f"rank {cut.top_rank} to step {step}, then rank {cut.rank} ({cut.num_parameters:,} parameters)"
    if cut.measurement is None:
        return f"{change}; the rank was given, so nothing was measured"
    answer = cut.measurement.answer
    upper_bound = "" if answer.difference_high is None else f", at most {answer.difference_high:+.4f}"
    return (
        f"{change}; at the cut this truncation is worse by {answer.difference:+.4f}{upper_bound}, on {cut.measurement.num_examples} examples, and the "
        f"margin is {answer.margin:g}"
    )


@dataclass(frozen=True, slots=True)
class RankCut:
    """The result of a cut."""

    top_rank: int
    rank: int  # equal to `top_rank` if no truncation is within the margin and nothing was cut
    num_parameters: int  # number of elements of the factors after the cut
    measurement: TruncationResult | None  # None if the rank was given
    notes: tuple[str, ...] = ()


def require_cuttable(model: Any, rank: int | None) -> str:
    """Return the name of the trained adapter, and raise if it cannot be cut to `rank`. None stands for a rank that is measured.

    Raises:
        ModelError: the adapter cannot be truncated, or there are several processes, or the model is sharded or compiled.
        SettingsError: the rank is not a whole number of at least 1 and below the adapter's rank.
    """
    if get_world_size() > 1 or is_sharded(model) or isinstance(model, torch._dynamo.OptimizedModule):
        raise ModelError(
            "with several processes (DDP, FSDP, DeepSpeed) or a compiled model the adapter's shapes cannot change: train in one process "
            "without compilation, or use SmallestAdapter"
        )
    name, _ = validate_trained_adapter(model)
    top = model.peft_config[name].r
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or not 0 < rank < top):
        raise SettingsError(f"rank {rank!r}: give a whole number from 1 to {top - 1}, below the adapter's rank {top}")
    return name


def cut_adapter(in_memory_adapter: InMemoryAdapter, optimizer: torch.optim.Optimizer, rank: int | None) -> RankCut:
    """Cut an adapter in memory to `rank`, or to the smallest rank whose truncation loses no more than the margin.

    Raises:
        ModelError: the adapter cannot be truncated.
        NotFiniteError: a held-out loss is NaN or infinite.
    """
    measured = None
    with tempfile.TemporaryDirectory(prefix="rightrank-") as working:
        if rank is None:
            measured = measure_truncations(in_memory_adapter, Path(working) / "run")
            rank, notes, truncated_path = measured.answer.rank, measured.notes, measured.folder.adapter
            trained = open_adapter(measured.folder.get_trial_folder(measured.answer.trained_id))
        else:
            trained, truncated_path = (
                save_trained_adapter(in_memory_adapter.model, in_memory_adapter.name, Path(working) / "trained"),
                Path(working) / "lower",
            )
            with preserve_state(in_memory_adapter.model, in_memory_adapter.name):
                gathered = gather_adapter_moments(in_memory_adapter)
            notes = gathered.notices
            write_resized_adapter(trained, truncated_path, cap_ranks(trained, rank, gathered.moments), gathered.moments)
        is_cut = rank < trained.rank
        parameters = (
            _replace_factors(in_memory_adapter, optimizer, open_adapter(truncated_path))
            if is_cut
            else trained.trainable_parameters
        )
        return RankCut(trained.rank, rank, parameters, measured, notes)


@torch.no_grad()
def _replace_factors(
    in_memory_adapter: InMemoryAdapter, optimizer: torch.optim.Optimizer, truncated: AdapterFolder
) -> int:
    """Replace the trained factors by those of `truncated`, and return their number of elements.

    lora_alpha stays, so every module has the scale of the new rank. The optimizer's state of the factors starts new, which ends better than
    projecting the old state on the new factors (benchmarks/README.md, archive).
    """
    adapter, layers = in_memory_adapter.name, find_lora_modules(in_memory_adapter.model)
    new_factors, config = load_file(truncated.weights_file), in_memory_adapter.model.peft_config[adapter]
    swap_tensors: Any = torch.utils.swap_tensors  # has no type annotations in torch
    parameters = 0
    for module in truncated.modules:
        layer = layers[module.name]
        for factor_name, factors in (("A", layer.lora_A), ("B", layer.lora_B)):
            parameter = factors[adapter].weight
            # Gradients have the old shape. So does the graph of a loss that the loop still references.
            parameter.grad = None
            optimizer.state.pop(parameter, None)
            swap_tensors(
                parameter,
                torch.nn.Parameter(new_factors[f"{PEFT_PREFIX}{module.name}.lora_{factor_name}.weight"].to(parameter)),
            )
            parameters += parameter.numel()
        layer.r[adapter], layer.lora_alpha[adapter], layer.scaling[adapter] = (
            module.rank,
            module.lora_alpha,
            module.scaling,
        )
        layer.lora_A[adapter].out_features = layer.lora_B[adapter].in_features = module.rank
    for name in ("r", "rank_pattern", "alpha_pattern", "init_lora_weights"):
        setattr(config, name, truncated.config[name])
    return parameters
