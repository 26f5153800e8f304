"""Would the expectation save trainings, and would it change picks? `python -m benchmarks.atlas.replayed`; writes `replayed.json`.

Stored grids are played back to `bracket` as it is and with what the atlas says in place of a part of it, at the margin of each case and with
the source of the grid left out of the atlas. Nothing is trained.

top     ranks above the atlas's top rank are left out
start   the walk down begins at the atlas's start rank, not at the smallest truncation that holds (or at a quarter of the top)
order   the same where a grid has no truncations, else as it is
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.selection.compare import FAMILIES, curves_of
from benchmarks.selection.replay import Judged, judge, replay_all
from benchmarks.selection.tables import GridCurve
from rightrank.plugins.atlas.estimate import Question, expectation
from rightrank.plugins.atlas.rows import Atlas, load
from rightrank.schema.trials import Arm
from rightrank.search.bracket import Bracket
from rightrank.search.history import Space, Trials
from rightrank.search.protocol import Strategy

HERE = Path(__file__).parent
OWN = {"published": "tinker"}  # the atlas's source of a family's grids; of the others: ours
WAYS = ("top", "start", "order")


class FromTheAtlas(Bracket):
    """`bracket` whose walk begins at a given rank, or at the lowest above it that there is."""

    def __init__(self, space: Space, start: int) -> None:
        super().__init__(space)
        self.first = next((rank for rank in sorted(space.ranks) if rank >= start), space.top)

    def start(self, trials: Trials, learning_rate: float) -> Generator[Sequence[Arm], None, int]:
        yield from ()
        return self.first if self.first != self.space.top else self.space.below(self.first) or self.first


@cache
def said(family: str, margin: float) -> tuple[int, int]:
    """The atlas's start and top rank, without the source of the family's grids."""
    atlas, left_out = load(), OWN.get(family, "rightrank")
    others = [s for s in atlas.sweeps if atlas.group(s) != left_out]
    found = expectation(Question(margin=margin), atlas=Atlas(atlas.sources, others))
    return found.start_rank, found.top_rank


def picked(family: str, way: str, margin: float, curves: list[GridCurve]) -> list[Judged]:
    """The picks of one way, each against the whole grid."""
    start, top = said(family, margin)
    if way == "top":
        kept = [replace(c, cells={r: v for r, v in c.cells.items() if r <= max(top, c.ranks[1])}) for c in curves]
        found = replay_all(kept, Bracket, margin)
        return [
            judge(curve, margin, one.pick, one.learning_rate, one.trainings)
            for curve, one in zip(curves, found, strict=True)
        ]
    make: Callable[[Space], Strategy] = partial(FromTheAtlas, start=start)
    if way == "order":
        return [replay_all([c], Bracket if c.truncated else make, margin)[0] for c in curves]
    return replay_all(curves, make, margin)


def compared(family: str) -> dict[str, Any]:
    """By way, over the family's margins: trainings, picks that changed, and how many of them became right or wrong."""
    curves = curves_of(family)
    now: list[Judged] = []
    by_way: dict[str, list[Judged]] = {way: [] for way in WAYS}
    for margin in FAMILIES[family][2]:
        now += replay_all(curves, Bracket, margin)
        for way in WAYS:
            by_way[way] += picked(family, way, margin, curves)
    return {"cases": len(now), "as it is": _scores(now), **{way: _against(now, found) for way, found in by_way.items()}}


def _scores(judged: list[Judged]) -> dict[str, float]:
    return {
        "exact": round(fmean(one.exact for one in judged), 3),
        "under": round(fmean(one.under for one in judged), 3),
        "trainings": round(fmean(one.trainings for one in judged), 2),
    }


def _against(now: list[Judged], then: list[Judged]) -> dict[str, float]:
    pairs = list(zip(now, then, strict=True))
    return {
        **_scores(then),
        "trainings_saved": round(fmean(a.trainings - b.trainings for a, b in pairs), 2),
        "picks_changed": sum(a.pick != b.pick for a, b in pairs),
        "became_exact": sum(b.exact and not a.exact for a, b in pairs),
        "no_longer_exact": sum(a.exact and not b.exact for a, b in pairs),
    }


def overall(families: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Means over families, each weighing the same, and counts over all cases."""
    return {
        way: {
            "trainings_saved": round(fmean(found[way]["trainings_saved"] for found in families.values()), 2),
            **{
                name: sum(found[way][name] for found in families.values())
                for name in ("picks_changed", "became_exact", "no_longer_exact")
            },
        }
        for way in WAYS
    }


def main() -> None:
    families = {family: compared(family) for family in FAMILIES}
    said_of = {f"{f}, {m:g}": said(f, m) for f in FAMILIES for m in FAMILIES[f][2]}
    found = {"families": families, "all": overall(families), "start_and_top": said_of}
    (HERE / "replayed.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
