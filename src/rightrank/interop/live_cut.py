"""A cut of an adapter that trains: its factors and its optimizer's state become those of a lower rank, and the training continues.

The parameters stay the same objects, so that optimizer, scheduler and trainer need not know. The state is projected as in the cut of a
selection (`train/cut.py`).
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file

from rightrank.adapters.held_out import capped
from rightrank.adapters.live import LiveAdapter, as_it_came, gather, save_trained
from rightrank.adapters.live_scores import is_sharded, world_size
from rightrank.adapters.resize import write_resized
from rightrank.interop.end_run import Ending, measure
from rightrank.models.adapter_files import PREFIX, AdapterFolder, open_adapter
from rightrank.models.truncation import projected_state
from rightrank.schema.errors import ModelError, SettingsError
from rightrank.train.multi_lora import lora_modules

# State tensors of torch's optimizers that have a parameter's shape: means of gradients, and of their squares.
POWERS = {"exp_avg": 1, "momentum_buffer": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2, "square_avg": 2}


@dataclass(frozen=True, slots=True)
class LiveCut:
    """What a cut did."""

    from_rank: int
    rank: int  # `from_rank` where no truncation holds: nothing was cut
    parameters: int  # of the factors afterwards
    measured: Ending | None  # None where the rank was given
    notes: tuple[str, ...] = ()


def require_lower(rank: int, top: int) -> None:
    """Refuse a rank that the adapter cannot be cut to.

    Raises:
        SettingsError: not a whole number from 1 and below the adapter's rank.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or not 0 < rank < top:
        raise SettingsError(f"rank {rank!r}: give a whole number from 1 to {top - 1}, below the adapter's rank {top}")


def require_one_process(model: Any) -> None:
    """Refuse what holds the shapes of the parameters outside the optimizer.

    Raises:
        ModelError: several processes, or a sharded or compiled model.
    """
    if world_size() > 1 or is_sharded(model):
        raise ModelError(
            "several processes (DDP, FSDP, DeepSpeed) hold the adapter's first shapes: cut it in a training of one process, or use "
            "SmallestAdapter without branches"
        )
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise ModelError(
            "a compiled model holds the adapter's first shapes: compile none, or use SmallestAdapter without branches"
        )


def cut_live(live: LiveAdapter, optimizer: torch.optim.Optimizer, rank: int | None) -> LiveCut:
    """Cut a live adapter between two steps, to `rank`, or to the smallest rank whose truncation holds by the held-out batches.

    Raises:
        ModelError: the adapter cannot be truncated.
        NotFiniteError: a held-out loss is NaN or infinite.
    """
    with tempfile.TemporaryDirectory(prefix="rightrank-") as working:
        if rank is None:
            found = measure(live, Path(working) / "run")
            before, after = open_adapter(found.trained), open_adapter(found.folder.adapter)
            if found.answer.rank == before.rank:
                return LiveCut(before.rank, before.rank, before.trained, found, found.notes)
            parameters = _replace(live, optimizer, before, after)
            return LiveCut(before.rank, found.answer.rank, parameters, found, found.notes)
        before = save_trained(live, Path(working) / "trained")
        require_lower(rank, before.rank)
        with as_it_came(live.model, live.name):
            moments, notes = gather(live)
        write_resized(before, Path(working) / "lower", capped(before, rank, moments), moments)
        parameters = _replace(live, optimizer, before, open_adapter(Path(working) / "lower"))
        return LiveCut(before.rank, rank, parameters, None, notes)


@contextmanager
def top_restored(live: LiveAdapter, optimizer: Any) -> Iterator[None]:
    """In the block the adapter may be trained and cut; afterwards it, all that trains beside it and the optimizer are as before, to the bit."""
    model, name = live.model, live.name
    layers = [layer for layer in lora_modules(model).values() if name in layer.lora_A]
    ranks = [(layer.r[name], layer.scaling[name]) for layer in layers]
    config, state = copy.deepcopy(model.peft_config[name]), copy.deepcopy(optimizer.state_dict())
    values = {key: one.detach().clone() for key, one in model.named_parameters() if one.requires_grad}
    swap: Any = torch.utils.swap_tensors  # untyped in torch
    try:
        yield
    finally:
        for key, one in model.named_parameters():
            if key in values:
                one.grad = None
                swap(one, torch.nn.Parameter(values[key]))
        for layer, (rank, scaling) in zip(layers, ranks, strict=True):
            _resize(layer, name, rank, scaling)
        model.peft_config[name] = config
        optimizer.load_state_dict(state)


def _resize(layer: Any, name: str, rank: int, scaling: float) -> None:
    layer.r[name], layer.scaling[name] = rank, scaling
    layer.lora_A[name].out_features = layer.lora_B[name].in_features = rank


@torch.no_grad()
def _replace(live: LiveAdapter, optimizer: torch.optim.Optimizer, before: AdapterFolder, after: AdapterFolder) -> int:
    """Put the factors of `after` in the place of those of `before`; returns their number of elements.

    alpha stays, so that the scale is that of the new rank. A state that is no mean of gradients (8 bits, factored) starts afresh.
    """
    name, layers = live.name, lora_modules(live.model)
    lower, config = load_file(after.weights), LoraConfig.from_pretrained(str(after.path))
    factors = {
        f"{PREFIX}{one.name}.lora_{side}.weight": table[name].weight
        for one in after.modules
        for side, table in (("A", layers[one.name].lora_A), ("B", layers[one.name].lora_B))
    }
    parts = _parts([optimizer.state.get(parameter) or {} for parameter in factors.values()])
    means = {part: {key: optimizer.state[one][part].cpu() for key, one in factors.items()} for part in parts}
    states = {part: projected_state(before.path, config, lower, means[part], POWERS[part]) for part in parts}
    swap: Any = torch.utils.swap_tensors  # untyped in torch
    for key, parameter in factors.items():
        parameter.grad = None  # its gradients have the old shape, as has the graph of a loss that the loop still holds
        swap(parameter, torch.nn.Parameter(lower[key].to(parameter)))
        if not parts:
            optimizer.state.pop(parameter, None)
        for part in parts:
            optimizer.state[parameter][part] = states[part][key].to(optimizer.state[parameter][part])
    for one in after.modules:
        _resize(layers[one.name], name, one.rank, one.scaling)
    live.model.peft_config[name].r, live.model.peft_config[name].rank_pattern = config.r, config.rank_pattern
    return sum(parameter.numel() for parameter in factors.values())


def _parts(states: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The parts of an optimizer's state that are projected; none where one of them can't be, or a factor has no state."""
    shaped = [
        {part: one for part, one in state.items() if isinstance(one, torch.Tensor) and one.dim()} for state in states
    ]
    names = sorted(shaped[0]) if shaped else []
    fits = all(sorted(own) == names and all(one.is_floating_point() for one in own.values()) for own in shaped)
    return tuple(names) if fits and POWERS.keys() >= set(names) else ()
