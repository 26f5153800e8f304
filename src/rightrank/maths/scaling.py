"""The scale s in W = W0 + s·B·A, and the PEFT settings that give it."""

from __future__ import annotations

import math

from rightrank.settings import CONSTANT_SCALING_RANK, Scaling


def lora_scale(scaling: Scaling, lora_alpha: float, rank: int) -> float:
    """The scale s that multiplies B·A.

    `alpha/r` is LoRA (Hu et al. 2021), `alpha/sqrt(r)` is rsLoRA (Kalajdzievski 2023), and `constant` is alpha/16 at every
    rank.
    """
    if scaling == "alpha/r":
        return lora_alpha / rank
    if scaling == "alpha/sqrt(r)":
        return lora_alpha / math.sqrt(rank)
    return lora_alpha / CONSTANT_SCALING_RANK


def peft_scaling(scaling: Scaling, lora_alpha: float, rank: int) -> tuple[float, bool]:
    """`(lora_alpha, use_rslora)` of the PEFT config whose scale is `lora_scale(...)`."""
    if scaling == "alpha/sqrt(r)":
        return lora_alpha, True
    return lora_scale(scaling, lora_alpha, rank) * rank, False
