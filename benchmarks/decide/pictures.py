"""Three curves as pictures: saturated, rising, undecided.

python -m benchmarks.decide.pictures      # writes saturated.svg, rising.svg, undecided_curve.svg
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.decide.simulated import RANKS, World, draw_table
from rightrank.decision.rule import decision_of
from rightrank.report.figures import rank_figure
from rightrank.report.svg import svg_file

HERE = Path(__file__).parent


def main() -> None:
    ranks = np.array(RANKS, dtype=np.float64)
    cases = {
        "saturated": (2.0 + 0.08 * ranks**-0.9, World("power", 3, 1000, item_rank=0.002, both=0.004, seed_rank=0.0005)),
        "rising": (2.0 + 0.012 * (7 - np.log2(ranks)), World("rising", 3, 1000)),
        "undecided_curve": (2.0 + 0.03 * ranks**-0.6, World("power", 1, 100, "heavy", item_rank=0.03, both=0.03)),
    }
    for name, (losses, world) in cases.items():
        decision = decision_of(draw_table(world, losses, np.random.default_rng(11)), world.margin)
        (HERE / f"{name}.svg").write_text(svg_file(rank_figure(decision)), encoding="utf-8")
        print(f"{name}: {decision.verdict}. {decision.sentence} Next: {decision.next_run}")


if __name__ == "__main__":
    main()
