"""`inspect ADAPTER`: the exact singular values of every module's s·B·A, from the adapter folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from rightrank.errors import ModelError
from rightrank.io.adapter_folder import PREFIX, AdapterFolder, AdapterModule, open_adapter
from rightrank.io.lora_files import is_alpha
from rightrank.io.weights import WeightFolder, open_weights
from rightrank.maths.spectra import factored_singular_values
from rightrank.probe.spectrum import InspectionInfo, Update, describe, flag_dead, summarise
from rightrank.records.probe import Inspection

POWER_STEPS = 40  # of the power iteration for the norm of a base weight; the error is about −1% at most


def inspect_adapter(path: Path, base: Path | None = None) -> Inspection:
    """The spectra of an adapter; with `base`, also the norm of each adapted weight.

    Raises:
        ModelError: no readable LoRA adapter, NaN weights, or a base of other shapes.
    """
    adapter = open_adapter(path)
    weights = None if base is None else open_weights(base)
    updates = [update for pair in adapter.pairs for update in _updates(adapter, pair, weights)]
    modules = flag_dead([describe(update) for update in updates])
    about = InspectionInfo(
        "adapter",
        adapter.scaling_rule,
        adapter.base_model,
        adapter.trained,
        tuple(key.removeprefix(PREFIX) for key in adapter.other_keys if not is_alpha(key)),
        notes=tuple(adapter_notes(adapter)),
    )
    return Inspection(modules=modules, summary=summarise(modules, about))


def adapter_notes(adapter: AdapterFolder) -> list[str]:
    """Notes to the figures: patterns without effect, DoRA, initialisations that change the base."""
    notes: list[str] = []
    if adapter.unused_patterns:
        notes.append(f"patterns that match no module and have no effect: {', '.join(adapter.unused_patterns)}")
    parts = sum(len(pair) > 1 for pair in adapter.pairs)
    if parts:
        notes.append(f"{parts} parameters hold experts: one spectrum for each, at the rank of the parameter")
    if adapter.use_dora:
        notes.append("DoRA: the spectra are those of s·B·A, without the magnitudes")
    if (init := adapter.base_changing_init) is not None:
        notes.append(
            f"initialised by {init}, which changes the base on loading: the figures are those of s·B·A, not of the whole update"
        )
    return notes


def _updates(adapter: AdapterFolder, pair: Sequence[AdapterModule], weights: WeightFolder | None) -> list[Update]:
    """The updates of a pair; of several experts, those that no token reached are flagged so.

    A token gives every direction of B a gradient, and Adam a step of about the learning rate. So an expert whose B is zero
    beside others that moved was never chosen, whereas one that learned nothing has an update that is small.
    """
    found = [_update(adapter, module, weights) for module in pair]
    if len(found) > 1 and any("untrained" not in update.flags for update in found):
        found = [
            replace(update, flags=tuple("no_token" if flag == "untrained" else flag for flag in update.flags))
            for update in found
        ]
    return found


def _update(adapter: AdapterFolder, module: AdapterModule, weights: WeightFolder | None) -> Update:
    b, a = adapter.factors(module)
    values = abs(module.scaling) * factored_singular_values(b, a)
    flags = []
    # PEFT starts with B = 0 (with A = 0 for an embedding)
    if not b.any() or not a.any():
        flags.append("untrained")
    if module.magnitude_key is not None:
        flags.append("dora")
    if module.bias_key is not None:
        flags.append("lora_bias")
    return Update(
        name=module.name,
        kind=module.kind,
        shape=(module.rows, module.columns),
        rank=module.rank,
        scaling=module.scaling,
        values=values,
        energy=float(np.sum(values**2)),
        parameters=module.parameters,
        base_spectral_norm=None if weights is None else base_norm(weights, module),
        flags=tuple(flags),
    )


def base_norm(weights: WeightFolder, module: AdapterModule) -> float:
    """The spectral norm of the weight that a module adapts.

    Raises:
        ModelError: the base has no such weight, or one of another size.
    """
    name = weights.weight_of(module.name)
    if name is None:
        raise _other_base(weights, f"it has no weight for {module.name}")
    shape = weights.shapes[name]
    if sorted((shape[0], int(np.prod(shape[1:])))) != sorted((module.rows, module.columns)):
        raise _other_base(
            weights, f"{name} is {list(shape)} there, and the adapter's ΔW is [{module.rows}, {module.columns}]"
        )
    return spectral_norm(weights.tensor(name).float().reshape(shape[0], -1))


def spectral_norm(matrix: torch.Tensor) -> float:
    """‖W‖₂ by power iteration on WᵀW from a seeded start, a lower bound."""
    vector = torch.randn(matrix.shape[1], generator=torch.Generator().manual_seed(0))
    for _ in range(POWER_STEPS):
        vector = matrix.T @ (matrix @ vector)
        length = vector.norm()
        if length == 0:
            return 0.0
        vector = vector / length
    return float((matrix @ vector).norm())


def _other_base(weights: WeightFolder, reason: str) -> ModelError:
    return ModelError(
        f"{weights.path}: not this adapter's base: {reason}; give the model that the adapter was trained on"
    )
