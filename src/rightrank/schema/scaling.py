"""The scale of an update by the scaling rule, and what becomes of alpha and the learning rate when the rank changes."""

from __future__ import annotations

import math

from rightrank.schema.settings import CONSTANT_SCALING_RANK, Scaling

# The best rate goes as rank to this power at scale alpha/r with alpha fixed: the medians of our and of public grids; with alpha = r
# (arXiv 2602.04998: 12 rates, 3 seeds).
RATE_EXPONENTS, TIED_EXPONENT = (0.03, 0.23), -0.41
LARGE_RANK, LARGE_RATE = 256, 2e-4


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


def rank_change_line(rank: int, to: int, alpha: float = 32) -> str:
    """What becomes of alpha and the learning rate when the rank changes; the figures are of `benchmarks/atlas/rates.json`."""
    ratio = to / rank
    ours, public, tied = ratio ** RATE_EXPONENTS[0], ratio ** RATE_EXPONENTS[1], ratio**TIED_EXPONENT
    return (
        f"from rank {rank} to {to}: keep alpha at {alpha:g} and the learning rate (scale alpha/r: the best rate moves by "
        f"×{ours:.2f} in our grids, ×{public:.2f} in public ones); with alpha = r multiply it by {tied:.2f}"
    )


def rate_warning(rank: int = LARGE_RANK, alpha: float = 2 * LARGE_RANK, rate: float = LARGE_RATE) -> str:
    """A warning where a combination is known to diverge; empty elsewhere."""
    if rank < LARGE_RANK or alpha < 2 * rank or rate < LARGE_RATE:
        return ""
    return f"rank {LARGE_RANK} at {LARGE_RATE:g} with alpha = 2r diverged in a public trace: take alpha 32, or a lower rate"
