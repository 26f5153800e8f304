"""Multi-LoRA: several adapters on one base, each a PEFT adapter with its own name, trained in one pass.

PEFT matches the target modules, creates the adapters and saves them. Their kinds (`kinds.py`) define the forward
pass. Arms can be added and removed at any time.

Rank r takes the first r rows of the random draw of each module's A, so arms of one seed differ only in their additional rows. The
distributions are PEFT's: A is uniform in ±1/√in_features (`default`) or normal with standard deviation 1/r (`gaussian`),
and B is zero.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper

from rightrank.data.token_store import IGNORED
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import Arm
from rightrank.training.batches import Batch
from rightrank.training.kinds import InitialDraw, find_kind, find_lora_modules
from rightrank.training.routing import Routing
from rightrank.training.targets import suppress_peft_warnings

ADAPTER = "default"  # PEFT's name for the only adapter of a model


def install_forward(name: str, module: Any, current_routing: Callable[[], Routing | None]) -> None:
    """Replace the forward pass of an adapted module (PEFT's LoraLayer or ModulesToSaveWrapper) with one that routes rows to adapters.

    Without a routing, the pass is that of the base.
    """
    is_saved = isinstance(module, ModulesToSaveWrapper)
    route_rows = partial(_forward_saved_module if is_saved else find_kind(module).forward, module)
    # The number differs between layers, so that each layer draws its own dropout.
    vars(module)["rightrank_salt"] = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")

    def forward(*args: Any, **kwargs: Any) -> Any:
        routing = current_routing()
        if routing is not None:
            return route_rows(routing, *args, **kwargs)
        return (module.original_module if is_saved else module.base_layer)(*args, **kwargs)

    vars(module)["forward"] = forward


def _forward_saved_module(module: Any, routing: Routing, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Run a module of `modules_to_save`: each arm trains its own copy, and each arm's rows go through that copy."""
    if len(routing.adapters) == 1:
        return module.modules_to_save[routing.adapters[0]](x, *args, **kwargs)
    dim = 1 if x.shape[0] == 1 else 0  # packed: one row of tokens; padded: one row per example
    segments = routing.find_spans(x.shape[dim])
    inputs = torch.split(x, [segment.rows for segment in segments], dim=dim)
    outputs = [
        module.modules_to_save[segment.adapter](segment_input, *args, **kwargs)
        for segment, segment_input in zip(segments, inputs, strict=True)
    ]
    return torch.cat(outputs, dim=dim)


def unwrap_base(peft_model: Any) -> Any:
    """Remove PEFT's layers from the base and freeze it.

    PEFT's `unload` leaves the trained copy of each module in `modules_to_save` (for example a classification head) in
    the base. This function restores the base's own module, so that the next arm does not start from a trained one.
    """
    originals = {
        name: module.original_module
        for name, module in peft_model.base_model.model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }
    base = peft_model.unload()
    for name, module in originals.items():
        base.set_submodule(name, module)
    base.requires_grad_(False)
    if hasattr(base, "peft_config"):
        del base.peft_config
    return base


@dataclass(frozen=True, slots=True)
class ArmBatch:
    """The rows that one arm adds to a pass."""

    adapter: str
    batch: Batch
    scale: float  # factor of every label loss
    dropout_seed: int | None  # None: no dropout


class MultiLora:
    """The adapters on a base. Use it as a context manager: leaving the block removes every adapter and restores the base."""

    def __init__(self, model: Any, settings: SelectSettings) -> None:
        self._model = model
        self._settings = settings
        self.peft_model: Any = None  # None without an adapter
        self._names: list[str] = []
        self.routing: Routing | None = None

    def __enter__(self) -> MultiLora:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def add(self, adapter: str, arm: Arm, config: LoraConfig) -> dict[str, torch.nn.Parameter]:
        """Add an adapter with initial values; return its trainable tensors under the names that they have with a single PEFT adapter."""
        with torch.random.fork_rng(), suppress_peft_warnings():
            torch.manual_seed(arm.seed)  # for modules that only PEFT initialises
            if self.peft_model is None:
                self.peft_model = self._wrap_model(config, adapter)
            else:
                self.peft_model.add_adapter(adapter, config)
        self._names.append(adapter)
        with torch.no_grad():
            for name, module in find_lora_modules(self.peft_model).items():
                if adapter in module.lora_A or adapter in module.lora_embedding_A:
                    draw = InitialDraw(arm.seed, name, self._settings.init_lora_weights)
                    find_kind(module).initialize(module, adapter, draw)
        self._activate_adapters()
        parameters: dict[str, torch.nn.Parameter] = {}
        for name, parameter in self.peft_model.named_parameters():
            components = name.split(".")
            if adapter in components:
                parameters[".".join(ADAPTER if component == adapter else component for component in components)] = (
                    parameter
                )
        return parameters

    def _wrap_model(self, config: LoraConfig, adapter: str) -> Any:
        """Wrap the base with PEFT's model. New modules are in evaluation mode; the base's modules keep their mode."""
        training_modules = [module for module in self._model.modules() if module.training]  # checkpointed blocks
        peft_model: Any = get_peft_model(self._model, config, adapter_name=adapter)
        peft_model.train(False)
        for module in training_modules:
            module.training = True
        return peft_model

    def remove(self, adapter: str) -> None:
        """Remove an adapter, if it is on the base."""
        if adapter not in self._names:
            return
        self._names.remove(adapter)
        if not self._names:
            self._close()
            return
        if adapter == self.peft_model.active_adapter:  # PEFT fails if it is deleted
            self.peft_model.set_adapter(
                self._names[-1]
            )  # the newest, because arms usually end in the order in which they began
            self._activate_adapters()
        self.peft_model.delete_adapter(adapter)

    @contextmanager
    def route(
        self, arm_batches: Sequence[ArmBatch], pad_id: int, packed: bool = False
    ) -> Iterator[tuple[Batch, Routing]]:
        """Yield one padded batch of all arms' rows. Within the block each row, padded or packed, goes to the adapter of its arm."""
        batch = _concatenate([arm_batch.batch for arm_batch in arm_batches], pad_id)
        names = [arm_batch.adapter for arm_batch in arm_batches]
        seeds = [arm_batch.dropout_seed for arm_batch in arm_batches]
        if packed:
            self.routing = Routing.from_packed(names, seeds, [arm_batch.batch.tokens for arm_batch in arm_batches])
        else:
            rows = [arm_batch.batch.sequences for arm_batch in arm_batches]
            lengths = [arm_batch.batch.input_ids.shape[1] for arm_batch in arm_batches]
            self.routing = Routing.from_padded(names, seeds, rows, lengths)
        try:
            yield batch, self.routing
        finally:
            self.routing = None

    @contextmanager
    def route_alone(self, adapter: str) -> Iterator[None]:
        """Route every row to this one adapter within the block, without dropout."""
        self.routing = Routing((adapter,), (None,))
        try:
            yield
        finally:
            self.routing = None

    def _activate_adapters(self) -> None:
        """Make every adapter trainable, not only PEFT's active one, and install the multi-LoRA forward pass."""
        names = set(self._names)
        for name, parameter in self.peft_model.named_parameters():
            if not parameter.requires_grad and not names.isdisjoint(name.split(".")):
                parameter.requires_grad_(True)
        for name, module in self._model.named_modules():
            if isinstance(module, LoraLayer | ModulesToSaveWrapper) and "forward" not in module.__dict__:
                install_forward(name, module, lambda: self.routing)

    def _close(self) -> None:
        self._names.clear()
        if self.peft_model is None:
            return
        unwrap_base(self.peft_model)
        self.peft_model = None


def _concatenate(batches: Sequence[Batch], pad_id: int) -> Batch:
    """Concatenate the rows of several batches, padded to the longest batch."""
    if len(batches) == 1:
        return batches[0]
    longest = max(batch.input_ids.shape[1] for batch in batches)
    labels = [batch.labels for batch in batches]
    references = [batch.reference for batch in batches if batch.reference is not None]
    return Batch(
        _pad([batch.input_ids for batch in batches], longest, pad_id),
        _pad([batch.attention_mask for batch in batches], longest, 0),
        torch.cat(labels) if labels[0].dim() == 1 else _pad(labels, longest, IGNORED),
        tuple(index for batch in batches for index in batch.indices),
        sum(batch.tokens for batch in batches),
        reference=torch.cat(references) if references else None,
    )


def _pad(tensors: Sequence[torch.Tensor], length: int, value: int) -> torch.Tensor:
    """Concatenate the rows of all tensors, each padded to `length` with `value`."""
    return torch.cat([F.pad(tensor, (0, length - tensor.shape[1]), value=value) for tensor in tensors])
