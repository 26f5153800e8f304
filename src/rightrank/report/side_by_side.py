"""Two or more runs side by side: one page without scripts, with what each answers and the settings that differ."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rightrank.decision.run import Records
from rightrank.records import Decision
from rightrank.report.draw import inline_svg
from rightrank.report.figure import Figure
from rightrank.report.figures import figures_of
from rightrank.report.html import asset, environment
from rightrank.report.sentences import cost_of, headline, margin_text, progress_text
from rightrank.report.use_it import subject_text
from rightrank.settings import Goal

FIGURES = ("adapters", "rank_curve", "learning_curves")


@dataclass(frozen=True, slots=True)
class ShownRun:
    """A run to show: its records, its decision if it has one, and its goal."""

    name: str  # its folder
    records: Records
    decision: Decision | None
    goal: Goal


def render_side_by_side(runs: Sequence[ShownRun]) -> str:
    """The page: a column for each run."""
    runs = _with_short_names(runs)
    return (
        environment()
        .get_template("side_by_side.html")
        .render(
            columns=[_column(number, run) for number, run in enumerate(runs)],
            names=[run.name for run in runs],
            differing=differing_settings(runs),
            style=asset("templates", "report.css"),
        )
    )


def _with_short_names(runs: Sequence[ShownRun]) -> Sequence[ShownRun]:
    """The runs by the names of their folders, where these tell them apart."""
    names = [Path(run.name).name for run in runs]
    if "" in names or len(set(names)) < len(names):
        return runs
    return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def _column(number: int, run: ShownRun) -> dict[str, object]:
    records, decision = run.records, run.decision
    answer = records.adapters[-1].answer if records.adapters else None
    found = {figure.name: figure for figure in figures_of(records, decision) if isinstance(figure, Figure)}
    return {
        "name": run.name,
        "headline": headline(decision, answer, run.goal),
        "subject": subject_text(records.started),
        "adapter": None if answer is None else answer.sentence,
        "sentence": decision.sentence if decision is not None else progress_text(records),
        "margin": "" if decision is None else margin_text(decision),
        "verdict": "" if decision is None else decision.verdict.replace("_", " "),
        "cost": cost_of(records).sentence(),
        "figures": [(found[name].alt, _svg(number, found[name])) for name in FIGURES if name in found],
    }


def _svg(number: int, figure: Figure) -> str:
    """The drawing, with ids that no other column has."""
    return inline_svg(replace(figure, name=f"{figure.name}-{number}"))


def differing_settings(runs: Sequence[ShownRun]) -> list[tuple[str, list[str]]]:
    """The settings that are not the same in all runs, with the value of each."""
    settings = [run.records.started.settings for run in runs]
    names = sorted({name for one in settings for name in one})
    rows = [(name, [json.dumps(one.get(name), ensure_ascii=False) for one in settings]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]
