"""Kinds that PEFT has and that have no file here: they train alone, through PEFT's own forward pass.

What the adapter's tensors mean is unknown, so it is neither truncated nor padded, and PEFT alone gives its first values.
"""

from __future__ import annotations

from typing import Any

from rightrank.kinds.base import AdapterKind, Draw


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
