"""The rows of the atlas: what a public sweep of ranks measured, and which rank was enough in it.

`atlas.json` holds facts only: figures, their address, the licence that the source states, and how a program reads each row again
(`benchmarks/atlas/readings.py`). A row is one sweep: the value of every rank at its best rate, a mean over seeds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

ATLAS = Path(__file__).with_name("atlas.json")
FAMILIES = (
    "language", "classification", "generation", "maths", "code", "memorising", "reinforcement", "vision", "events", "science",
)  # fmt: skip
# Of `rightrank decide`; of another metric, its share of the best.
MARGINS = {"loss": 0.005, "accuracy": 0.005, "other": 0.01}


@dataclass(frozen=True, slots=True)
class Sweep:
    """What is counted of one sweep of ranks; its row has further facts."""

    id: str
    source: str
    family: str  # of FAMILIES
    kind: str  # of MARGINS
    better: str  # low or high
    ranks: tuple[int, ...]  # ascending
    values: Sequence[float]  # at each rank's best rate, a mean over seeds
    seeds: int
    tuned: bool  # whether the rate was chosen by rank
    noise: float | None = None  # the standard error of a difference between two ranks
    parameters: float | None = None  # of the base
    rows: int | None = None  # of training data
    diverges: bool = False  # its ranks differ by divergence at one rate: shown, never counted

    def margin(self, margin: float | None) -> float:
        """In the units of the values; None for the default of the kind of metric."""
        if self.kind == "other":
            return max(map(abs, self.values)) * (MARGINS["other"] if margin is None else margin)
        return MARGINS[self.kind] if margin is None else margin

    def smallest_enough(self, margin: float | None) -> int:
        """The smallest rank within the margin of the best, or within what the sweep's noise can't tell from it."""
        sign = 1 if self.better == "low" else -1
        losses = [sign * value for value in self.values]
        allowed = min(losses) + max(self.margin(margin), self.noise or 0.0) + 1e-12
        return next(rank for rank, loss in zip(self.ranks, losses, strict=True) if loss <= allowed)

    def rises(self, margin: float | None) -> bool:
        """Whether the highest rank beats every other: what is enough may lie above."""
        return self.smallest_enough(margin) == self.ranks[-1]

    def tells(self, rank: int, margin: float | None) -> bool | None:
        """Whether the rank was enough; None where the sweep does not say, between and beyond its ranks."""
        enough = self.smallest_enough(margin)
        if rank >= enough:
            return None if enough == self.ranks[-1] else True
        return None if rank > max((tried for tried in self.ranks if tried < enough), default=0) else False


@dataclass(frozen=True, slots=True)
class Atlas:
    """The sweeps, and by name who published them, where (`address`), when it was read and under which licence."""

    sources: Mapping[str, Mapping[str, str]]
    sweeps: Sequence[Sweep]


@cache
def load() -> Atlas:
    """The packaged atlas. That its rows can be is checked where the file is changed (`tests/plugins/atlas`)."""
    content, names = json.loads(ATLAS.read_text(encoding="utf-8")), {field.name for field in fields(Sweep)}
    rows = ({name: value for name, value in row.items() if name in names} for row in content["sweeps"])
    return Atlas(content["sources"], [Sweep(**row | {"ranks": tuple(row["ranks"])}) for row in rows])
