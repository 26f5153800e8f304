"""A cut of an adapter that trains: its factors and its optimizer's state become those of a lower rank, and the training continues.

The parameters stay the same objects, so that optimizer, scheduler and trainer need not know.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file

from rightrank.adapters.live import LiveAdapter, as_it_came, gather, require_end, save_trained
from rightrank.adapters.live_scores import is_sharded, world_size
from rightrank.adapters.resize import capped, write_resized
from rightrank.interop.end_run import Ending, measure
from rightrank.models.adapter_files import PREFIX, AdapterFolder, open_adapter
from rightrank.models.truncation import POWERS, projected_state
from rightrank.schema.errors import ModelError, SettingsError
from rightrank.train.multi_lora import lora_modules


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
    what = None
    if world_size() > 1 or is_sharded(model):
        what = "several processes (DDP, FSDP, DeepSpeed) hold the adapter's first shapes: cut it in a training of one process"
    elif isinstance(model, torch._dynamo.OptimizedModule):
        what = "a compiled model holds the adapter's first shapes: compile none"
    if what is not None:
        raise ModelError(f"{what}, or use SmallestAdapter")
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
    with tempfile.TemporaryDirectory(prefix="rightrank-") as working:
        if rank is None:
            measured = measure(live, Path(working) / "run")
            before = open_adapter(measured.folder.trial_adapter(measured.answer.trained_id))
            after = open_adapter(measured.folder.adapter)
            if measured.answer.rank == before.rank:
                return LiveCut(before.rank, before.rank, before.trained, measured, measured.notes)
            parameters = _replace(live, optimizer, before, after)
            return LiveCut(before.rank, measured.answer.rank, parameters, measured, measured.notes)
        before = save_trained(live, Path(working) / "trained")
        with as_it_came(live.model, live.name):
            gathered = gather(live)
        moments, notes = gathered.moments, gathered.notices
        write_resized(before, Path(working) / "lower", capped(before, rank, moments), moments)
        parameters = _replace(live, optimizer, before, open_adapter(Path(working) / "lower"))
        return LiveCut(before.rank, rank, parameters, None, notes)


@torch.no_grad()
def _replace(live: LiveAdapter, optimizer: torch.optim.Optimizer, before: AdapterFolder, after: AdapterFolder) -> int:
    """Put the factors of `after` in the place of those of `before`; returns their number of elements.

    alpha stays, so that the scale is that of the new rank. A state that is no mean of gradients (8 bits, factored) starts afresh.
    """
    name, layers = live.name, lora_modules(live.model)
    lower, config = load_file(after.weights), LoraConfig.from_pretrained(str(after.path))
    factors = {
        f"{PREFIX}{module.name}.lora_{side}.weight": table[name].weight
        for module in after.modules
        for side, table in (("A", layers[module.name].lora_A), ("B", layers[module.name].lora_B))
    }
    parts = _parts([optimizer.state.get(parameter) or {} for parameter in factors.values()])
    means = {part: {key: optimizer.state[factor][part].cpu() for key, factor in factors.items()} for part in parts}
    states = {part: projected_state(before.path, config, lower, means[part], POWERS[part]) for part in parts}
    swap: Any = torch.utils.swap_tensors  # untyped in torch
    for key, parameter in factors.items():
        parameter.grad = None  # its gradients have the old shape, as has the graph of a loss that the loop still holds
        swap(parameter, torch.nn.Parameter(lower[key].to(parameter)))
        if not parts:
            optimizer.state.pop(parameter, None)
        for part in parts:
            optimizer.state[parameter][part] = states[part][key].to(optimizer.state[parameter][part])
    for module in after.modules:
        layer = layers[module.name]
        layer.r[name], layer.scaling[name] = module.rank, module.scaling
        layer.lora_A[name].out_features = layer.lora_B[name].in_features = module.rank
    live.model.peft_config[name].r, live.model.peft_config[name].rank_pattern = config.r, config.rank_pattern
    return sum(parameter.numel() for parameter in factors.values())


def _parts(states: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The parts of an optimizer's state that are projected; none where one of them can't be, or a factor has no state."""
    shaped = [
        {part: tensor for part, tensor in state.items() if isinstance(tensor, torch.Tensor) and tensor.dim()}
        for state in states
    ]
    names = sorted(shaped[0]) if shaped else []
    fits = all(sorted(own) == names and all(tensor.is_floating_point() for tensor in own.values()) for own in shaped)
    return tuple(names) if fits and POWERS.keys() >= set(names) else ()
