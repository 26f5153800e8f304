"""Ranks, scales and sizes of adapters, from numbers alone: PEFT's patterns, what a server reserves, parameters, bytes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rightrank.schema.errors import ResultsError

SERVER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vllm/config/lora.py, MaxLoRARanks
SAFETENSORS_ALIGNMENT = 8  # the header is padded with spaces to a multiple of this


def max_module_rank(rank: int) -> int:
    """The rank that a server reserves for an adapter of `rank`: modules up to it cost no memory. `rank` above all of them."""
    return next((served for served in SERVER_RANKS if served >= rank), rank)


def served_rank(rank: int) -> int:
    """The smallest `--max-lora-rank` of vLLM that fits this rank.

    Raises:
        ResultsError: a rank above the largest that vLLM supports.
    """
    if rank > SERVER_RANKS[-1]:
        raise ResultsError(
            f"vLLM serves ranks up to {SERVER_RANKS[-1]}, got {rank}: resize the adapter, or merge it into the base"
        )
    return max_module_rank(rank)


def pattern_matches(key: str, name: str) -> bool:
    """Whether PEFT applies a key of `rank_pattern` or `alpha_pattern` to the module `name`; a wrong expression matches none.

    Keys are regular expressions on the ends of names.
    """
    try:
        return re.match(rf"(.*\.)?({key})$", name) is not None
    except (re.error, OverflowError, RecursionError):
        return False


def pattern_value(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first matching key, as in PEFT."""
    return next((value for key, value in pattern.items() if pattern_matches(key, name)), default)


def exact_pattern(values: Mapping[str, Any], default: Any, names: Iterable[str]) -> dict[str, Any]:
    """A pattern of module names for the values that differ from `default`.

    A name that PEFT would also match to another module, whose name ends in it, is anchored with ^.
    """
    names = list(names)
    pattern: dict[str, Any] = {}
    for name, value in values.items():
        if value == default:
            continue
        ambiguous = sum(pattern_matches(name, other) for other in names) > 1
        pattern[f"^{re.escape(name)}" if ambiguous else name] = value
    return pattern


def lora_scaling(lora_alpha: float, rank: int, use_rslora: bool) -> float:
    """PEFT's scale of a module's update: α/r, or α/√r with rsLoRA."""
    return lora_alpha / math.sqrt(rank) if use_rslora else lora_alpha / rank


def safetensors_bytes(
    tensors: Sequence[tuple[str, str, Sequence[int], int]], metadata: Mapping[str, str] | None = None
) -> int:
    """The size of the file with these tensors, each `(name, dtype code, shape, bytes per element)`.

    The file has 8 bytes for the header's length, the header (JSON without spaces, sorted by descending element size and then
    by name, padded) and the data without gaps. https://github.com/huggingface/safetensors#format
    """
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for name, code, shape, element in sorted(tensors, key=lambda tensor: (-tensor[3], tensor[0])):
        size = math.prod(shape) * element
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // SAFETENSORS_ALIGNMENT) * SAFETENSORS_ALIGNMENT + position
