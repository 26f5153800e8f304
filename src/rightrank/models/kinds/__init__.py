"""The kinds of adapters that `rightrank` knows."""

from __future__ import annotations

from typing import Any

from rightrank.models.kinds.base import AdapterKind, StoredPair
from rightrank.models.kinds.linear import Linear
from rightrank.models.kinds.other import Convolution, Dora, Embedding, Experts, Other

KINDS: tuple[AdapterKind, ...] = (Experts(), Dora(), Embedding(), Convolution(), Linear(), Other())
"""The first that claims a module or a pair describes it; the last claims any module."""


def kind_of(module: Any) -> AdapterKind:
    return next(kind for kind in KINDS if kind.adapts(module))


def stored_kind(pair: StoredPair) -> AdapterKind | None:
    """The kind of a pair in an adapter's file; None for one that no kind stores."""
    return next((kind for kind in KINDS if kind.stores(pair)), None)
