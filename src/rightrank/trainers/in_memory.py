"""Save an adapter of a model that another program trained, and evaluate its truncations with the model in memory.

Each truncation replaces the trained factors for one evaluation. Afterwards the model is restored: parameters, modes,
gradients, hooks, configurations and random states. If several processes train it, all of them must make the same calls with the same data.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor

from rightrank.adapters.adapter_reader import AdapterFolder, open_adapter
from rightrank.adapters.find_smallest import SmallestAdapterAnswer, find_smallest
from rightrank.adapters.resize import RankedAdapter, list_candidate_ranks, require_plain_update, write_truncation
from rightrank.bases.named_base import require_named_base
from rightrank.decision.adapter import Criterion, ScoredAdapter
from rightrank.schema.errors import DataError, ModelError, NotFiniteError
from rightrank.trainers.batch_scores import (
    BETA,
    Batch,
    HeldOutBatches,
    TrainerLossFunction,
    compute_batch_loss,
    count_positions,
)
from rightrank.trainers.distributed import get_process_index, get_world_size, is_partitioned, is_sharded, sync_errors
from rightrank.trainers.preserved_state import preserve_state
from rightrank.training.evaluation import Scores
from rightrank.training.kinds import Linear, find_kind, find_lora_modules, set_update_to_zero
from rightrank.training.loss import BatchLoss
from rightrank.training.moments import MOMENT_TOKENS, GatheredMoments, accumulate_moments
from rightrank.training.saving import save_adapter


@dataclass(frozen=True, slots=True)
class InMemoryAdapter:
    """An adapter of a model in memory, with the batches to measure its truncations on."""

    model: Any  # a PEFT model with a LoRA adapter of linear layers
    held_out: Sequence[Batch]  # batches of examples that the training did not see
    # Batches of training examples for second moments; without them, adapters are truncated by singular values.
    train: Sequence[Batch] = ()
    name: str = "default"  # the adapter's name in PEFT
    beta: float = BETA  # of the loss of preference pairs
    moment_tokens: int = MOMENT_TOKENS  # the maximum number of tokens of `train` that are read
    trainer_loss: TrainerLossFunction | None = None  # replaces the losses of `batch_scores`

    def compute_loss(self, batch: Batch) -> BatchLoss:
        if self.trainer_loss is not None:
            return self.trainer_loss(batch)
        return compute_batch_loss(self.model, batch, self.beta)


@dataclass(frozen=True, slots=True)
class MeasuredTruncations:
    """The smallest adapter within the margin, the scores of the trained one, and notes on how truncations were computed."""

    smallest: SmallestAdapterAnswer[RankedAdapter]
    trained_scores: Scores
    notes: tuple[str, ...]


def measure_truncations(
    in_memory_adapter: InMemoryAdapter, trained: AdapterFolder, ranks: Sequence[int], criterion: Criterion, folder: Path
) -> MeasuredTruncations:
    """Truncate an adapter in memory downward, and score each truncation on the held-out batches. The model is restored afterwards.

    Args:
        trained: the saved adapter, which is truncated to files in `folder`.

    Raises:
        DataError: fewer than two held-out examples have a label.
        NotFiniteError: a held-out loss is NaN or infinite.
    """
    model, name = in_memory_adapter.model, in_memory_adapter.name
    held_out = HeldOutBatches(model, in_memory_adapter.held_out, in_memory_adapter.beta, in_memory_adapter.trainer_loss)
    scores_by_rank: dict[int, Scores] = {}
    with preserve_state(model, name):
        # The model still holds the trained factors here. Later each truncation replaces them.
        gathered = gather_adapter_moments(in_memory_adapter)

        def truncate(rank: int) -> RankedAdapter:
            if rank == 0:
                return RankedAdapter(0, trained)  # evaluated with its update set to zero
            with sync_errors():
                return write_truncation(trained, folder / f"rank-{rank}", rank, gathered.moments)

        def evaluate(adapter: RankedAdapter) -> ScoredAdapter:
            is_trained = adapter.rank == trained.rank
            if adapter.rank == 0:
                set_update_to_zero(model, name)
            elif not is_trained:
                copy_factors(model, name, adapter.folder)
            scores = scores_by_rank[adapter.rank] = held_out.score()
            if not np.isfinite(scores.losses).all():
                raise NotFiniteError(
                    f"rank {adapter.rank}: a held-out loss is NaN or infinite; the training may have diverged"
                )
            if len(scores.losses) < 2:
                raise DataError("fewer than two held-out examples have a label; give more examples")
            return scores.build_scored_adapter(
                f"rank-{adapter.rank}", adapter.rank, criterion, method="trained" if is_trained else "truncated"
            )

        top = RankedAdapter(trained.rank, trained)
        smallest = find_smallest(top, ranks, truncate, evaluate, criterion)
    return MeasuredTruncations(smallest, scores_by_rank[trained.rank], gathered.notices)


def find_base_name(model: Any, name: str) -> str:
    """Return the folder or the hub name of the base model, as the adapter's configuration or the model states it."""
    return model.peft_config[name].base_model_name_or_path or model.get_base_model().config.name_or_path or ""


