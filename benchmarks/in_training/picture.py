"""README's second picture, from the first stored result of eleven trainings whose end was measured (docs/explanation/science.md, archive).

python -m benchmarks.in_training.picture   # writes docs/images/in_training.svg
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rightrank.report.figure import Axis, Band, Figure, Mark, Series, rank_axis
from rightrank.report.svg import svg_file

HERE = Path(__file__).parent
IMAGE = HERE.parents[1] / "docs" / "images" / "in_training.svg"


def stored() -> dict[str, Any]:
    """The first result."""
    found: dict[str, Any] = json.loads((HERE / "results.jsonl").read_text(encoding="utf-8").splitlines()[0])
    return found


def drawing() -> str:
    return svg_file(figure_of(stored()))


def figure_of(found: dict[str, Any]) -> Figure:
    """How much worse each truncation is than the adapter that was trained, with the upper bound, and the margin."""
    top, margin, chosen = found["trained_rank"], found["margin"], found["rank"]
    rows = sorted((int(rank), values[1], values[2]) for rank, values in found["candidates"].items())
    ranks = tuple(rank for rank, _, _ in rows)
    ends = [high for _, _, high in rows] + [difference for _, difference, _ in rows] + [margin, 0.0]
    room = 0.08 * (max(ends) - min(ends))
    share = found["cost"]["share"]
    unit = "loss, nats" if found["metric"] == "loss" else found["metric"]
    return Figure(
        name="in_training",
        title=f"One training at rank {top}, {found['steps']} steps; its end took {share:.0%} of its time and found rank {chosen}",
        alt=f"Held-out loss of the truncations of a rank {top} adapter against that adapter: "
        + "; ".join(f"rank {rank} {difference:+.4f}, at most {high:+.4f}" for rank, difference, high in rows),
        x=rank_axis(ranks),
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
    IMAGE.write_text(drawing(), encoding="utf-8")
