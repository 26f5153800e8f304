"""Embeddings, convolutions, DoRA, and any other layer that PEFT adapts.

Embeddings: ΔW = s·B·A [width, vocabulary], of which a token takes one column. B starts from the draw, A at zero.

Convolutions: ΔW = s·B·A as the matrix [out, in × kernel] that PEFT's kernels imply. PEFT adapts a convolution by two: A of
the same kernel, stride and padding to r channels, and B of a kernel of one. The composition has the kernel
s·Σᵣ B[o, r]·A[r, i, …], so that its norm and its best approximation of a lower rank are those of the matrix. A convolution
in groups is left out: PEFT's B then sees a part of the r channels.

DoRA (Liu et al. 2024): W = m · (W₀ + s·B·A) / ‖W₀ + s·B·A‖, with a trained magnitude m for each row of W. The direction
is a low-rank update of any of the other kinds, in whose layout A and B are stored. The magnitudes start at ‖W₀‖, so that an
untrained adapter changes nothing; PEFT sets them. The norm of a row depends on the adapter, and the backward pass treats it
as a constant, as PEFT does.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from rightrank.models.kinds.base import AdapterKind, CurrentRouting, Draw, Forward, Layout, StoredPair

CONVOLUTIONS = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
MAGNITUDE = ("lora_magnitude_vector", "lora_magnitude_vector.weight")  # after the module's name, in PEFT's files


class Embedding(AdapterKind):
    """A `torch.nn.Embedding`. The names of A and B are those of a linear layer, and their roles are swapped."""

    name = "embedding"
    label = "an embedding"

    def adapts(self, module: Any) -> bool:
        return isinstance(module.base_layer, torch.nn.Embedding) and not module.lora_variant

    def start(self, module: Any, adapter: str, draw: Draw) -> None:
        b = module.lora_embedding_B[adapter]
        module.lora_embedding_A[adapter].zero_()
        b.copy_(draw.normal(b.shape[1], b.shape[0]).T.to(b))

    def forward(self, module: Any, routing: CurrentRouting) -> Forward:
        def forward(ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            result: torch.Tensor = module.base_layer(ids, *args, **kwargs)
            current = routing()
            if current is None:
                return result
            factor = module._get_embed_scale()  # Gemma scales inside its embedding
            pieces: list[torch.Tensor] = []
            begin = 0
            for part in current.parts(ids.numel()):
                part_ids = ids.reshape(-1)[begin : begin + part.rows]
                begin += part.rows
                if part.adapter not in module.lora_embedding_A:
                    pieces.append(result.new_zeros(part.rows, result.shape[-1]))
                    continue
                down = F.embedding(part_ids, module.lora_embedding_A[part.adapter].T)
                delta = (down @ module.lora_embedding_B[part.adapter].T) * module.scaling[part.adapter]
                pieces.append(delta if factor is None else delta * factor.to(delta.dtype))
            return result + torch.cat(pieces).view_as(result).to(result.dtype)

        return forward

    def stores(self, pair: StoredPair) -> bool:
        return pair.embedding


class Convolution(AdapterKind):
    """A `Conv1d`, `Conv2d` or `Conv3d` without groups."""

    name = "convolution"
    label = "a convolution"
    why_alone = "only PEFT's own forward pass computes it"
    why_not_select = "select trains text models; select_rank_with trains convolutions"
    why_not_padded = "servers of language models have no adapters on convolutions"

    def adapts(self, module: Any) -> bool:
        return isinstance(module.get_base_layer(), CONVOLUTIONS) and not module.lora_variant

    def shapes(self, module: Any) -> list[tuple[str, int, int]]:
        layer = module.get_base_layer()
        return [("", int(layer.out_channels), int(layer.in_channels) * math.prod(layer.kernel_size))]

    def stores(self, pair: StoredPair) -> bool:
        return not pair.embedding and len(pair.a) > 2

    def layout(self, pair: StoredPair, rank: int) -> Layout | None:
        return super().layout(pair, rank) if len(pair.b) == len(pair.a) else None


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
        if isinstance(module.get_base_layer(), CONVOLUTIONS):
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


class Other(AdapterKind):
    """Any layer that no other kind claims."""

    name = "linear"
    label = "an adapter of a kind that rightrank does not know"
    why_alone = "only PEFT's own forward pass computes it"
    why_own_start = "what its tensors mean is unknown"
    why_not_truncated = "what its tensors mean is unknown"
    why_not_padded = "what its tensors mean is unknown"

    def adapts(self, module: Any) -> bool:
        return True

    def start(self, module: Any, adapter: str, draw: Draw) -> None:
        """PEFT's own start, made from the arm's seed."""
