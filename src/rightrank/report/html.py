"""`report.html`: one file that opens from disk without a network and shows everything from data as text.

Plots are SVG in the page. With JavaScript, a point shows its numbers, a legend hides a series and a slider moves the margin.
The Content-Security-Policy allows the one script of this file by its hash, and no other source.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from html import escape
from importlib.resources import files
from math import log10
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from rightrank.decision.run import Records, document
from rightrank.report.adapters import candidate_table, guard_of, guard_table
from rightrank.report.answer import answer_view, certainty_rows, evidence_table
from rightrank.report.figure import AnyFigure, Figure, HeatMap, parts_of
from rightrank.report.figures import figures_of, margin_range, margin_steps, rank_at
from rightrank.report.format import cell_text, metric_unit, size, visible
from rightrank.report.sentences import (
    confidence_text,
    cost_of,
    margin_text,
    next_run_text,
    not_tested,
    subject_text,
    test_rows,
    use_it,
)
from rightrank.report.svg import inline_svg, swatch
from rightrank.schema.command import reproduce_command
from rightrank.schema.decision import Decision, TrainingRankEstimate
from rightrank.schema.settings import Goal
from rightrank.schema.trials import TrialCollapsed, TrialDiverged, TrialFailed, TrialFinished, TrialOutcome, split_name

MAX_VISIBLE_ROWS = 24  # of the trial table; a longer one is folded
IN_THEIR_SECTIONS = ("adapters", "guard_trade", "rank_curve", "staircase")
SIDE_BY_SIDE = ("adapters", "rank_curve", "learning_curves")
MAX_NUMBERS = 200  # rows of a figure's numbers; its CSV file has all of them


def render_report(
    records: Records,
    decision: Decision | None,
    further_figures: Sequence[AnyFigure] = (),
    *,
    goal: Goal = "training-rank",
    estimate: TrainingRankEstimate | None = None,
    run: str = "RUN",
    exports: Sequence[str] = (),
    before: Sequence[str] = (),
) -> str:
    """The report as one HTML document.

    Args:
        records: what the journal holds.
        decision: the decision, or the one so far; None without one.
        further_figures: shown after those of the records and the decision.
        goal: what the run was asked.
        estimate: of the training rank, where it was not asked.
        run: the run folder, as commands name it.
        exports: names of the folders below `exports/` beside the report.
        before: lines on what was to be expected before the run, which the answer does not rest on.
    """
    adapter = records.adapters[-1] if records.adapters else None
    guard = guard_of(records)
    figures = [*figures_of(records, decision), *further_figures]
    plots = {figure.name: figure for figure in figures if isinstance(figure, Figure)}
    script = _asset("figures.js") + "\n" + _asset("page.js")
    return (
        _environment()
        .get_template("report.html")
        .render(
            started=records.started,
            subject=subject_text(records.started),
            use_it=use_it(adapter.handed_over, records) if adapter else None,
            export_command=shlex.join(["rightrank", "export", run, "--to", "trl"]),
            exports=exports,
            before=before,
            settings=_settings_text(records.started.settings),
            decision=decision,
            view=answer_view(decision, document(records, decision, goal, estimate)),
            adapter=adapter,
            candidates=candidate_table(adapter.answer, records.started.metric) if adapter else [],
            guard=guard,
            guard_rows=guard_table(guard) if guard else [],
            confidence=confidence_text(records, decision) if decision else "",
            cost=cost_of(records).sentence(),
            evidence=evidence_table(decision) if decision else [],
            certainty=certainty_rows(decision) if decision else [],
            next_run_cost=next_run_text(records, decision) if decision else "",
            margin=margin_text(decision) if decision else "",
            slider=_slider(decision),
            heat_maps=[figure for figure in figures if isinstance(figure, HeatMap)],
            plots=plots,
            further_plots=[figure for name, figure in plots.items() if name not in IN_THEIR_SECTIONS],
            rows=[_row(outcome) for outcome in records.outcomes],
            fold_rows=len(records.outcomes) > MAX_VISIBLE_ROWS,
            tests=test_rows(records),
            samples=records.samples,
            certificates=records.certificates,
            not_tested=not_tested(records, decision),
            command=reproduce_command(records.started.settings),
            style=_asset("report.css"),
            script=script,
            page_data=script_json({"answer": _answer(decision)}),
            script_hash=script_hash(script),
        )
    )


def adapter_page(sentence: str, texts: Sequence[str], figures: Sequence[Figure], rows: Sequence[Sequence[str]]) -> str:
    """The page of one adapter's truncations: the answer, its figures, a table whose first row is the heading, and further sentences."""
    template = _environment().get_template("adapter.html")
    return template.render(sentence=sentence, texts=texts, figures=figures, rows=rows, style=_asset("report.css"))


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
        _environment()
        .get_template("side_by_side.html")
        .render(
            columns=[_column(number, run) for number, run in enumerate(runs)],
            names=[run.name for run in runs],
            differing=differing_settings(runs),
            style=_asset("report.css"),
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
    found = {figure.name: figure for figure in figures_of(records, decision) if isinstance(figure, Figure)}
    return {
        "name": run.name,
        "view": answer_view(decision, document(records, decision, run.goal)),
        "subject": subject_text(records.started),
        "margin": "" if decision is None else margin_text(decision),
        "cost": cost_of(records).sentence(),
        "figures": [
            replace(found[name], name=f"{name}-{number}") for name in SIDE_BY_SIDE if name in found
        ],  # their ids differ
    }


def differing_settings(runs: Sequence[ShownRun]) -> list[tuple[str, list[str]]]:
    """The settings that are not the same in all runs, with the value of each."""
    settings = [run.records.started.settings for run in runs]
    names = sorted({name for one in settings for name in one})
    rows = [(name, [json.dumps(one.get(name), ensure_ascii=False) for one in settings]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def _environment() -> Environment:
    """Templates in which every value is text and control characters are visible."""
    made = Environment(
        loader=PackageLoader("rightrank.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    made.globals |= {"max_numbers": MAX_NUMBERS, "parts_of": parts_of, "svg": inline_svg, "swatch": swatch}
    made.filters["cell"] = _cell
    made.filters["cell_text"] = cell_text
    made.filters["split_name"] = split_name
    return made


def _finalize(value: Any) -> Any:
    """Makes the control characters of every text visible, but of what a template calls safe."""
    return visible(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.5g}" if isinstance(value, float) else str(value)


@cache
def _asset(name: str) -> str:
    """A file beside the templates, as it goes into a page."""
    return files("rightrank.report").joinpath("templates", name).read_text(encoding="utf-8").strip("\n")


def script_hash(script: str) -> str:
    """The source expression that allows an inline script in a Content-Security-Policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def script_json(value: Any) -> str:
    """JSON that is safe inside a script element, whatever its strings contain."""
    text = json.dumps(_visible_in(value), ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _visible_in(value: Any) -> Any:
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, Mapping):
        return {key: _visible_in(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_visible_in(inner) for inner in value]
    return value


def _answer(decision: Decision | None) -> dict[str, Any] | None:
    """The data of the slider: which rank is enough from which margin, and the values that the rank plot needs."""
    if decision is None:
        return None
    values = {evidence.rank: evidence.value for evidence in decision.ranks}
    return {
        "steps": margin_steps(decision),
        "margin": decision.margin,
        "range": margin_range(decision),
        "unit": metric_unit(decision.metric),
        "values": {str(rank): value for rank, value in values.items()},
        "reference": decision.reference_rank,
        "higher_is_better": decision.higher_is_better,
    }


def _slider(decision: Decision | None) -> dict[str, Any] | None:
    """The slider's start: 0 to 1000 along the logarithm of the margin."""
    if decision is None:
        return None
    low, high = margin_range(decision)
    share = log10(decision.margin / low) / log10(high / low)
    rank = rank_at(margin_steps(decision), decision.margin)
    return {"start": round(1000 * share), "rank": rank, "margin": margin_text(decision)}


def _settings_text(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, json.dumps(value, ensure_ascii=False)) for name, value in settings.items()]


def _row(outcome: TrialOutcome) -> dict[str, Any]:
    row: dict[str, Any] = {
        "rank": outcome.rank or "base",
        "learning_rate": f"{outcome.learning_rate:g}" if outcome.rank else "–",
        "seed": outcome.seed if outcome.rank else "–",
        "value": "",
        "train": "",
        "seconds": "",
        "parameters": "",
        "memory": "",
        "note": outcome.arm.stage(),
    }
    match outcome:
        case TrialFinished():
            row["value"] = f"{outcome.value:.4f}" + (f" ({outcome.value_metric})" if outcome.value_metric else "")
            row["note"] = "; ".join(filter(None, [row["note"], *outcome.failed_metrics.values()]))
            row["train"] = "" if outcome.train_value is None else f"{outcome.train_value:.4f}"
            row["seconds"] = f"{outcome.train_seconds + outcome.eval_seconds:.0f}"
            row["parameters"] = f"{outcome.trainable_parameters:,}" if outcome.trainable_parameters else ""
            row["memory"] = size(outcome.peak_bytes) if outcome.peak_bytes else ""
        case TrialCollapsed():
            row["note"] = f"collapsed: {outcome.reason}"
        case TrialDiverged():
            row["note"] = f"diverged at step {outcome.step}: {outcome.reason}"
        case TrialFailed():
            row["note"] = outcome.reason
    return row


def _text(value: str) -> str:
    return escape(visible(value))
