"""DoRA (Liu et al. 2024): W = m · (W₀ + s·B·A) / ‖W₀ + s·B·A‖, with a trained magnitude m for each row of W.

The direction is a low-rank update of any of the other kinds, in whose layout A and B are stored. The magnitudes start at
‖W₀‖, so that an untrained adapter changes nothing; PEFT sets them. The norm of a row depends on the adapter, and the
backward pass treats it as a constant, as PEFT does.
"""

from __future__ import annotations

from typing import Any

import torch

from rightrank.models.kinds.base import AdapterKind, Draw
from rightrank.models.kinds.convolution import Convolution
from rightrank.models.kinds.embedding import Embedding

MAGNITUDE = ("lora_magnitude_vector", "lora_magnitude_vector.weight")  # after the module's name, in PEFT's files


class Dora(AdapterKind):
    """DoRA on a linear layer, an embedding or a convolution."""

    name = "linear"
    label = "DoRA"
    why_alone = "each adapter has its own norm of every row of the weight"
    why_not_padded = "servers do not rescale rows"

    def adapts(self, module: Any) -> bool:
        variants = [type(variant).__name__ for variant in module.lora_variant.values()]
        return bool(variants) and all(name.startswith("Dora") for name in variants)

    def shapes(self, module: Any) -> list[tuple[str, int, int]]:
        if isinstance(module.get_base_layer(), torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Conv3d):
            return Convolution().shapes(module)
        return super().shapes(module)

    def parameters(self, rank: int, rows: int, columns: int) -> int:
        return rank * (rows + columns) + rows

    def start(self, module: Any, adapter: str, draw: Draw) -> None:
        if adapter in module.lora_embedding_A:
            Embedding().start(module, adapter, draw)
        else:
            super().start(module, adapter, draw)


def dora_weight(weight: torch.Tensor, update: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """W [rows, columns] of DoRA: rows of W₀ + ΔW at the length that `magnitude` [rows] gives."""
    moved = weight + update
    norms: torch.Tensor = torch.linalg.vector_norm(moved, dim=1, keepdim=True)
    return magnitude.reshape(-1, 1) * moved / norms
