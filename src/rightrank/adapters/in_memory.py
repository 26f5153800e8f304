"""An adapter in a model that another program trained: saved, and its truncations scored with the model as it is in memory.

Each truncation is put in the place of the trained factors for one evaluation. The model is given back as it came: parameters, modes,
gradients, hooks, configurations and random states. Where several processes train it, all of them make the same calls with the same data.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor

from rightrank.adapters.batch_scores import BETA, Batch, batch_loss, positions
from rightrank.adapters.processes import is_partitioned, together
from rightrank.adapters.resize import candidate_ranks, require_plain_update
from rightrank.models.adapter_reader import AdapterFolder, open_adapter
from rightrank.models.adapter_writer import save_adapter
from rightrank.models.kinds import kind_of
from rightrank.models.kinds.linear import Linear
from rightrank.schema.errors import ModelError
from rightrank.train.covariances import MOMENT_TOKENS, GatheredMoments, accumulate_moments
from rightrank.train.multi_lora import find_lora_modules


@dataclass(frozen=True, slots=True)
class LiveAdapter:
    """What is measured."""

    model: Any  # PEFT's, with a LoRA adapter of linear layers
    held_out: Sequence[Batch]  # of examples that the training did not see
    # Of training examples, for second moments; without them truncation is by singular values.
    train: Sequence[Batch] = ()
    # How much worse is still enough, in nats a token (or accuracy); None: the metric's default.
    margin: float | None = None
    ranks: Sequence[int] | None = None  # candidates; None: the powers of two below the adapter's rank
    name: str = "default"  # of the adapter in PEFT
    metric: str = "loss"  # or `accuracy` of a classifier
    beta: float = BETA  # of the loss of preference pairs
    moment_tokens: int = MOMENT_TOKENS  # of `train` that are read at most
    write_beside: Callable[[Path], object] | None = None  # writes the tokenizer into the adapter's folder


def save_trained(model: Any, name: str, folder: Path) -> AdapterFolder:
    """An adapter as it is in memory.

    Raises:
        ModelError: what PEFT saves is another adapter, or none that can be truncated.
    """
    base = model.peft_config[name].base_model_name_or_path or model.get_base_model().config.name_or_path
    save_adapter(model, folder, base or "", name)
    adapter, layers = open_adapter(folder), find_lora_modules(model)
    require_plain_update(adapter)
    for module in adapter.modules:
        scale = layers[module.name].scaling[name]
        if not math.isclose(scale, module.scaling, rel_tol=1e-6):
            raise ModelError(
                f"{module.name}: its scale is {scale:g} (set_scale, scale_layer) and PEFT saves {module.scaling:g}, so that the saved "
                "adapter is another one; set lora_alpha before the training"
            )
    return adapter


def require_end(model: Any, ranks: Sequence[int] | None = None) -> str:
    """The name of the adapter that trains, whose end is gone through as far as that needs no examples.

    Raises:
        ModelError: no truncation can be made of it.
        SettingsError: a rank that is no truncation of it.
    """
    name = trained_adapter(model)
    if not is_partitioned(model):  # a fresh process measures that
        with together(), tempfile.TemporaryDirectory(prefix="rightrank-") as folder:
            candidate_ranks(save_trained(model, name, Path(folder) / "begin"), ranks)
    return name


def trained_adapter(model: Any) -> str:
    """The name of the adapter that trains, which is the only active one.

    Raises:
        ModelError: no PEFT model, several active adapters, another kind than LoRA of linear layers, a merged one, rank 1, or FSDP1.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    active: list[str] = sorted({name for layer in layers for name in layer.active_adapters}) or ["default"]
    if len(active) > 1:
        raise ModelError(
            f"the adapters {', '.join(active)} are active together, so that each alone is another model than the trained one; one adapter is "
            "truncated at a time: merge the others into the base, and train on that"
        )
    name = active[0]
    config = getattr(model, "peft_config", {}).get(name)
    if config is None:
        raise ModelError("the model has no PEFT adapter; give a model that PEFT has wrapped")
    modules = {module: layer for module, layer in find_lora_modules(model).items() if name in layer.r}
    odd = [module for module, layer in modules.items() if not isinstance(kind_of(layer), Linear)]
    if not modules or odd or config.use_dora:
        what = odd[0] if odd else config.peft_type
        raise ModelError(
            f"{what}: only LoRA of linear layers is truncated in memory; save it and use rightrank resize --data"
        )
    if any(layer.merged for layer in modules.values()):
        raise ModelError(f"the adapter {name!r} is merged into the base; call unmerge_adapter() before the measurement")
    if config.r < 2:
        raise ModelError("the adapter has rank 1: there is no lower rank")
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ModelError(
            "FSDP1 holds the factors in flat parameters; shard by FSDP2 (fsdp_version 2), or use rightrank resize --data"
        )
    return name


def put_in_place(model: Any, name: str, adapter: AdapterFolder) -> None:
    """Write the factors of an adapter folder over the leading rows and columns of a live adapter; the others become zero.

    The live module multiplies by its own scale s, the folder's by s': B takes s'/s.
    """
    layers = find_lora_modules(model)
    for module in adapter.modules:
        layer = layers[module.name]
        b, a = (torch.from_numpy(part) for part in adapter.factors(module))
        ratio = module.scaling / layer.scaling[name]
        for weight, part in ((layer.lora_B[name].weight, b * ratio), (layer.lora_A[name].weight, a)):
            whole = torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
            whole[: part.shape[0], : part.shape[1]].copy_(part)
            if isinstance(weight, DTensor):
                whole = distribute_tensor(whole, weight.device_mesh, weight.placements)
            with torch.no_grad():
                weight.copy_(whole)


def gather(live: LiveAdapter) -> GatheredMoments:
    """Second moments of about `moment_tokens` tokens of training examples."""
    if not live.train:
        return GatheredMoments(
            {}, 0, 0, ("truncated by singular values: no training examples were given for second moments",)
        )
    names = [name for name, layer in find_lora_modules(live.model).items() if live.name in layer.lora_A]
    return accumulate_moments(live.model, names, _passes(live), live.name)


def _passes(live: LiveAdapter) -> Iterator[tuple[int, int, int]]:
    """Forward and backward over training batches; yields the rows, the positions and the labels of each."""
    read = 0
    for batch in live.train:
        if read >= live.moment_tokens:
            return
        loss = batch_loss(live.model, batch, live.beta)
        torch.autograd.backward(loss.total)
        read += positions(batch)
        yield len(loss.example_losses), positions(batch), int(loss.example_tokens.sum())
