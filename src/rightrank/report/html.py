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
from functools import cache
from importlib.resources import files
from math import log10
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from rightrank.decision.run import Records, document
from rightrank.report.adapters import candidate_table
from rightrank.report.answer import answer_view, certainty_rows, evidence_table
from rightrank.report.figure import Figure, parts_of
from rightrank.report.figures import figures_of, margin_range, margin_steps, rank_at
from rightrank.report.format import metric_unit, size, visible
from rightrank.report.sentences import (
    confidence_text,
    cost_of,
    margin_text,
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

MAX_VISIBLE_ROWS, MAX_ROWS = 24, 1000  # of the trial table: a longer one is folded, and its newest are shown
IN_THEIR_SECTIONS = ("adapters", "rank_curve", "staircase")
MAX_NUMBERS = 200  # rows of a figure's numbers; its CSV file has all of them


def render_report(
    records: Records,
    decision: Decision | None,
    further_figures: Sequence[Figure] = (),
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
    plots = {figure.name: figure for figure in (*figures_of(records, decision), *further_figures)}
    script = _asset("figures.js") + "\n" + _asset("page.js")
    return (
        templates()
        .get_template("report.html")
        .render(
            started=records.started,
            subject=subject_text(records.started),
            use_it=use_it(adapter.handed_over, records) if adapter else None,
            export_command=shlex.join(["rightrank", "export", run, "--to", "trl"]),
            exports=exports,
            before=before,
            settings=[
                (name, json.dumps(value, ensure_ascii=False)) for name, value in records.started.settings.items()
            ],
            decision=decision,
            view=answer_view(decision, document(records, decision, goal, estimate)),
            adapter=adapter,
            candidates=candidate_table(adapter.answer, records.started.metric) if adapter else [],
            confidence=confidence_text(records, decision) if decision else "",
            cost=cost_of(records).sentence(),
            evidence=evidence_table(decision) if decision else [],
            certainty=certainty_rows(decision) if decision else [],
            margin=margin_text(decision) if decision else "",
            slider=_slider(decision),
            plots=plots,
            further_plots=[figure for name, figure in plots.items() if name not in IN_THEIR_SECTIONS],
            rows=[_row(outcome) for outcome in records.outcomes[-MAX_ROWS:]],
            trials=len(records.outcomes),
            fold_rows=len(records.outcomes) > MAX_VISIBLE_ROWS,
            tests=test_rows(records),
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
    template = templates().get_template("adapter.html")
    return template.render(sentence=sentence, texts=texts, figures=figures, rows=rows, style=_asset("report.css"))


def templates(escaped: bool = True) -> Environment:
    """The templates; in a page every value is text, and control characters are visible."""
    made = Environment(
        loader=PackageLoader("rightrank.report", "templates"),
        autoescape=escaped,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if escaped and type(value) is str else value,
    )
    made.globals |= {"max_numbers": MAX_NUMBERS, "parts_of": parts_of, "svg": inline_svg, "swatch": swatch}
    made.filters["cell"] = _cell
    made.filters["split_name"] = split_name
    return made


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
    return [_visible_in(inner) for inner in value] if isinstance(value, list | tuple) else value


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
