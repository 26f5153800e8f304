"""The rows of the atlas: what a public sweep of ranks measured, and which rank was enough in it.

`atlas.json` holds facts only: figures, their address, the licence that the source states, and how a program reads each row again
(`benchmarks/atlas/readings.py`). A row is one sweep: the value of every rank at its best rate, a mean over seeds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

ATLAS = Path(__file__).with_name("atlas.json")
FAMILIES = (
    *("language", "classification", "generation", "maths", "code", "memorising", "reinforcement"),
    *("vision", "events", "science"),
)
KINDS = ("loss", "accuracy", "other")
# Of `rightrank decide`; of another metric, its share of the best.
MARGINS = {"loss": 0.005, "accuracy": 0.005, "other": 0.01}


@dataclass(frozen=True, slots=True)
class Sweep:
    """One sweep of ranks."""

    id: str
    source: str
    base: str
    family: str  # of FAMILIES
    task: str
    metric: str
    kind: str  # of KINDS
    better: str  # low or high
    ranks: tuple[int, ...]  # ascending
    values: tuple[float, ...]  # at each rank's best rate, a mean over seeds
    seeds: int
    tuned: bool  # whether the rate was chosen by rank
    checkpoint: str  # last or best
    noise: float | None = None  # the standard error of a difference between two ranks
    parameters: float | None = None  # of the base
    rows: int | None = None  # of training data
    tokens: float | None = None  # trained on
    epochs: float | None = None
    steps: int | None = None
    alpha: str = ""
    items: int | None = None  # of the evaluation
    note: str = ""
    diverges: bool = False  # its ranks differ by divergence at one rate: shown, never counted
    read: Mapping[str, Any] = field(default_factory=dict)

    def margin(self, margin: float | None) -> float:
        """In the units of the values; None for the default of the kind of metric."""
        if self.kind == "other":
            return max(map(abs, self.values)) * (MARGINS["other"] if margin is None else margin)
        return MARGINS[self.kind] if margin is None else margin

    def losses(self) -> tuple[float, ...]:
        """How far each rank's value is from the best, at least 0."""
        sign = 1 if self.better == "low" else -1
        best = min(sign * value for value in self.values)
        return tuple(sign * value - best for value in self.values)

    def smallest_enough(self, margin: float | None) -> int:
        """The smallest rank within the margin of the best, or within what the sweep's noise can't tell from it."""
        allowed = max(self.margin(margin), self.noise or 0.0)
        return next(rank for rank, loss in zip(self.ranks, self.losses(), strict=True) if loss <= allowed + 1e-12)

    def rises(self, margin: float | None) -> bool:
        """Whether the highest rank beats every other: what is enough may lie above."""
        return self.smallest_enough(margin) == self.ranks[-1]

    def tells(self, rank: int, margin: float | None) -> bool | None:
        """Whether the rank was enough; None where the sweep does not say, between and beyond its ranks."""
        enough = self.smallest_enough(margin)
        if rank >= enough:
            return None if enough == self.ranks[-1] else True
        return None if rank > max((tried for tried in self.ranks if tried < enough), default=0) else False

    @property
    def quality(self) -> float:
        """1 with rates chosen by rank and seeds, .5 with rates alone, .2 at one rate."""
        return (1.0 if self.seeds > 1 else 0.5) if self.tuned else 0.2


@dataclass(frozen=True, slots=True)
class Atlas:
    """The sweeps, and by name who published them, where (`address`), when it was read and under which licence."""

    sources: Mapping[str, Mapping[str, str]]
    sweeps: Sequence[Sweep]

    def group(self, sweep: Sweep) -> str:
        """Sources of one group share a recipe, and never judge one another."""
        return self.sources[sweep.source].get("group", sweep.source)


@cache
def load() -> Atlas:
    """The packaged atlas. That its rows can be is checked where the file is changed (`tests/plugins/atlas`)."""
    content = json.loads(ATLAS.read_text(encoding="utf-8"))
    sweeps = [
        Sweep(**{**row, "ranks": tuple(row["ranks"]), "values": tuple(row["values"])}) for row in content["sweeps"]
    ]
    return Atlas(content["sources"], sweeps)
