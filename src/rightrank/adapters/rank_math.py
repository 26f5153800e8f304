"""Compute ranks, scales and sizes of adapters from numbers alone.

This covers PEFT's patterns, the rank that a server reserves, bytes, and the alpha and learning rate for another rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from rightrank.schema.settings import CONSTANT_SCALING_RANK, Scaling

MIN_ALPHA, MAX_ALPHA = 1e-9, 1e9
SERVER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vllm/config/lora.py, MaxLoRARanks
# Options of PEFT that make an adapter another kind than plain LoRA, which servers do not load.
# Options with which an adapter is more than the B·A of layers. Servers refuse such an adapter, or serve it without that part (vLLM issues
# 41384 and 52198, SGLang issue 25528).
NON_PLAIN_OPTIONS = ("use_dora", "target_parameters", "lora_bias", "trainable_token_indices", "modules_to_save")
# The best rate goes as rank to this power at scale alpha/r with alpha fixed: the medians of our and of public grids; with alpha = r
# (arXiv 2602.04998: 12 rates, 3 seeds).
RATE_EXPONENTS, TIED_EXPONENT = (0.03, 0.23), -0.41


def find_server_rank(rank: int) -> int:
    """Return the rank that a server reserves for an adapter of `rank`, or `rank` itself above the largest one.

    Modules up to the reserved rank cost no additional memory.
    """
    return next((served for served in SERVER_RANKS if served >= rank), rank)


def format_slot(rank: int) -> str:
    """Return a sentence if an adapter of `rank` takes the slot of a higher rank on vLLM, or an empty string."""
    served = find_server_rank(rank)
    return f"the largest layer, rank {rank}, takes the same slot as rank {served} on vLLM" if served > rank else ""


def matches_pattern(key: str, name: str) -> bool:
    """Return whether PEFT applies a key of `rank_pattern` or `alpha_pattern` to the module `name`.

    Keys are regular expressions on the ends of names. An invalid expression matches no module.
    """
    try:
        return re.match(rf"(.*\.)?({key})$", name) is not None
    except (re.error, OverflowError, RecursionError):
        return False


def get_pattern_value(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    """Return the value of the first matching key, as PEFT does."""
    return next((value for key, value in pattern.items() if matches_pattern(key, name)), default)


def build_exact_pattern(values: Mapping[str, Any], default: Any, names: Iterable[str]) -> dict[str, Any]:
    """Build a pattern of module names for the values that differ from `default`.

    A name that PEFT would also match to another module, whose name ends in it, is anchored with ^.
    """
    names = list(names)
    pattern: dict[str, Any] = {}
    for name, value in values.items():
        if value == default:
            continue
        ambiguous = sum(matches_pattern(name, module_name) for module_name in names) > 1
        pattern[f"^{re.escape(name)}" if ambiguous else name] = value
    return pattern


def is_valid_alpha(value: object) -> bool:
    """Return whether a value of a configuration can be the alpha of a module."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return value == 0 or MIN_ALPHA <= abs(value) <= MAX_ALPHA


def compute_scaling(lora_alpha: float, rank: int, use_rslora: bool) -> float:
    """Return PEFT's scale of a module's update: α/r, or α/√r with rsLoRA."""
    return lora_alpha / math.sqrt(rank) if use_rslora else lora_alpha / rank


def compute_equal_scale_alphas(ranks: Mapping[str, int], r: int, lora_alpha: float) -> dict[str, float]:
    """Return the alpha of each module that gives it the scale of `lora_alpha` at rank `r`, whatever its own rank.

    Servers scale every module by the configuration's `lora_alpha` and `r`. With these values as `alpha_pattern`, PEFT does the same.
    """
    alphas = {name: lora_alpha * (rank / r) for name, rank in ranks.items()}
    return {name: int(alpha) if alpha.is_integer() else alpha for name, alpha in alphas.items()}


def compute_equivalent_rank(ranks: Iterable[int], sizes: Iterable[int]) -> int:
    """Return the smallest uniform rank with at least as many parameters as these ranks.

    Args:
        ranks: The rank of each module.
        sizes: The parameters of one rank of each module.
    """
    ranks, sizes = list(ranks), list(sizes)
    return math.ceil(sum(rank * size for rank, size in zip(ranks, sizes, strict=True)) / sum(sizes))


def format_rank(rank: int, lowest: int, highest: int) -> str:
    """Return `2 (modules from 1 to 4)`, or `2` if every module has this rank."""
    return f"{rank}" if lowest == highest else f"{rank} (modules from {lowest} to {highest})"


def convert_scaling(scaling: Scaling, lora_alpha: float, rank: int) -> float:
    """Return the `lora_alpha` with which scale `lora_alpha / r` is the given one.

    `alpha/r` is LoRA (Hu et al. 2021), `alpha/sqrt(r)` is rsLoRA (Kalajdzievski 2023), and `constant` is alpha/16 at every
    rank. SGLang (issue 40835) and llama.cpp's converter ignore `use_rslora`, so no adapter is written with it.
    """
    if scaling == "constant":
        return lora_alpha / CONSTANT_SCALING_RANK * rank
    return lora_alpha * (math.sqrt(rank) if scaling == "alpha/sqrt(r)" else 1)


def format_rank_change(rank: int, to: int) -> str:
    """Return a sentence on the alpha and learning rate to use when the rank changes, at scale alpha/r.

    The figures come from benchmarks/README.md, archive.
    """
    ours, public, tied = ((to / rank) ** exponent for exponent in (*RATE_EXPONENTS, TIED_EXPONENT))
    return (
        f"from rank {rank} to {to}: keep alpha and the learning rate (scale alpha/r: the best rate moves by ×{ours:.2f} in our grids, "
        f"×{public:.2f} in public ones); with alpha = r multiply it by {tied:.2f}"
    )


# Measured by others, not here: whether a server has adapters at all costs more than a rank does, and the largest rank is paid by all.
SERVING_COSTS = (
    "others' figures: any adapter at all costs more than its rank (vLLM issue 11267); an adapter of rank 8 in slots of 64 wastes 87.5% of a "
    "slot, and decoding is 5.6% faster without (SGLang issue 31305); at rank 256 a server was four times slower (vLLM issue 14435)"
)


def compute_slot_bytes(shapes: Iterable[tuple[int, int]], max_rank: int) -> int:
    """Return the bytes of an adapter's slot on a server, which holds factors of `max_rank` in 16 bits for each adapted matrix."""
    return sum(2 * max_rank * (rows + columns) for rows, columns in shapes)
