"""The views of a run: decision.json, the report and the figures, each computed from the records and replaced whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rightrank.data.files import write_text
from rightrank.decision.run import Records, document
from rightrank.report.figure import AnyFigure, Figure
from rightrank.report.figures import figures_of
from rightrank.report.html import render_report
from rightrank.report.spectra import spectrum_figure
from rightrank.report.svg import write_figures
from rightrank.report.tables import sweep_map
from rightrank.runs.folder import RunFolder
from rightrank.schema.decision import Decision, TrainingRankEstimate
from rightrank.schema.errors import InputError
from rightrank.schema.settings import Goal
from rightrank.search.strategies import training_rank_estimate
from rightrank.search.sweep import sweep_rows


def write_views(folder: RunFolder, records: Records, decision: Decision | None, goal: Goal) -> None:
    """Write decision.json, once either question has an answer, and the report."""
    if decision is not None or records.adapters:
        folder.write_decision(answers(records, decision, goal))
    write_report(folder, records, decision, goal)


def answers(records: Records, decision: Decision | None, goal: Goal) -> dict[str, Any]:
    """Both answers as one JSON object; with goal "adapter", an estimate in place of the second."""
    return document(records, decision, goal, _estimate(records, goal))


def write_report(folder: RunFolder, records: Records, decision: Decision | None, goal: Goal) -> None:
    further = further_figures(records, folder.adapter)
    exports = folder.path / "exports"
    page = render_report(
        records,
        decision,
        further,
        goal=goal,
        estimate=_estimate(records, goal),
        run=str(folder.path),
        exports=sorted(path.name for path in exports.iterdir() if path.is_dir()) if exports.is_dir() else (),
    )
    write_text(folder.report, page)


def _estimate(records: Records, goal: Goal) -> TrainingRankEstimate | None:
    return training_rank_estimate(records) if goal == "adapter" else None


def write_all_figures(folder: RunFolder, records: Records, decision: Decision | None) -> None:
    """Write every figure to the run's folder of figures."""
    write_figures(folder.figures, [*figures_of(records, decision), *further_figures(records, folder.adapter)])


def further_figures(records: Records, adapter: Path) -> list[AnyFigure]:
    """The figures beside those of the decision: the sweep's, and the spectrum of the adapter that was handed over."""
    started = records.started
    sweep = sweep_map(sweep_rows(started, records.outcomes), started.metric, started.higher_is_better)
    return [*([] if sweep is None else [sweep]), *_adapter_figures(adapter)]


def _adapter_figures(adapter: Path) -> list[Figure]:
    """No figure before an adapter is handed over, nor for one that is not in PEFT's format."""
    if not (adapter / "adapter_config.json").exists():
        return []
    from rightrank.adapters.spectra import inspect_adapter  # brings torch, which a report without it spares

    try:
        figure = spectrum_figure(inspect_adapter(adapter))
    except InputError:
        return []
    return [] if figure is None else [figure]
