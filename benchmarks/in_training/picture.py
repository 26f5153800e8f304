"""Draw the picture of docs/how-to/in-your-training.md, from the first stored result of eleven trainings whose end was measured (benchmarks/README.md, archive).

python -m benchmarks.in_training.picture   # writes docs/images/in_training.svg
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rightrank.report.figure import RANK, Figure, draw_band, draw_points, draw_ring, set_log_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HERE = Path(__file__).parent
IMAGE = HERE.parents[1] / "docs" / "images" / "in_training.svg"


def read_result() -> dict[str, Any]:
    """Read the first stored result."""
    result: dict[str, Any] = json.loads((HERE / "results.jsonl").read_text(encoding="utf-8").splitlines()[0])
    return result


def build_figure(result: dict[str, Any]) -> Figure:
    """Plot how much worse each truncation is than the trained adapter, with the upper bound and the margin."""
    top, share = result["trained_rank"], result["cost"]["share"]
    rows = sorted((int(rank), values[1], values[2]) for rank, values in result["candidates"].items())
    unit = "loss, nats" if result["metric"] == "loss" else result["metric"]

    def draw(ax: Axes) -> None:
        draw_band(ax, 0.0, result["margin"], "within the margin")
        draw_ring(
            ax,
            result["rank"],
            {rank: value for rank, value, _ in rows}[result["rank"]],
            f"exported: rank {result['rank']}",
        )
        draw_points(ax, [(rank, value, value, high) for rank, value, high in rows], "truncated, 95% upper bound", "C0")
        set_log_ticks(ax, "x", [rank for rank, _, _ in rows])

    return Figure(
        name="in_training",
        title=f"One training at rank {top}, {result['steps']} steps; its end took {share:.0%} of its time and found rank {result['rank']}",
        x_label=RANK,
        y_label=f"worse than rank {top}: {unit}",
        columns=("rank", "difference", "upper bound"),
        rows=rows,
        draw=draw,
    )


if __name__ == "__main__":
    IMAGE.write_text(build_figure(read_result()).svg, encoding="utf-8")
