"""Multi-LoRA: several adapters on one base, each a PEFT adapter of its own name, trained in one pass.

PEFT matches the target modules, creates the adapters and saves them. Their kinds (`models/kinds`) give the forward
pass. Arms can be added and removed at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper

from rightrank.data.token_store import IGNORED
from rightrank.models.kinds import kind_of
from rightrank.models.kinds.base import CurrentRouting, Routing, salt_of
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import Arm
from rightrank.train.adapter import ADAPTER, initialise, seeded, unwrapped, wrapped
from rightrank.train.batches import Batch
from rightrank.train.targets import without_peft_noise


def install(name: str, module: Any, current_routing: CurrentRouting) -> None:
    """Give an adapted module (PEFT's LoraLayer or ModulesToSaveWrapper) the forward pass that routes rows to adapters."""
    if isinstance(module, ModulesToSaveWrapper):
        vars(module)["forward"] = _saved_forward(module, current_routing)
        return
    vars(module)["rightrank_salt"] = salt_of(name)
    vars(module)["forward"] = kind_of(module).forward(module, current_routing)


def _saved_forward(module: Any, current_routing: CurrentRouting) -> Callable[..., Any]:
    """A module in `modules_to_save`, of which every arm trains a copy: each arm's rows go through its own copy."""

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        routing = current_routing()
        if routing is None:
            return module.original_module(x, *args, **kwargs)
        if len(routing.adapters) == 1:
            return module.modules_to_save[routing.adapters[0]](x, *args, **kwargs)
        along = 1 if x.shape[0] == 1 else 0  # packed: one row of tokens; padded: one row per example
        parts = routing.parts(x.shape[along])
        pieces = torch.split(x, [part.rows for part in parts], dim=along)
        outputs = [
            module.modules_to_save[part.adapter](piece, *args, **kwargs)
            for part, piece in zip(parts, pieces, strict=True)
        ]
        return torch.cat(outputs, dim=along)

    return forward


@dataclass(frozen=True, slots=True)
class ArmBatch:
    """What one arm adds to a pass."""

    adapter: str
    batch: Batch
    scale: float  # of every label loss
    dropout_seed: int | None  # None: no dropout


class MultiLora:
    """The adapters on a base. Use it as a context: leaving it removes every adapter and restores the base."""

    def __init__(self, model: Any, settings: SelectSettings) -> None:
        self._model = model
        self._settings = settings
        self.peft_model: Any = None  # without an adapter
        self._names: list[str] = []
        self.routing: Routing | None = None

    def __enter__(self) -> MultiLora:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def add(self, adapter: str, arm: Arm, config: LoraConfig) -> dict[str, torch.nn.Parameter]:
        """Add a freshly initialised adapter; returns its trainable tensors (see `parameters`)."""
        with seeded(arm.seed), without_peft_noise():
            if self.peft_model is None:
                self.peft_model = wrapped(self._model, config, adapter)
            else:
                self.peft_model.add_adapter(adapter, config)
        self._names.append(adapter)
        initialise(self.peft_model, arm, self._settings, adapter)
        self._settle()
        return self.parameters(adapter)

    def remove(self, adapter: str) -> None:
        """Remove an adapter, if it is on the base."""
        if adapter not in self._names:
            return
        self._names.remove(adapter)
        if not self._names:
            self._close()
            return
        if adapter == self.peft_model.active_adapter:  # PEFT fails if it is deleted
            self.peft_model.set_adapter(self._names[-1])  # the last, since arms end in the order in which they began
            self._settle()
        self.peft_model.delete_adapter(adapter)

    def parameters(self, adapter: str) -> dict[str, torch.nn.Parameter]:
        """The adapter's trainable tensors, by the names that they have when it is PEFT's only one."""
        found: dict[str, torch.nn.Parameter] = {}
        for name, parameter in self.peft_model.named_parameters():
            parts = name.split(".")
            if adapter in parts:
                found[".".join(ADAPTER if part == adapter else part for part in parts)] = parameter
        return found

    @contextmanager
    def routed(self, arm_batches: Sequence[ArmBatch], packed: bool = False) -> Iterator[Routing]:
        """Within the block, each row of `concatenated(arm_batches)`, padded or packed, goes to its arm's adapter."""
        names = [arm_batch.adapter for arm_batch in arm_batches]
        seeds = [arm_batch.dropout_seed for arm_batch in arm_batches]
        if packed:
            self.routing = Routing.packed(names, seeds, [arm_batch.batch.tokens for arm_batch in arm_batches])
        else:
            rows = [arm_batch.batch.sequences for arm_batch in arm_batches]
            lengths = [arm_batch.batch.input_ids.shape[1] for arm_batch in arm_batches]
            self.routing = Routing.padded(names, seeds, rows, lengths)
        try:
            yield self.routing
        finally:
            self.routing = None

    @contextmanager
    def alone(self, adapter: str) -> Iterator[None]:
        """Within the block, every row goes to this one adapter, without dropout."""
        self.routing = Routing((adapter,), (None,))
        try:
            yield
        finally:
            self.routing = None

    def _settle(self) -> None:
        """Make every adapter trainable, not only PEFT's active one, and install the multi-LoRA forward pass."""
        names = set(self._names)
        for name, parameter in self.peft_model.named_parameters():
            if not parameter.requires_grad and not names.isdisjoint(name.split(".")):
                parameter.requires_grad_(True)
        for name, module in self._model.named_modules():
            if isinstance(module, LoraLayer | ModulesToSaveWrapper) and "forward" not in module.__dict__:
                install(name, module, lambda: self.routing)

    def _close(self) -> None:
        self._names.clear()
        if self.peft_model is None:
            return
        unwrapped(self.peft_model)
        self.peft_model = None


def concatenated(batches: Sequence[Batch], pad_id: int) -> Batch:
    """One batch of all rows in order, padded to the longest batch."""
    if len(batches) == 1:
        return batches[0]
    longest = max(batch.input_ids.shape[1] for batch in batches)

    def padded(tensors: list[torch.Tensor], value: int) -> torch.Tensor:
        wide = [torch.nn.functional.pad(t, (0, longest - t.shape[1]), value=value) for t in tensors]
        return torch.cat(wide)

    labels = [batch.labels for batch in batches]
    references = [batch.reference for batch in batches if batch.reference is not None]
    return Batch(
        padded([batch.input_ids for batch in batches], pad_id),
        padded([batch.attention_mask for batch in batches], 0),
        torch.cat(labels) if labels[0].dim() == 1 else padded(labels, IGNORED),
        tuple(index for batch in batches for index in batch.indices),
        sum(batch.tokens for batch in batches),
        reference=torch.cat(references) if references else None,
    )
