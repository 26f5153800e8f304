"""Limit the number of examples of property tests."""

from __future__ import annotations

from typing import Any

from hypothesis import settings


def limit_examples(count: int, **values: Any) -> settings:
    """Decorate a property test with its number of examples, of which `make check` runs a fifth."""
    return settings(max_examples=max(count * settings().max_examples // 100, 1), **values)
