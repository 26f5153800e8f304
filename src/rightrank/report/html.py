"""Render `report.html`: one file that opens from disk without a network and shows all values from data as text.

Figures are SVG images, one for each colour scheme of the system.
The Content-Security-Policy allows no script. The model card of an adapter and the page of
its truncations use the same templates.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

from rightrank.adapters.adapter_folders import (
    format_base_arguments,
    format_loading_code,
)
from rightrank.decision.adapter import format_share
from rightrank.decision.run_answers import compare_run_adapters, describe_run_learning_rate, format_provenance
from rightrank.report.adapter_page import build_candidate_table, load_templates
from rightrank.report.answer import (
    Answers,
    build_certainty_rows,
    build_evidence_table,
    describe_training,
    format_cost,
)
from rightrank.report.figures import (
    INSTALL_HINT,
    Figure,
    build_learning_figure,
    build_rank_figure,
    is_matplotlib_installed,
    plot_adapters,
    plot_learning_rates,
)
from rightrank.report.format import format_bytes
from rightrank.schema.events import Records, RunStarted, TestEvaluated
from rightrank.schema.results import Decision
from rightrank.schema.settings import build_reproduce_command
from rightrank.schema.trials import TrialFinished, TrialOutcome

# A trial table with more rows than the first is collapsed, and only the newest rows up to the second are listed.
MAX_VISIBLE_ROWS, MAX_ROWS = 24, 1000
SECTION_FIGURES = ("adapters", "rank_curve")


def build_figures(records: Records, decision: Decision | None) -> list[Figure]:
    """Build every figure that the records support, the rank curve first."""
    figures = [
        None if decision is None else build_rank_figure(decision),
        build_adapter_figure(records),
        build_learning_rate_figure(records),
        build_learning_figure(records),
    ]
    return [figure for figure in figures if figure is not None]


def build_adapter_figure(records: Records) -> Figure | None:
    """Plot the adapters of a run by rank; return None with fewer than two adapters, or before the first answer."""
    started, adapters = records.started, compare_run_adapters(records)
    if len(adapters) < 2:
        return None
    return plot_adapters(records.adapters[-1].answer, adapters, started.metric, started.higher_is_better)


def build_learning_rate_figure(records: Records) -> Figure | None:
    """Plot the learning rates of a run; return None if only one was tried, or has a value."""
    answer = describe_run_learning_rate(records)
    return None if answer is None else plot_learning_rates(answer, records.started)


def render_report(
    records: Records,
    answers: Answers,
    figures: Sequence[Figure] = (),
    *,
    run: str = "RUN",
    exports: Sequence[str] = (),
) -> str:
    """Render the report as one HTML document.

    Args:
        answers: the final answers of the records, or the answers so far.
        figures: the figures to show.
        run: the run folder as commands name it.
        exports: names of the folders in `exports/` next to the report.
    """
    adapter, decision, started = answers.adapter, answers.decision, records.started
    plots = {figure.name: figure for figure in figures}
    return (
        load_templates()
        .get_template("report.html")
        .render(
            started=started,
            run_settings=records.settings,
            subject=_format_subject(started),
            loading_code=_format_loading_code(records) if adapter else "",
            training_settings=describe_training(answers),
            export_command=shlex.join(["rightrank", "export", run, "--to", "vllm"]),
            exports=exports,
            settings=[(name, json.dumps(value, ensure_ascii=False)) for name, value in started.settings.items()],
            **(
                {"decision": None, "figure_hint": "" if is_matplotlib_installed() else INSTALL_HINT}
                if decision is None
                else _list_decision_values(decision)
            ),
            answers=answers,
            adapter=adapter,
            candidates=build_candidate_table(adapter.answer, started.metric) if adapter else [],
            cost=format_cost(records),
            plots=plots,
            extra_plots=[figure for name, figure in plots.items() if name not in SECTION_FIGURES],
            **_list_trial_values(records.outcomes),
            tests=_build_test_rows(records),
            has_files=True,
            command=build_reproduce_command(started.model_name, started.data_name, records.settings),
        )
    )


def render_table_report(trainings: Sequence[TrialOutcome], decision: Decision, source: str, command: str) -> str:
    """Render the page of a decision on a table of results.

    Args:
        trainings: the trainings of the table.
        source: the table's name, as shown on the page.
        command: the command that decides on the table; empty for none.
    """
    template = load_templates().get_template("table.html")
    return template.render(
        headline=Answers(decision).headline,
        source=source,
        command=command,
        has_files=False,
        **_list_decision_values(decision),
        **_list_trial_values(trainings),
    )


def _list_decision_values(decision: Decision) -> dict[str, Any]:
    return {
        "decision": decision,
        "rank_curve": build_rank_figure(decision),
        "evidence": build_evidence_table(decision),
        "certainty": build_certainty_rows(decision),
        "margin": _format_decision_margin(decision),
        "figure_hint": "" if is_matplotlib_installed() else INSTALL_HINT,
    }


def _format_decision_margin(decision: Decision) -> str:
    """Format the margin with the share of the gain that it is, if the base was measured and something gained."""
    amount = f"{decision.margin:.4g}{' nats' if decision.metric == 'loss' else ''}"
    gain = next((evidence.difference for evidence in decision.ranks if evidence.rank == 0), None)
    return f"{format_share(decision.margin / gain)} of the gain ({amount})" if gain and gain > 0 else amount


def _list_trial_values(outcomes: Sequence[TrialOutcome]) -> dict[str, Any]:
    return {
        "rows": [_build_trial_row(outcome) for outcome in outcomes[-MAX_ROWS:]],
        "trials": len(outcomes),
        "fold_rows": len(outcomes) > MAX_VISIBLE_ROWS,
    }


def _build_trial_row(outcome: TrialOutcome) -> dict[str, Any]:
    row: dict[str, Any] = {
        "rank": outcome.rank or "base",
        "learning_rate": f"{outcome.learning_rate:g}" if outcome.rank else "–",
        "seed": outcome.seed if outcome.rank else "–",
        **dict.fromkeys(("value", "train", "seconds", "parameters", "memory"), ""),
        "note": outcome.arm.format_stage(),
    }
    if not isinstance(outcome, TrialFinished):
        return row | {"note": outcome.end_text}
    row["value"] = f"{outcome.value:.4f}" + (f" ({outcome.value_metric})" if outcome.value_metric else "")
    row["note"] = "; ".join(filter(None, [row["note"], *outcome.failed_metrics.values()]))
    row["train"] = "" if outcome.train_value is None else f"{outcome.train_value:.4f}"
    row["seconds"] = f"{outcome.seconds:.0f}" if outcome.seconds else ""
    row["parameters"] = f"{outcome.trainable_parameters:,}" if outcome.trainable_parameters else ""
    row["memory"] = format_bytes(outcome.peak_bytes) if outcome.peak_bytes else ""
    return row


def render_model_card(records: Records, decision: Decision | None) -> str:
    """Render the model card of `adapter/`: front matter for the hub, the answers, the evidence and how to load the adapter."""
    started, adapter_record = records.started, records.adapters[-1]
    answer = adapter_record.answer
    trial = records.by_id[answer.trial_id]
    trained = records.by_id.get(trial.truncate_from or trial.trial_id, trial)
    loading = format_loading_code("this/folder", started.model_name, started.data.classes is not None)
    template = load_templates(autoescape=False).get_template("model_card.md")
    return template.render(
        started=started,
        base_model=name if (name := started.model_name) and _is_hub_name(name) else None,
        trial=trial,
        decision=decision,
        evidence=build_evidence_table(decision) if decision is not None else [],
        adapter_record=adapter_record,
        provenance=format_provenance(trial, trained),
        trained=trained,
        candidates=build_candidate_table(answer, started.metric),
        tests=_build_test_rows(records),
        classification=started.data.form == "classification",
        loading="\n".join(loading),
    )


def _is_hub_name(model: str) -> bool:
    """Return whether a model name can be a hub repository. The hub rejects a card whose base model is a folder."""
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", model) is not None and not Path(model).exists()


def _format_subject(started: RunStarted) -> str:
    if started.model_name is None or started.data_name is None:
        return started.model_name or "a custom trainer"
    names = started.model_name, started.data_name
    model, data = (PurePath(name).name if name.startswith((".", "/", "~")) else name for name in names)
    counts = ", ".join(f"{split.examples:,} {name}" for name, split in started.data.splits.items())
    return f"{model} on {data}" + (f": {counts} examples" if counts else "")


def _format_loading_code(records: Records) -> str:
    """Return code that loads the adapter from the folder next to the report; empty if this package did not write the folder."""
    model = records.started.model_name
    if records.started.is_custom_trainer or model is None:
        return ""
    loading = format_loading_code("adapter", model, records.started.data.classes is not None)
    tokenizer = f"tokenizer = AutoTokenizer.from_pretrained({format_base_arguments(model)})"
    return "\n".join(["from transformers import AutoTokenizer", *loading, tokenizer])


def _build_test_rows(records: Records) -> list[tuple[str, TestEvaluated]]:
    """Return `(adapter, result on the test split)` rows; the adapter is "base", "rank 16", or "rank 4, truncated"."""
    stages = {trial.trial_id: trial.arm.format_stage() for trial in records.list_finished()}
    names = [f"rank {test.rank}" if test.rank else "base" for test in records.tests]
    return [
        (", ".join(filter(None, [name, stages.get(test.trial_id)])), test)
        for name, test in zip(names, records.tests, strict=True)
    ]
