"""Make a row of the atlas."""

from __future__ import annotations

from rightrank.plugins.atlas.counts import Sweep


def make_sweep(**changes: object) -> Sweep:
    facts = {"id": "a", "source": "s", "family": "language", "kind": "loss"}
    figures = {"better": "low", "ranks": (1, 4, 16, 64), "values": (2.1, 2.004, 2.0, 2.001), "seeds": 1, "tuned": True}
    return Sweep(**{**facts, **figures, **changes})  # type: ignore[arg-type]
