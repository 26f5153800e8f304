"""Plots of a run on matplotlib axes, to edit, to combine and to save.

    from rightrank import plots

    ax = plots.rank_curve("run")
    ax.figure.savefig("rank_curve.pdf")

Each function draws on `ax`, or on the axes of a new figure, and returns the axes. A run is a folder, or the result of `select_rank`.
All functions raise `RunFolderError` if there is no run, `ResultsError` if it has nothing to plot yet, and `MissingExtraError` if
matplotlib is not installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from rightrank.api.folders import read_run
from rightrank.api.runs import DecisionResult, decide
from rightrank.report import figures
from rightrank.report.figures import Figure, require_matplotlib
from rightrank.report.html import build_adapter_figure, build_learning_rate_figure
from rightrank.runs.run import Selected
from rightrank.schema.errors import ResultsError, SettingsError
from rightrank.schema.events import Records
from rightrank.schema.results import Decision

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["adapters", "learning_curves", "learning_rates", "rank_curve"]

Run: TypeAlias = str | Path | Selected


def rank_curve(run: Run | DecisionResult | Decision, ax: Axes | None = None) -> Axes:
    """Plot held-out values against rank, with the paired bounds, the margin and the chosen rank.

    A run without a decision on the training rank is plotted as by `adapters`.

    Args:
        run: a run, a file of results, or what `decide` returns.
    """
    if isinstance(run, str | Path) and Path(run).is_file():
        run = decide(run)
    if isinstance(run, DecisionResult | Decision):
        return _plot(figures.build_rank_figure(run if isinstance(run, Decision) else run.decision), ax)
    decision = _read_run(run)[1]
    return adapters(run, ax) if decision is None else _plot(figures.build_rank_figure(decision), ax)


def adapters(run: Run, ax: Axes | None = None) -> Axes:
    """Plot the held-out values of trained and truncated adapters against their rank, with the paired bounds and the margin."""
    return _plot(build_adapter_figure(_read_run(run)[0]), ax)


def learning_rates(run: Run, ax: Axes | None = None) -> Axes:
    """Plot held-out values against the learning rate at the largest rank, early in training and at its end."""
    return _plot(build_learning_rate_figure(_read_run(run)[0]), ax)


def learning_curves(run: Run, ax: Axes | None = None) -> Axes:
    """Plot held-out values and the training loss by step, the best training of each rank."""
    return _plot(figures.build_learning_figure(_read_run(run)[0]), ax)


def _get_path(run: Run) -> Path:
    if not isinstance(run, str | Path | Selected):
        raise SettingsError(f"{type(run).__name__} cannot be plotted; give a run folder, or the result of select_rank")
    return run.run if isinstance(run, Selected) else Path(run)


def _read_run(run: Run) -> tuple[Records, Decision | None]:
    _, records, decision = read_run(_get_path(run), is_live=True)
    return records, decision


def _plot(figure: Figure | None, ax: Axes | None) -> Axes:
    require_matplotlib()
    if figure is None:
        raise ResultsError("there is nothing to plot yet: no training of the run has the values that this plot shows")
    if ax is None:
        from matplotlib import pyplot

        _, ax = pyplot.subplots(layout="constrained")
    return figure.plot(ax)
