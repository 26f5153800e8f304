"""`report.html`: one file that opens from disk without a network and shows everything from data as text.

Plots are SVG in the page. With JavaScript, a point shows its numbers, and a legend hides a series.
The Content-Security-Policy allows the one script of this file by its hash, and no other source. The card of an adapter and the page of its
truncations come from templates too.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
from collections.abc import Sequence
from functools import cache, partial
from importlib.resources import files
from pathlib import Path, PurePath
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from rightrank.decision.adapter import making_of
from rightrank.decision.records import Answers, Records
from rightrank.models.places import base_arguments, loading_lines
from rightrank.models.ranks import peft_scaling
from rightrank.report.answer import answer_view
from rightrank.report.evidence_tables import (
    candidate_table,
    certainty_rows,
    cost_sentence,
    end_text,
    evidence_table,
    metric_unit,
)
from rightrank.report.figure import Figure, parts_of
from rightrank.report.figures import figures_of
from rightrank.report.format import quantity, size, visible
from rightrank.report.svg import inline_svg, swatch
from rightrank.schema.command import reproduce_command
from rightrank.schema.decision import Decision, HandedOver, Result, ResultsTable
from rightrank.schema.events import DataSummary, RunStarted, TestEvaluated
from rightrank.schema.trials import Arm, EvalPoint, TrialFailed, TrialFinished, TrialOutcome, split_name
from rightrank.version import __version__

MAX_VISIBLE_ROWS, MAX_ROWS = 24, 1000  # of the trial table: a longer one is folded, and its newest are shown
IN_THEIR_SECTIONS = ("adapters", "rank_curve", "staircase")
MAX_NUMBERS = 200  # rows of a figure's numbers; its CSV file has all of them


def render_report(
    records: Records,
    answers: Answers,
    further_figures: Sequence[Figure] = (),
    *,
    run: str = "RUN",
    exports: Sequence[str] = (),
    command: str | None = None,
) -> str:
    """The report as one HTML document.

    Args:
        answers: those of the records, or those so far.
        further_figures: shown after those of the records and the decision.
        run: the run folder, as commands name it.
        exports: names of the folders below `exports/` beside the report.
        command: that repeats it; None for that of the settings.
    """
    adapter, decision, started = answers.adapter, answers.decision, records.started
    plots = {figure.name: figure for figure in (*figures_of(records, decision), *further_figures)}
    script = _asset("figures.js") + "\n" + _asset("page.js")
    return (
        templates()
        .get_template("report.html")
        .render(
            started=started,
            chosen=records.settings,
            subject=_subject_text(started),
            use_it=_use_it(adapter.handed_over, records) if adapter else None,
            export_command=shlex.join(["rightrank", "export", run, "--to", "trl"]),
            exports=exports,
            settings=[(name, json.dumps(value, ensure_ascii=False)) for name, value in started.settings.items()],
            decision=decision,
            view=answer_view(answers),
            adapter=adapter,
            candidates=candidate_table(adapter.answer, started.metric) if adapter else [],
            confidence=_confidence_text(records, decision) if decision else "",
            cost=cost_sentence(records),
            evidence=evidence_table(decision) if decision else [],
            certainty=certainty_rows(decision) if decision else [],
            margin=f"{decision.margin:.4g} {metric_unit(decision.metric)}" if decision else "",
            plots=plots,
            further_plots=[figure for name, figure in plots.items() if name not in IN_THEIR_SECTIONS],
            rows=[_row(outcome) for outcome in records.outcomes[-MAX_ROWS:]],
            trials=len(records.outcomes),
            fold_rows=len(records.outcomes) > MAX_VISIBLE_ROWS,
            tests=_test_rows(records),
            not_tested=_not_tested(records, decision),
            is_alone=command is not None,  # without files beside it
            command=command or reproduce_command(started.model_name, started.data_name, records.settings),
            script=script,
            script_hash=f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}",
        )
    )


def results_report(results: ResultsTable, decision: Decision, source: str, command: str) -> str:
    """The report of a table of finished trainings, of which it knows neither model nor data.

    Args:
        source: the table's name.
        command: that decides on it; empty for none.
    """
    stated = {"metric": results.metric, "higher_is_better": results.higher_is_better, "margin": decision.margin}
    started = RunStarted(
        rightrank_version=__version__,
        fingerprint="",
        settings={"trainer": source, "version": "", **stated},
        environment={f"read {number}": note for number, note in enumerate(results.understood, 1)},
        data=DataSummary(form="own", splits={}, splits_given=False, duplicates_across_splits=0),
        evaluation_items=[],
        metric=results.metric,
        higher_is_better=results.higher_is_better,
        started_at="",
    )
    records = Records.of(started, [])
    records.outcomes.extend(map(partial(_outcome_of, metric=results.metric), results.results))
    return render_report(records, Answers(decision), command=command)


def _outcome_of(result: Result, metric: str) -> TrialOutcome:
    arm = Arm(
        rank=result.rank, learning_rate=result.learning_rate, lora_alpha=1, seed=result.seed, steps=result.steps or 0
    )
    if result.value is None:
        reason = "the table has no result"
        return TrialFailed(trial_id=result.trial_id, **arm.model_dump(), error="error", reason=reason)
    return TrialFinished(
        trial_id=result.trial_id,
        **arm.model_dump(),
        value=result.value,
        metrics={metric: result.value, **result.others},
        item_losses=[],
        item_tokens=[],
        item_scores=result.item_values or None,
        item_weights=result.item_weights or None,
        item_groups=result.item_groups,
        train_value=result.train_value,
        points=[EvalPoint(step=step, value=value) for step, value in result.points],
        trainable_parameters=0,
        train_seconds=0.0,
        train_tokens=0,
        eval_seconds=0.0,
        peak_bytes=0,
    )


@cache
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
    made.globals["style"] = _asset("report.css")
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


def _row(outcome: TrialOutcome) -> dict[str, Any]:
    row: dict[str, Any] = {
        "rank": outcome.rank or "base",
        "learning_rate": f"{outcome.learning_rate:g}" if outcome.rank else "–",
        "seed": outcome.seed if outcome.rank else "–",
        **dict.fromkeys(("value", "train", "seconds", "parameters", "memory"), ""),
        "note": outcome.arm.stage(),
    }
    if not isinstance(outcome, TrialFinished):
        return row | {"note": end_text(outcome)}
    row["value"] = f"{outcome.value:.4f}" + (f" ({outcome.value_metric})" if outcome.value_metric else "")
    row["note"] = "; ".join(filter(None, [row["note"], *outcome.failed_metrics.values()]))
    row["train"] = "" if outcome.train_value is None else f"{outcome.train_value:.4f}"
    row["seconds"] = f"{outcome.seconds:.0f}" if outcome.seconds else ""
    row["parameters"] = f"{outcome.trainable_parameters:,}" if outcome.trainable_parameters else ""
    row["memory"] = size(outcome.peak_bytes) if outcome.peak_bytes else ""
    return row


PICTURE, CURVE = "adapters.svg", "rank_curve.svg"


def model_card(records: Records, decision: Decision | None) -> str:
    """The card of `adapter/`: front matter for the hub, the answers, the evidence, how to load the adapter."""
    started, recorded = records.started, records.adapters[-1]
    answer = recorded.answer
    trial = records.by_id[answer.trial_id]
    loading = loading_lines("this/folder", started.model_name, started.data.classes is not None)
    template = templates(escaped=False).get_template("model_card.md")
    return template.render(
        started=started,
        base_model=name if (name := started.model_name) and _is_hub_name(name) else None,
        trial=trial,
        decision=decision,
        evidence=evidence_table(decision) if decision is not None else [],
        recorded=recorded,
        making=making_of(trial, records.finished()),
        candidates=candidate_table(answer, started.metric),
        tests=_test_rows(records),
        classification=started.data.form == "classification",
        loading="\n".join(loading),
        picture=PICTURE,
        curve=CURVE,
    )


def _is_hub_name(model: str) -> bool:
    """Whether the hub knows it, as far as the name says: it refuses a card whose base is a folder."""
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", model) is not None and not Path(model).exists()


def _subject_text(started: RunStarted) -> str:
    """Model and data in one line, with the number of examples."""
    if started.model_name is None or started.data_name is None:
        return started.model_name or (started.trainer if started.is_table else None) or "a custom trainer"
    names = started.model_name, started.data_name
    model, data = (PurePath(name).name if name.startswith((".", "/", "~")) else name for name in names)
    counts = ", ".join(f"{split.items:,} {split_name(name)}" for name, split in started.data.splits.items())
    return f"{model} on {data}" + (f": {counts} examples" if counts else "")


def _use_it(handed_over: HandedOver, records: Records) -> dict[str, str] | None:
    """What the box shows: the adapter in the names of PEFT, with code that loads it beside the report.

    None for an adapter whose folder this package did not write.
    """
    answer, trials, model = records.adapters[-1].answer, records.by_id, records.started.model_name
    trial = trials.get(answer.trial_id)
    trained = trial and trials.get(trial.truncate_from or trial.trial_id)
    if trial is None or trained is None or records.started.is_own or model is None:
        return None
    alpha, use_rslora = peft_scaling(records.settings.scaling, trial.lora_alpha, trial.rank)
    rank = handed_over.loads_as or trial.rank
    alpha *= (rank / trial.rank) ** (0.5 if use_rslora else 1)  # at the same scale
    loading = loading_lines("adapter", model, records.started.data.classes is not None)
    tokenizer = f"tokenizer = AutoTokenizer.from_pretrained({base_arguments(model)})"
    return {
        "r": str(rank),
        "alpha": f"{alpha:g}",
        "learning_rate": f"{trained.learning_rate:g}",
        "code": "\n".join(["from transformers import AutoTokenizer", *loading, tokenizer]),
    }


def _confidence_text(records: Records, decision: Decision) -> str:
    """The confidence level, or that the answer is an indication, and the evidence behind it."""
    examples = len(records.started.evaluation_items)
    groups = records.started.data.groups
    how = f" in {quantity(groups, 'group')}" if groups else ""
    held_out = f", paired over {quantity(examples, 'held-out example')}{how}" if examples else ""
    level = "An indication" if decision.confidence is None else f"{decision.confidence:.0%} confidence"
    return f"{level}{held_out} and {quantity(_seeds(decision), 'seed')} per rank"


def _seeds(decision: Decision) -> int:
    return max((e.seeds for e in decision.ranks if e.rank > 0), default=1)


def _test_rows(records: Records) -> list[tuple[str, TestEvaluated]]:
    """`(adapter, its reading on the test split)`: "base", "rank 16", "rank 4, truncated"."""
    stages = {trial.trial_id: trial.arm.stage() for trial in records.finished()}
    names = [f"rank {test.rank}" if test.rank else "base" for test in records.tests]
    return [
        (", ".join(filter(None, [name, stages.get(test.trial_id)])), test)
        for name, test in zip(names, records.tests, strict=True)
    ]


def _not_tested(records: Records, decision: Decision | None) -> list[str]:
    """The limits of the evidence, one sentence each."""
    settings = records.settings
    ranks = sorted({trial.rank for trial in records.finished() if trial.rank > 0 and trial.arm.is_direct})
    limits: list[str] = []
    if ranks:
        limits.append(f"Ranks other than {', '.join(map(str, ranks))}.")
    steps = max((trial.steps for trial in records.finished()), default=0)
    if steps:
        limits.append(
            f"Trainings longer than {steps} steps. Low ranks fall behind later, so a longer training may need a higher rank."
        )
    others = [answer.metric for answer in decision.other_metrics] if decision else []
    limits.append(f"Metrics other than {', '.join([records.started.metric, *others])}; other data, prompts or models.")
    if "target_modules" in settings.model_fields_set:
        limits.append(
            f"Target modules other than {','.join(settings.target_modules)}; scalings other than "
            f"{settings.scaling} with alpha {settings.lora_alpha:g}."
        )
    if decision is not None and _seeds(decision) < 2:
        limits.append("Seed noise: each rank has one seed.")
    missing = sum(outcome.rank > 0 and not isinstance(outcome, TrialFinished) for outcome in records.outcomes)
    if missing:
        limits.append(f"{quantity(missing, 'training')} without a result: they count neither for nor against a rank.")
    if not records.tests and not records.started.is_table:
        limits.append("The test split, which is evaluated at the end of the run.")
    return limits
