"""`decide`: from results that exist, a table or a run folder, to a decision."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rightrank.data.rows import Row
from rightrank.decision import rule
from rightrank.decision.run import comparable, decide_on, metrics_of, records_of
from rightrank.decision.table import table_of_results
from rightrank.interop.tables import TableOptions, flat, raw_rows, results_of_rows, rows_of_mappings
from rightrank.runs.folder import RunFolder
from rightrank.runs.plugins import first
from rightrank.runs.values import first_command
from rightrank.schema.command import next_commands
from rightrank.schema.decision import Decision
from rightrank.schema.errors import ResultsError
from rightrank.schema.metrics import Checkpoint


@dataclass(frozen=True, slots=True, repr=False)
class Decided:
    """A decision on results that exist, and how the table was read."""

    decision: Decision
    understood: list[str]
    adapter_sentence: str | None = None  # the answer to the first question, of a run folder that has one
    next_commands: Sequence[str | None] = ()  # each next run as a command that can be pasted, of a run folder

    @property
    def next_command(self) -> str | None:
        """The first of them; None if there is none."""
        return first_command(self.next_commands)

    def __repr__(self) -> str:
        """The answer on one line; `print` shows it in full."""
        found = self.decision
        return f"Decided(rank={found.rank}, verdict={found.verdict!r}, margin={found.margin:g})"

    def __str__(self) -> str:
        from rightrank.report.answer import answer_view, labelled

        view = answer_view(self.decision, commands=self.next_commands)
        rows = [("decision", view.training_rank), *view.safe_rows(), *view.next_rows()]
        return "\n".join([*self.understood, *labelled(rows, 10)])

    def _repr_html_(self) -> str:
        from rightrank.report.answer import answer_view, notebook_html
        from rightrank.report.figures import rank_figure
        from rightrank.report.svg import svg_file

        return notebook_html(answer_view(self.decision), "", svg_file(rank_figure(self.decision)))


@dataclass(frozen=True, slots=True)
class _Question:
    """What to decide; see `decide` for each field."""

    metric: str | None
    higher_is_better: bool | None
    margin: float | None
    confidence: float | None
    columns: Mapping[str, str]
    horizon_steps: int | None
    checkpoint: Checkpoint | None


def decide(
    results: str | Path | Iterable[Mapping[str, Any]],
    *,
    metric: str | None = None,
    higher_is_better: bool | None = None,
    margin: float | None = None,
    confidence: float | None = None,
    columns: Mapping[str, str] | None = None,
    horizon_steps: int | None = None,
    checkpoint: Checkpoint | None = None,
) -> Decided:
    """Decide on trainings that have finished, whoever ran them.

    Args:
        results: a CSV or JSONL file, a run folder, another tool's results (see docs/how-to/decide.md), or mappings in memory
            with `rank`, `value` and, if there are any, `lr`, `seed`, `std`, `item`.
        metric: the column of the held-out number, or its name where the column is `value`.
        higher_is_better: None for that of a metric with a known name; any other needs it.
        margin: how much worse than the best is still enough, in the metric's unit; None for the metric's default.
        confidence: name the smallest rank that is enough with this probability, where one seed was trained; None for the rule.
        columns: canonical name → column, where a column has an unusual name.
        horizon_steps: the length of training to answer for.
        checkpoint: which evaluation of each training is compared, where there are several: `last` or `best`; None
            for that of a run folder, else the last.

    Raises:
        ResultsError: the table can't be used; the message names file and row.
    """
    return _decide(
        results, _Question(metric, higher_is_better, margin, confidence, columns or {}, horizon_steps, checkpoint)
    )


def _decide(results: str | Path | Iterable[Mapping[str, Any]], question: _Question) -> Decided:
    if isinstance(results, str | Path):
        folder = RunFolder(Path(results))
        if folder.journal.path.is_file():
            return _decide_run(folder, question)
        return _decide_table(str(results), raw_rows(Path(results)), question)
    return _decide_table("results", rows_of_mappings(results), question)


def _decide_table(where: str, rows: list[Row], question: _Question) -> Decided:
    decided = first(lambda plugin: plugin.decide_rows(rows, question.margin))
    if decided is not None:
        return Decided(*decided)
    options = TableOptions(question.metric, question.higher_is_better, question.columns, question.margin)
    read = results_of_rows(flat(rows), options, where)
    decision = rule.decide(
        table_of_results(read),
        question.margin,
        horizon_steps=question.horizon_steps,
        confidence=question.confidence,
        checkpoint=question.checkpoint or "last",
    )
    return Decided(decision, read.understood)


def _decide_run(folder: RunFolder, question: _Question) -> Decided:
    """Decide on a run folder, at the run's own metric and margin unless the question gives others."""
    records = records_of(folder.journal.read(), str(folder.path))
    started = records.started
    direct = [outcome for outcome in records.outcomes if outcome.arm.is_direct]
    metric = question.metric or started.metric
    known = metrics_of(records)
    if metric not in known or (started.data.form == "own" and metric != started.metric):
        raise ResultsError(f"{folder.path}: the run has no metric {metric!r}; it has {', '.join(known)}")
    ranks = {outcome.rank for outcome in records.finished() if outcome.rank > 0 and outcome.arm.is_direct}
    if records.adapters and len(ranks) < 2:
        raise ResultsError(
            f"{folder.path}: one rank was trained, so the rank to train at is open (rightrank select with --goal training-rank "
            f"continues the run); the adapter: {records.adapters[-1].answer.sentence}"
        )
    outcomes, margin = direct, question.margin
    if metric == started.metric:
        outcomes = comparable(records)
        own = started.settings.get("margin")
        margin = own if margin is None and isinstance(own, int | float) else margin
    decision = decide_on(
        records,
        outcomes,
        metric,
        margin,
        higher=question.higher_is_better,
        horizon_steps=question.horizon_steps,
        confidence=question.confidence,
        checkpoint=question.checkpoint,
    )
    adapter = records.adapters[-1].answer.sentence if records.adapters else None
    commands = next_commands(started, decision, str(folder.path), question.margin) if metric == started.metric else []
    return Decided(decision, [f"{len(direct)} trainings of a run folder"], adapter, commands)
