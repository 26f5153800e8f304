"""A cut of an adapter that trains: its factors and its optimizer's state become those of a lower rank, and the training continues.

The parameters stay the same objects, so that optimizer, scheduler and trainer need not know. The state is projected as in the cut of a
selection (`train/cut.py`). `SmallestAdapter(branch=True)` keeps states of the training and the batches since: a branch is cut at one of them and
finished by the trainer's own step.
"""

from __future__ import annotations

import copy
import logging
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from rightrank.adapters.live import LiveAdapter, as_it_came, gather, require_end, save_trained, trained_parameters
from rightrank.adapters.live_scores import is_sharded, world_size
from rightrank.adapters.resize import capped, write_resized
from rightrank.interop.end_run import Ending, measure
from rightrank.models.adapter_files import PREFIX, AdapterFolder, open_adapter
from rightrank.models.truncation import POWERS, projected_state
from rightrank.schema.errors import ModelError, SettingsError
from rightrank.schema.trials import Arm
from rightrank.train.multi_lora import lora_modules

log = logging.getLogger("rightrank")

PLACES = (0.5, 0.75)  # of the training's steps
MAX_MEMORY = 64 * 2**20  # bytes of batches that are kept in memory; further ones are on disk


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
    require_one_process(model)
    name = require_end(model)
    top = model.peft_config[name].r
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or not 0 < rank < top):
        raise SettingsError(f"rank {rank!r}: give a whole number from 1 to {top - 1}, below the adapter's rank {top}")
    return name


def require_one_process(model: Any) -> None:
    """Refuse what holds the shapes of the parameters outside the optimizer.

    Raises:
        ModelError: several processes, or a sharded or compiled model.
    """
    what = None
    if world_size() > 1 or is_sharded(model):
        what = "several processes (DDP, FSDP, DeepSpeed) hold the adapter's first shapes: cut it in a training of one process"
    elif isinstance(model, torch._dynamo.OptimizedModule):
        what = "a compiled model holds the adapter's first shapes: compile none"
    if what is not None:
        raise ModelError(f"{what}, or use SmallestAdapter without branches")


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


@contextmanager
def top_restored(live: LiveAdapter, optimizer: Any) -> Iterator[None]:
    """In the block the adapter may be trained and cut; afterwards it, all that trains beside it and the optimizer are as before, to the bit."""
    model, name = live.model, live.name
    layers = [layer for layer in lora_modules(model).values() if name in layer.lora_A]
    ranks = [(layer.r[name], layer.scaling[name]) for layer in layers]
    config, state = copy.deepcopy(model.peft_config[name]), copy.deepcopy(optimizer.state_dict())
    values = trained_parameters(model)
    swap: Any = torch.utils.swap_tensors  # untyped in torch
    try:
        yield
    finally:
        for key, parameter in model.named_parameters():
            if key in values:
                parameter.grad = None
                swap(parameter, torch.nn.Parameter(values[key].to(parameter.device)))
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
        _resize(layers[module.name], name, module.rank, module.scaling)
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


@dataclass(slots=True)
class _Step:
    rates: list[float]  # of the optimizer's groups
    # Inputs, and the trainer's number of items.
    batches: list[tuple[Mapping[str, Any], Any]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _State:
    """Of the adapter and its optimizer after a step, outside the device."""

    parameters: Mapping[str, torch.Tensor]
    optimizer: dict[str, Any]


class Branches:
    """The states that a training leaves, and the branches from them."""

    def __init__(self, trainer: Any, steps: int) -> None:  # transformers' Trainer
        self._trainer, self._steps = trainer, steps
        self._places = [place for part in PLACES if 0 < (place := round(part * steps)) < steps]
        self._states: dict[int, _State] = {}
        self._recorded: dict[int, _Step] = {}  # by the number of steps before it
        self._bytes = 0
        self._folder = tempfile.TemporaryDirectory(prefix="rightrank-")
        self._began, self._first = time.monotonic(), trainer.state.global_step
        self._seconds = 0.0  # of a step
        vars(trainer).pop("training_step", None)  # of a training that was cut off
        self._train = trainer.training_step
        vars(trainer)["training_step"] = self._recording

    def _recording(self, model: Any, inputs: Mapping[str, Any], num_items_in_batch: Any = None) -> Any:
        """The trainer's own step, whose inputs are kept once there is a state."""
        if self._states:
            groups = self._trainer.optimizer.param_groups
            step = self._recorded.setdefault(self._trainer.state.global_step, _Step([group["lr"] for group in groups]))
            step.batches.append((self._stored(inputs), copy.deepcopy(num_items_in_batch)))
        return self._train(model, inputs, num_items_in_batch)

    def _stored(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """A copy of the inputs; above `MAX_MEMORY` their tensors are in a file, whose path stands for them."""
        kept = {
            key: value.detach().cpu().clone() if torch.is_tensor(value) else copy.deepcopy(value)
            for key, value in inputs.items()
        }
        tensors = {key: value for key, value in kept.items() if torch.is_tensor(value)}
        self._bytes += sum(value.nbytes for value in tensors.values())
        if self._bytes <= MAX_MEMORY:
            return kept
        file = Path(self._folder.name) / f"{self._bytes}.safetensors"
        save_file({key: value.contiguous() for key, value in tensors.items()}, file)
        return {key: value for key, value in kept.items() if key not in tensors} | {"": file}

    def keep(self, model: Any, step: int) -> None:
        """Keep the state after a step from which branches leave."""
        self._seconds = (time.monotonic() - self._began) / max(1, step - self._first)
        if step in self._places:
            state = _on_cpu(copy.deepcopy(self._trainer.optimizer.state_dict()))
            self._states[step] = _State(trained_parameters(model), state)

    def close(self) -> None:
        """Give the trainer its own step back."""
        vars(self._trainer).pop("training_step", None)
        self._folder.cleanup()

    @property
    def places(self) -> tuple[int, ...]:
        """The steps of the states, the latest first."""
        return tuple(sorted(self._states, reverse=True))

    @contextmanager
    def branched(self, live: LiveAdapter, arm: Arm) -> Iterator[None]:
        """Within the block the model is the end of the arm, which is cut; afterwards it is as before, to the bit."""
        assert arm.cut is not None
        model, optimizer, place = live.model, self._trainer.optimizer, arm.cut.step
        seconds = self._seconds * (self._steps - place)
        log.warning("rightrank: %s: %d steps, at most %.0f s", arm.label(), self._steps - place, seconds)
        with top_restored(live, optimizer):
            model.load_state_dict(self._states[place].parameters, strict=False)
            optimizer.load_state_dict(copy.deepcopy(self._states[place].optimizer))
            cut_live(live, getattr(optimizer, "optimizer", optimizer), arm.rank)
            for step in range(place, max(self._recorded) + 1):
                self._take(model, self._recorded[step])
            model.eval()
            yield

    def _take(self, model: Any, step: _Step) -> None:
        """One optimizer step on the recorded batches, as the trainer takes it."""
        trainer = self._trainer
        trainer.current_gradient_accumulation_steps = len(step.batches)
        for group, rate in zip(trainer.optimizer.param_groups, step.rates, strict=True):
            group["lr"] = rate
        for inputs, items in step.batches:
            given = {key: value for key, value in inputs.items() if key}
            self._train(model, given | (load_file(inputs[""]) if "" in inputs else {}), items)
        if trainer.args.max_grad_norm:
            trainer.accelerator.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()


def _on_cpu(state: Any) -> Any:
    if torch.is_tensor(state):
        return state.cpu()
    return {key: _on_cpu(value) for key, value in state.items()} if isinstance(state, dict) else state
