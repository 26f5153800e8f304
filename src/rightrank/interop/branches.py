"""Branches of a training of others: its adapter as it was at half and three quarters, cut there to a lower rank and finished by the trainer's own step.

`SmallestAdapter(branch=True)` keeps the states and the batches since, and compares each branch with the training's own end.
"""

from __future__ import annotations

import copy
import logging
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from rightrank.adapters.live import LiveAdapter, trained_parameters
from rightrank.interop.live_cut import cut_live, top_restored
from rightrank.schema.trials import Arm

log = logging.getLogger("rightrank")

PLACES = (0.5, 0.75)  # of the training's steps
MAX_MEMORY = 64 * 2**20  # bytes of batches that are kept in memory; further ones are on disk


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
