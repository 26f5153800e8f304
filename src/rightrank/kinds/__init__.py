"""The kinds of adapters that `rightrank` knows, one in each file."""

from __future__ import annotations

from typing import Any

from rightrank.kinds.base import AdapterKind, StoredPair
from rightrank.kinds.convolution import Convolution
from rightrank.kinds.dora import Dora
from rightrank.kinds.embedding import Embedding
from rightrank.kinds.experts import Experts
from rightrank.kinds.linear import Linear
from rightrank.kinds.other import Other

KINDS: tuple[AdapterKind, ...] = (Experts(), Dora(), Embedding(), Convolution(), Linear(), Other())
"""The first that claims a module or a pair describes it; the last claims any module."""


def kind_of(module: Any) -> AdapterKind:
    return next(kind for kind in KINDS if kind.adapts(module))


def stored_kind(pair: StoredPair) -> AdapterKind | None:
    """The kind of a pair in an adapter's file; None for one that no kind stores."""
    return next((kind for kind in KINDS if kind.stores(pair)), None)
