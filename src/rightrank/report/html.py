"""`report.html`: one file, no network, no script; everything that comes from data is escaped."""

from __future__ import annotations

import base64
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from rightrank.records import (
    Decision,
    RunStarted,
    Sample,
    TestEvaluated,
    TrialDiverged,
    TrialFailed,
    TrialFinished,
    TrialOutcome,
)
from rightrank.report.rank_curve import draw, rank_curve


def render_report(
    started: RunStarted,
    outcomes: list[TrialOutcome],
    decision: Decision | None,
    tests: list[TestEvaluated],
    samples: list[Sample],
) -> str:
    """The report as one HTML document."""
    environment = Environment(
        loader=PackageLoader("rightrank.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    plot = None
    if decision is not None:
        plot = "data:image/svg+xml;base64," + base64.b64encode(draw(rank_curve(decision), "svg")).decode()
    return environment.get_template("report.html").render(
        started=started,
        decision=decision,
        plot=plot,
        rows=[_row(outcome) for outcome in outcomes],
        tests=tests,
        samples=samples,
    )


def _row(outcome: TrialOutcome) -> dict[str, Any]:
    row: dict[str, Any] = {
        "rank": outcome.rank,
        "learning_rate": f"{outcome.learning_rate:g}" if outcome.rank else "–",
        "seed": outcome.seed if outcome.rank else "–",
        "value": "",
        "train": "",
        "seconds": "",
        "parameters": "",
        "note": "",
    }
    match outcome:
        case TrialFinished():
            row["value"] = f"{outcome.value:.4f}"
            row["train"] = "" if outcome.train_value is None else f"{outcome.train_value:.4f}"
            row["seconds"] = f"{outcome.train_seconds + outcome.eval_seconds:.0f}"
            row["parameters"] = f"{outcome.trainable_parameters:,}"
        case TrialDiverged():
            row["note"] = f"diverged at step {outcome.step}: {outcome.reason}"
        case TrialFailed():
            row["note"] = outcome.reason
    return row
