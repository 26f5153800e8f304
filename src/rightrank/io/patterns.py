"""`rank_pattern` and `alpha_pattern` as PEFT applies them: regular expressions on the ends of module names."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import regex

from rightrank.errors import ModelError

MATCH_SECONDS = 0.5  # a pattern that takes longer on one name may never end on another


def pattern_matches(key: str, name: str) -> bool:
    """Whether PEFT applies a key of `rank_pattern` or `alpha_pattern` to the module `name`.

    Raises:
        ModelError: matching takes longer than `MATCH_SECONDS`.
    """
    try:
        return regex.match(rf"(.*\.)?({key})$", name, timeout=MATCH_SECONDS) is not None
    except regex.error:
        return False
    except TimeoutError:
        raise ModelError(
            f"the pattern {key!r} takes longer than {MATCH_SECONDS:g} s to match a module's name; give plain names"
        ) from None


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
