"""Convolutions: ΔW = s·B·A as the matrix [out, in × kernel] that PEFT's kernels imply.

PEFT adapts a convolution by two: A of the same kernel, stride and padding to r channels, and B of a kernel of one. The
composition has the kernel s·Σᵣ B[o, r]·A[r, i, …], so that its norm and its best approximation of a lower rank are those of
the matrix. A convolution in groups is left out: PEFT's B then sees a part of the r channels.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from rightrank.models.kinds.base import AdapterKind, Layout, StoredPair


class Convolution(AdapterKind):
    """A `Conv1d`, `Conv2d` or `Conv3d` without groups."""

    name = "convolution"
    label = "a convolution"
    why_alone = "only PEFT's own forward pass computes it"
    why_not_select = "select trains text models; select_rank_with trains convolutions"
    why_not_padded = "servers of language models have no adapters on convolutions"

    def adapts(self, module: Any) -> bool:
        layer = module.get_base_layer()
        convolution = isinstance(layer, torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Conv3d)
        return convolution and not module.lora_variant

    def shapes(self, module: Any) -> list[tuple[str, int, int]]:
        layer = module.get_base_layer()
        return [("", int(layer.out_channels), int(layer.in_channels) * math.prod(layer.kernel_size))]

    def stores(self, pair: StoredPair) -> bool:
        return not pair.embedding and len(pair.a) > 2

    def layout(self, pair: StoredPair, rank: int) -> Layout | None:
        return super().layout(pair, rank) if len(pair.b) == len(pair.a) else None
