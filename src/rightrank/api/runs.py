"""Functions on finished trainings: `decide`, and the trials and settings of a run folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from rightrank.data.files import report_disk_errors, write_text
from rightrank.decision import rule
from rightrank.decision.run_answers import decide_run, list_comparable_outcomes
from rightrank.decision.table import build_table
from rightrank.report.answer import Answers, build_next_rows
from rightrank.report.format import format_labelled_rows
from rightrank.runs.folder import RunFolder, build_trials_frame
from rightrank.schema.errors import ResultsError, RunFolderError, SettingsError, quote_value
from rightrank.schema.events import JournalRecord, Records, build_next_commands, read_records
from rightrank.schema.metrics import Checkpoint, Margin
from rightrank.schema.results import Decision
from rightrank.schema.trials import TrialOutcome

if TYPE_CHECKING:  # functions import their own dependencies, so that `status` is quick
    from pandas import DataFrame


def to_pandas(run: str | Path, *, examples: bool = False) -> DataFrame:
    """Return the trials of a run as a table, or with `examples` the scores of their held-out examples.

    Args:
        run: a run folder. `decide` returns a decision that has a table of its own, with a row for each rank.
        examples: return one row for each held-out example of each finished trial instead of one for each trial.

    Raises:
        RunFolderError: there is no run.
    """
    _, _, records = open_run(run, is_live=True)
    return build_trials_frame(records, examples)


def load_run_config(run: str | Path) -> dict[str, object]:
    """Return the model, the data and the settings of a run, with which `select_rank` resumes or continues it.

    Raises:
        RunFolderError: there is no run, or it comes from another version with settings that this one does not have.
    """
    folder, _, records = open_run(run, is_live=True)
    started = records.started
    for name, source in (("model", started.model_name), ("data", started.data_name)):
        if source is None or source.startswith("in memory"):
            raise RunFolderError(
                f"{folder.path}: its {name} was in memory; call select_rank with it to continue the run"
            )
    return dict(started.settings)


def open_run(run: str | Path, *, is_live: bool) -> tuple[RunFolder, list[JournalRecord], Records]:
    """Read a run. With `is_live`, another process may still be writing, and the files stay unchanged.

    Raises:
        RunFolderError: there is no run.
    """
    folder = RunFolder.open_existing(run)
    journal = folder.journal.read_complete_lines() if is_live else folder.journal.read()
    return folder, journal, read_records(journal, str(folder.path))


@dataclass(frozen=True, slots=True, repr=False)
class DecisionResult:
    """A decision on finished trainings, and a description of how the table was read."""

    decision: Decision
    input_notes: list[str]
    next_commands: Sequence[str | None] = ()  # of a run folder: for each next run, the command that continues the run
    trainings: Sequence[TrialOutcome] | None = None  # of a table; None for a run folder

    def write_report(self, path: str | Path, source: str = "a table of results", command: str = "") -> Path:
        """Write the report of a table: the result, the curve, the evidence by rank and all trainings, in one HTML file.

        Args:
            source: the table's name, as shown on the page.
            command: the command that makes the same decision; by default none.

        Raises:
            ResultsError: the results are a run folder, which has its own report.
        """
        from rightrank.report.html import render_table_report

        if self.trainings is None:
            raise ResultsError(
                "a report is written of a table of trainings; that of a run folder is written by: rightrank report RUN"
            )
        with report_disk_errors(Path(path)):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            write_text(Path(path), render_table_report(self.trainings, self.decision, source, command))
        return Path(path)

    @property
    def next_command(self) -> str | None:
        """Return the first command among the next runs; None if there is none."""
        return next((command for command in self.next_commands if command is not None), None)

    def __repr__(self) -> str:
        """Return the decision on one line; `print` shows it in full."""
        decision = self.decision
        return f"DecisionResult(rank={decision.rank}, verdict={decision.verdict!r}, margin={decision.margin:g})"

    def __str__(self) -> str:
        answers = Answers(self.decision, next_commands=self.next_commands)
        rows = [("decision", self.decision.sentence), *build_next_rows(answers)]
        return "\n".join([*self.input_notes, *format_labelled_rows(rows, 10)])


# What each argument of `decide` may be, checked without conversion: "false" is no bool.
DECIDE_ARGUMENTS: Mapping[str, tuple[Any, str]] = {
    "metric": (str, "a name, such as 'loss'"),
    "higher_is_better": (bool, "True or False"),
    "confidence": (float, "a probability from 0.5 to below 1"),
    "columns": (Mapping[str, str], "a mapping of names to columns, such as {'rank': 'r'}"),
    "ignore": (list[str], "a list of columns"),
    "where": (Mapping[str, Any], "a mapping of columns to values, such as {'task': 'a'}"),
    "checkpoint": (Checkpoint, "'last' or 'best'"),
}


def _require_decide_arguments(**values: object) -> None:
    """Raise for an argument of another type than `decide` takes.

    Raises:
        SettingsError: names the argument, what was given and what is allowed.
    """
    for name, value in values.items():
        kind, allowed = DECIDE_ARGUMENTS[name]
        try:
            TypeAdapter(kind).validate_python(value, strict=True)
        except ValidationError:
            raise SettingsError(f"{name}: got {quote_value(value)}; give {allowed}") from None


def decide(
    results: str | Path | Iterable[Mapping[str, Any]],
    *,
    metric: str | None = None,
    higher_is_better: bool | None = None,
    margin: Margin | None = None,
    confidence: float | None = None,
    columns: Mapping[str, str] | None = None,
    ignore: Iterable[str] = (),
    where: Mapping[str, object] | None = None,
    checkpoint: Checkpoint | None = None,
) -> DecisionResult:
    """Decide on finished trainings of any origin.

    Args:
        results: a file of results, a run folder, another tool's results (see docs/how-to/decide.md), a data frame, or
            mappings with `rank`, a held-out metric and, if there are any, `lr`, `seed`, `std`, `item`.
        metric: the column of the held-out number, or the metric's name if the column is `value`.
        higher_is_better: None for the direction of a metric with a known name; other metrics need it.
        margin: the loss of quality that you accept: a share of the gain over rank 0 such as "2%", or a number in the metric's unit;
            None for 1% of the gain.
        confidence: name the smallest rank that is enough with this probability, if per-example scores give one; None for
            that of a run folder, else 0.6.
        columns: canonical name → column, for columns with other names; `group` says which examples belong together.
        ignore: columns that are not read, because a difference in them does not matter.
        where: column → value; only the rows with these values are read.
        checkpoint: the evaluation of each training to compare, if there are several: `last` or `best`; None
            for that of a run folder, else the last.

    Raises:
        SettingsError: an argument of another type.
        ResultsError: the table can't be used; the message names file and row.
    """
    ignored = ignore if isinstance(ignore, str) else list(ignore)
    given: dict[str, object] = {
        "metric": metric,
        "higher_is_better": higher_is_better,
        "confidence": confidence,
        "checkpoint": checkpoint,
    }
    given |= {"columns": columns, "ignore": ignored, "where": where}
    _require_decide_arguments(**{name: value for name, value in given.items() if value is not None})
    from rightrank.tables.trainings import read_result_table

    options: dict[str, Any] = {} if confidence is None else {"confidence": confidence}
    if isinstance(results, str | Path):
        folder = RunFolder(Path(results))
        if folder.journal.path.is_file():
            if columns or where or ignored:
                raise ResultsError(
                    "--columns, --ignore, --where: a run folder has its own columns and groups in its journal; leave them out"
                )
            return _decide_run_folder(
                folder, metric, margin, options | {"higher": higher_is_better, "checkpoint": checkpoint}
            )
    table = read_result_table(
        results,
        metric=metric,
        higher_is_better=higher_is_better,
        columns=columns,
        ignore=ignored,
        where=where,
    )
    scores = build_table(table.outcomes, table.metric, table.higher_is_better)
    decision = rule.decide_table(scores, margin, checkpoint=checkpoint or "last", **options)
    return DecisionResult(decision, table.notes, trainings=table.outcomes)


def _decide_run_folder(
    folder: RunFolder, metric: str | None, margin: Margin | None, options: Mapping[str, Any]
) -> DecisionResult:
    """Decide on a run folder, at the run's own metric and margin unless others are given."""
    records = read_records(folder.journal.read(), str(folder.path))
    started = records.started
    metric = metric or started.metric
    metrics = records.list_metrics()
    if metric not in metrics or (started.data.form == "custom" and metric != started.metric):
        raise ResultsError(f"{folder.path}: the run has no metric {metric!r}; it has {', '.join(metrics)}")
    ranks = {outcome.rank for outcome in records.list_finished() if outcome.rank > 0 and outcome.arm.is_direct}
    if records.adapters and len(ranks) < 2:
        raise ResultsError(
            f"{folder.path}: only one rank was trained, so there is no decision on the training rank (rightrank select with "
            f"--goal training-rank continues the run); the adapter: {records.adapters[-1].answer.sentence}"
        )
    decision = decide_run(records, metric, margin, **options)
    if records.adapters:
        decision = decision.model_copy(update={"adapter_sentence": records.adapters[-1].answer.sentence})
    commands: list[str | None] = []
    if metric == started.metric:
        path, tried_rates = str(folder.path), records.list_tried_rates()
        commands = build_next_commands(started, decision.next_runs, path, margin, tried_rates)
    notes = [f"{len(list_comparable_outcomes(records))} trainings of a run folder"]
    return DecisionResult(decision, notes, commands)
