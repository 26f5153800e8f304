"""`rank_pattern` and `alpha_pattern` as PEFT applies them: regular expressions on the ends of module names."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any


def pattern_matches(key: str, name: str) -> bool:
    """Whether PEFT applies a key of `rank_pattern` or `alpha_pattern` to the module `name`; a wrong expression matches none."""
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
