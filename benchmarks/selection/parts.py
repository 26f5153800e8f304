"""What each part of the search is worth: the default strategy without it, on the stored grids. Nothing is trained.

    python -m benchmarks.selection.parts --out benchmarks/selection/parts.json

neighbours  the neighbouring learning rates of a rank below the top that does not hold
stages      the checks at a quarter and at half for a loss that rises
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from benchmarks.machine import machine
from benchmarks.results import store
from benchmarks.selection.compare import EQUAL_COST_WITH, FAMILIES, curves_of
from benchmarks.selection.replay import Judged, replay_all
from rightrank.search import STRATEGIES, learning_rates

PARTS: dict[str, tuple[Any, str, Any]] = {
    "neighbours": (learning_rates, "_promising_neighbours", lambda *_: ()),
    "stages": (learning_rates, "STAGES", ()),
}


def shares(judged: Sequence[Judged]) -> dict[str, float]:
    means = {name: float(np.mean([getattr(one, name) for one in judged])) for name in ("exact", "under", "trainings", "regret")}  # fmt: skip
    return {"cases": len(judged), **{name: round(mean, 5) for name, mean in means.items()}}


def judged_on(family: str) -> dict[str, dict[str, float]]:
    """Both questions, the second with one seed and, where the grids have them, with two."""
    curves, margins = curves_of(family), FAMILIES[family][2]
    ways: dict[str, dict[str, Any]] = {"one seed": {}}
    ways |= {"two seeds": {"seeds": 2}} if all(len(curve.seeds) > 1 for curve in curves) else {}
    ways |= {"adapter": {"goal": "adapter"}} if any(curve.truncated for curve in curves) else {}
    make = STRATEGIES[EQUAL_COST_WITH]
    return {
        name: shares([one for margin in margins for one in replay_all(curves, make, margin, **way)])
        for name, way in ways.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out: Path = parser.parse_args().out
    rows: list[dict[str, Any]] = []
    for family in FAMILIES:
        rows.append({"family": family, "without": None, **judged_on(family)})
        for part, (module, name, other) in PARTS.items():
            with patch.object(module, name, other):
                rows.append({"family": family, "without": part, **judged_on(family)})
        print(*rows[-1 - len(PARTS) :], sep="\n", flush=True)
        store({"machine": machine(), "rows": rows}, out)


if __name__ == "__main__":
    main()