def save_trained_adapter(model: Any, name: str, folder: Path) -> AdapterFolder:
    """Save an adapter of a model in memory, and check that the saved one is the same.

    Raises:
        ModelError: PEFT saves an adapter with another scale, or one that can't be truncated.
    """
    save_adapter(model, folder, find_base_name(model, name), name)
    adapter, layers = open_adapter(folder), find_lora_modules(model)
    require_plain_update(adapter)
    for module in adapter.modules:
        scale = layers[module.name].scaling[name]
        if not math.isclose(scale, module.scaling, rel_tol=1e-6):
            raise ModelError(
                f"{module.name}: its scale is {scale:g} (set_scale, scale_layer) and PEFT saves {module.scaling:g}, so the saved "
                "adapter would differ; set lora_alpha before the training"
            )
    return adapter


def validate_trained_adapter(model: Any, ranks: Sequence[int] | None = None) -> tuple[str, list[str]]:
    """Return the name of the adapter in training and notes, after every check of the final measurement that needs no examples.

    Raises:
        ModelError: The adapter can't be truncated, or the base model is not the one that the adapter would name.
        SettingsError: A rank is not a possible truncation.
    """
    name, notes = find_trained_adapter(model), list[str]()
    if not is_partitioned(model):  # a fresh process measures a partitioned model
        with sync_errors(), tempfile.TemporaryDirectory(prefix="rightrank-") as folder:
            list_candidate_ranks(save_trained_adapter(model, name, Path(folder) / "begin"), ranks)
            compared = (0, 1) if is_sharded(model) else (get_process_index(), get_world_size())
            notes = require_named_base(model.get_base_model(), find_base_name(model, name), *compared)
    return name, notes


def find_trained_adapter(model: Any) -> str:
    """Return the name of the adapter in training, which must be the only active one.

    Raises:
        ModelError: The model is no PEFT model or uses FSDP1, or the adapter is one of several active ones, no LoRA of linear layers, merged, or of
            rank 1.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    active: list[str] = sorted({name for layer in layers for name in layer.active_adapters}) or ["default"]
    if len(active) > 1:
        raise ModelError(
            f"the adapters {', '.join(active)} are active at the same time, and only one adapter can be truncated: "
            "merge the others into the base model, and train on that"
        )
    name = active[0]
    config = getattr(model, "peft_config", {}).get(name)
    if config is None:
        raise ModelError("the model has no PEFT adapter; give a model that PEFT has wrapped")
    modules = {module: layer for module, layer in find_lora_modules(model).items() if name in layer.r}
    unsupported = [module for module, layer in modules.items() if not isinstance(find_kind(layer), Linear)]
    if not modules or unsupported or config.use_dora:
        name_or_type = unsupported[0] if unsupported else config.peft_type
        raise ModelError(
            f"{name_or_type}: only LoRA of linear layers can be truncated in memory; save the adapter and use rightrank resize --data"
        )
    if any(layer.merged for layer in modules.values()):
        raise ModelError(f"the adapter {name!r} is merged into the base; call unmerge_adapter() before the measurement")
    if config.r < 2:
        raise ModelError("the adapter has rank 1, and there is no lower rank")
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ModelError(
            "FSDP1 holds the factors in flat parameters; shard by FSDP2 (fsdp_version 2), or use rightrank resize --data"
        )
    return name


def copy_factors(model: Any, name: str, adapter: AdapterFolder) -> None:
    """Copy the factors of an adapter folder into the leading rows and columns of an adapter in memory; the others become zero.

    The module in memory multiplies by its own scale s, the folder's adapter by s'. B is therefore multiplied by s'/s.
    """
    layers = find_lora_modules(model)
    for module in adapter.modules:
        layer = layers[module.name]
        b, a = (torch.from_numpy(factor) for factor in adapter.load_factors(module))
        ratio = module.scaling / layer.scaling[name]
        for weight, factor in ((layer.lora_B[name].weight, b * ratio), (layer.lora_A[name].weight, a)):
            padded = torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
            padded[: factor.shape[0], : factor.shape[1]].copy_(factor)
            if isinstance(weight, DTensor):
                padded = distribute_tensor(padded, weight.device_mesh, weight.placements)
            with torch.no_grad():
                weight.copy_(padded)


def gather_adapter_moments(in_memory_adapter: InMemoryAdapter) -> GatheredMoments:
    """Gather second moments over about `moment_tokens` tokens of training examples."""
    if not in_memory_adapter.train:
        return GatheredMoments(
            {}, 0, 0, ("truncated by singular values: no training examples were given for second moments",)
        )
    names = [
        name
        for name, layer in find_lora_modules(in_memory_adapter.model).items()
        if in_memory_adapter.name in layer.lora_A
    ]
    return accumulate_moments(in_memory_adapter.model, names, _run_passes(in_memory_adapter), in_memory_adapter.name)


def _run_passes(in_memory_adapter: InMemoryAdapter) -> Iterator[tuple[int, int, int]]:
    """Run forward and backward passes over training batches; yield the numbers of rows, positions and labels of each."""
    num_positions = 0
    for batch in in_memory_adapter.train:
        if num_positions >= in_memory_adapter.moment_tokens:
            return
        loss = in_memory_adapter.compute_loss(batch)
        torch.autograd.backward(loss.total)
        num_positions += count_positions(batch)
        yield len(loss.example_losses), count_positions(batch), int(loss.example_tokens.sum())
