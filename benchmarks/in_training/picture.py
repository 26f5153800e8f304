"""Draw the picture of docs/how-to/in-your-training.md, from the first stored result of eleven trainings whose end was measured (benchmarks/README.md, archive).

python -m benchmarks.in_training.picture   # writes docs/images/in_training.svg
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rightrank.report.figure import Axis, Band, Figure, Mark, Series, build_rank_axis
from rightrank.report.svg import render_svg_file

HERE = Path(__file__).parent
IMAGE = HERE.parents[1] / "docs" / "images" / "in_training.svg"


def read_result() -> dict[str, Any]:
    """Read the first stored result."""
    result: dict[str, Any] = json.loads((HERE / "results.jsonl").read_text(encoding="utf-8").splitlines()[0])
    return result


def render_figure() -> str:
    return render_svg_file(build_figure(read_result()))


def build_figure(result: dict[str, Any]) -> Figure:
    """Plot how much worse each truncation is than the trained adapter, with the upper bound and the margin."""
    top, margin, chosen = result["trained_rank"], result["margin"], result["rank"]
    rows = sorted((int(rank), values[1], values[2]) for rank, values in result["candidates"].items())
    ranks = tuple(rank for rank, _, _ in rows)
    ends = [high for _, _, high in rows] + [difference for _, difference, _ in rows] + [margin, 0.0]
    room = 0.08 * (max(ends) - min(ends))
    share = result["cost"]["share"]
    unit = "loss, nats" if result["metric"] == "loss" else result["metric"]
    return Figure(
        name="in_training",
        title=f"One training at rank {top}, {result['steps']} steps; its end took {share:.0%} of its time and found rank {chosen}",
        alt=f"Held-out loss of the truncations of a rank {top} adapter against that adapter: "
        + "; ".join(f"rank {rank} {difference:+.4f}, at most {high:+.4f}" for rank, difference, high in rows),
        x=build_rank_axis(ranks),
        y=Axis(f"worse than rank {top}: {unit}", limits=(min(ends) - room, max(ends) + room)),
        series=(
            Series(
                "truncated, 95% upper bound",
                ranks,
                tuple(difference for _, difference, _ in rows),
                tuple(difference for _, difference, _ in rows),
                tuple(high for _, _, high in rows),
            ),
        ),
        bands=(Band("within the margin", 0.0, margin),),
        marks=(Mark(f"taken home: rank {chosen}", chosen, next(value for rank, value, _ in rows if rank == chosen)),),
        columns=("rank", "difference", "upper bound"),
        rows=tuple(rows),
    )


if __name__ == "__main__":
    IMAGE.write_text(render_figure(), encoding="utf-8")
