"""The looks of the live case and the decision on it, as pictures.

python -m benchmarks.rl.pictures      # writes looks_*.svg and decision.svg
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

from benchmarks.rl.replay import Grid, common_rates, live_grid, replay
from rightrank.report.figure import Axis, Figure, Series
from rightrank.report.figures import rank_figure
from rightrank.report.svg import svg_file

HERE = Path(__file__).parent


def looks_figure(grid: Grid, learning_rate: float) -> Figure:
    """Held-out rewards by step at one learning rate: the mean over seeds of each rank."""
    runs = [run for run in grid.values() if run.learning_rate == learning_rate]
    by_rank = {rank: [run for run in runs if run.rank == rank] for rank in sorted({run.rank for run in runs})}
    series, rows = [], []
    for place, (rank, found) in enumerate(by_rank.items()):
        steps = [point.step for point in found[0].points]
        means = [fmean(values) for values in zip(*([p.value for p in run.points] for run in found), strict=True)]
        series.append(Series(f"rank {rank}", tuple(steps), tuple(means), tone=place))
        rows += [(rank, step, value) for step, value in zip(steps, means, strict=True)]
    return Figure(
        name=f"looks_{learning_rate:g}",
        title=f"Learning rate {learning_rate:g}, mean of {len(runs) // len(by_rank)} seeds",
        alt=f"Held-out reward by step at a learning rate of {learning_rate:g}, one line for each rank.",
        x=Axis("step"),
        y=Axis("held-out reward"),
        series=tuple(series),
        columns=("rank", "step", "held-out"),
        rows=tuple(rows),
    )


def main() -> None:
    grid = live_grid()
    for learning_rate in common_rates(grid):
        (HERE / f"looks_{learning_rate:g}.svg").write_text(
            svg_file(looks_figure(grid, learning_rate)), encoding="utf-8"
        )
    decision = replay(grid, common_rates(grid), sorted({seed for _, _, seed in grid})).decision
    assert decision is not None
    (HERE / "decision.svg").write_text(svg_file(rank_figure(decision)), encoding="utf-8")


if __name__ == "__main__":
    main()
