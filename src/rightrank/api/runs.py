"""Verbs on results: `decide` on trainings that exist, and report, export, repair, status of a run folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rightrank.data.files import UnreadableError, read_json_object, report_disk_errors, require_absent, write_text
from rightrank.decision import rule
from rightrank.decision.next_run import next_commands
from rightrank.decision.records import (
    Answers,
    Records,
    comparable,
    decide_on,
    decision_so_far,
    metrics_of,
    records_of,
    trials_frame,
)
from rightrank.decision.table import other_tables, table_of_results
from rightrank.models.adapter_folders import CONFIG_FILE
from rightrank.models.model_sources import hub_errors
from rightrank.report.answer import build_answer_view, format_labelled_rows, render_notebook_html
from rightrank.report.status import RunStatus, build_run_status, find_last_decision
from rightrank.runs.folder import PROGRESS_FILE, RunFolder
from rightrank.runs.journal import RepairResult
from rightrank.schema.decision import Decision, ResultsTable
from rightrank.schema.errors import ResultsError, RunError, RunFolderError, SettingsError, first_line
from rightrank.schema.events import Evaluating, JournalRecord
from rightrank.schema.metrics import Checkpoint
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import TrialFinished

if TYPE_CHECKING:  # what each verb alone needs is imported by it: `status` is to be quick
    from pandas import DataFrame

    from rightrank.interop.exports import Exported


def write_report(run: str | Path, figures: Sequence[str] = ()) -> Path:
    """Write `report.html` and the figures of a run again, from its journal alone.

    Args:
        figures: further formats of the figures beside SVG: pdf, png.

    Raises:
        RunFolderError: no run there.
        SettingsError: another format.
        MissingExtraError: a format that needs the extra `figures`.
    """
    from rightrank.hooks.report import write_report as write_views
    from rightrank.report.figures import build_figures
    from rightrank.report.svg import write_figures
    from rightrank.runs.values import build_answers

    folder, journal, records = _open_run(run, settled=False)
    decision, goal = None, records.settings.goal
    if goal == "training-rank":
        decision = decision_so_far(records) if (decided := find_last_decision(journal)) is None else decided.decision
    with report_disk_errors(folder.path):
        further = write_views(folder, records, build_answers(records, decision, goal))
        write_figures(folder.figures, [*build_figures(records, decision), *further], figures)
    return folder.report


def to_pandas(run: str | Path, *, examples: bool = False) -> DataFrame:
    """Return the trials of a run as a table, or with `examples` the scores of their held-out examples.

    Args:
        examples: a row for each held-out example of each finished trial, in place of one for each trial.

    Raises:
        RunFolderError: no run there.
    """
    _, _, records = _open_run(run, settled=True)
    return trials_frame(records, examples)


def load_run_config(run: str | Path) -> dict[str, object]:
    """Return the model, the data and the settings of a run, with which `select_rank` resumes or continues it.

    Raises:
        RunFolderError: no run there, or one of another version that has settings this one does not know.
    """
    folder, _, records = _open_run(run, settled=True)
    started = records.started
    for name, place in (("model", started.model_name), ("data", started.data_name)):
        if place is None or place.startswith("in memory"):
            raise RunFolderError(
                f"{folder.path}: its {name} was in memory; call select_rank with it to continue the run"
            )
    return dict(started.settings)


def _open_run(run: str | Path, *, settled: bool) -> tuple[RunFolder, list[JournalRecord], Records]:
    """A run to read; `settled` where its process may still be writing."""
    folder = RunFolder.open_existing(run)
    journal = folder.journal.read_complete_lines() if settled else folder.journal.read()
    return folder, journal, records_of(journal, str(folder.path))


def export(
    run: str | Path,
    to: str,
    out: str | Path | None = None,
    *,
    rank: int | None = None,
    check: str | Path | Sequence[str | Path] = (),
    kind: str | None = None,
    base: str | None = None,
    settings: SelectSettings | None = None,
    push_to_hub: str | None = None,
    on_event: Callable[[Evaluating], None] = lambda _: None,
) -> Exported:
    """Write what another program needs to train or serve the run's adapter.

    A merged model is loaded back and compared with the adapter over its base.

    Args:
        run: a run folder whose selection has ended; for a merged model an adapter folder too.
        to: peft, trl, axolotl, llamafactory, unsloth, vllm, sglang or merged.
        out: the folder to write, which must not exist; None for `exports/<to>` in the run folder, which is replaced; one with
            files of your own is moved to `earlier-N` in the run folder.
        rank: of the run's best adapter of this rank, or for a trainer of its best training at this rank; None for the adapter that was handed
            over, and the training that it comes from.
        check: of a merged model: held-out rows to compare on; the run's test split by default.
        kind: of a merged model: the type of its values, f32, bf16 or f16; None for f32.
        base: of a merged model from an adapter folder; None for the base that the adapter names.
        settings: of a merged model from an adapter folder, as in `compare`.
        push_to_hub: of peft: `OWNER/NAME` on the Hugging Face hub, where the folder is uploaded with its card, as who `hf auth login` says. A
            repository that does not exist is made, private.
        on_event: receives the progress of each evaluation.

    Raises:
        SettingsError: an unknown target, or an argument that goes with another one.
        RunFolderError: no run there, one without a decision or an adapter, or `out` exists.
        ResultsError: a rank that the server does not serve, or that the run has not trained.
        ModelError: a merged model that can't be made.
        RunError: the hub can't be reached, or refuses the upload.
    """
    from rightrank.interop.exports import LOADED, MERGED, absolute, require_target, write_export
    from rightrank.interop.recipe import recipe_of

    require_target(to)
    if push_to_hub is not None and to != "peft":
        raise SettingsError(f"push_to_hub uploads an adapter with its card; it goes with peft, not {to}")
    files = [Path(check)] if isinstance(check, str | Path) else list(map(Path, check))
    is_adapter = (Path(run) / CONFIG_FILE).is_file()
    if to != MERGED and (files or kind or base):
        raise SettingsError(f"--to {to}: check, type and base go with {MERGED}; leave them out")
    if settings is not None and not is_adapter:
        raise SettingsError(f"{run}: a run has its own settings; leave them out, or give an adapter folder")
    if is_adapter and rank is not None:
        raise SettingsError(f"{run}: an adapter folder has one rank; leave rank out, or give a run folder")
    if is_adapter and to != MERGED:
        raise RunFolderError(f"{run}: an adapter folder, of which {MERGED} is made; for {to} give a run folder")
    if out is not None:
        require_absent(Path(out))
    if is_adapter:
        base = base or read_json_object(Path(run) / CONFIG_FILE).get("base_model_name_or_path")
        if out is None or base is None:
            raise SettingsError(f"{run}: an adapter folder; give --out FOLDER, and --base MODEL where it names none")
        place = Path(out)
        source: tuple[Path, str, SelectSettings, str | None] = Path(run), base, settings or SelectSettings(), None
    else:
        folder, journal, records = _open_run(run, settled=False)
        if rank is None:
            trial, adapter = _find_exported_trial(folder, journal, records), folder.adapter
        else:
            trial = _find_best_trial(records, rank, to in (*LOADED, MERGED))
            adapter = folder.require_trial_adapter(trial.trial_id)
        recipe = recipe_of(records.started, trial, adapter, records.finished())
        place = folder.path / "exports" / to if out is None else Path(out)
        model, data = (absolute(name, recipe.adapter) for name in (base or recipe.model, recipe.data))
        source = recipe.adapter, model, recipe.settings, data

    def write() -> Exported:
        if to == MERGED:
            from rightrank.interop.merge import Merge, write_merged

            return write_merged(Merge(*source, kind or "f32", files, on_event), place)
        return write_export(to, recipe, place)

    with report_disk_errors(place):
        exported = write() if out is not None else _replace_export(folder, place, write)
    return exported if push_to_hub is None else replace(exported, address=_upload_adapter(exported.folder, push_to_hub))


def _replace_export(folder: RunFolder, place: Path, write: Callable[[], Exported]) -> Exported:
    """Write an export over an earlier one, which stays in `earlier-N` where it holds files that the new one does not write."""
    aside = folder.move_aside([str(place.relative_to(folder.path))])
    try:
        exported = write()
    finally:
        if aside is not None and not place.exists():
            (aside / place.name).rename(place)
            aside.rmdir()
    if aside is None:
        return exported
    names, former = ({path.name for path in export.iterdir()} for export in (place, aside / place.name))
    if not former - names:
        shutil.rmtree(aside)
        return exported
    own = ", ".join(sorted(former - names))
    note = f"the earlier export held files that this one does not write ({own}); it was moved to {aside / place.name}"
    return replace(exported, notes=[*exported.notes, note])


def _upload_adapter(adapter: Path, repo_id: str) -> str:
    """Upload a folder with an adapter and its card; the address."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError

    hub = HfApi()
    try:
        made = hub.create_repo(repo_id, private=True, exist_ok=True).repo_id
        hub.upload_folder(repo_id=made, folder_path=adapter, commit_message="Upload the LoRA adapter")
    except (HFValidationError, LocalTokenNotFoundError) as error:
        raise SettingsError(
            f"{repo_id}: {first_line(error)}; give OWNER/NAME, and log in with: hf auth login"
        ) from None
    except hub_errors() as error:
        raise RunError(
            f"{repo_id}: not uploaded ({first_line(error)}); the files are in {adapter}: try again"
        ) from None
    return f"{hub.endpoint}/{made}"


def _find_exported_trial(folder: RunFolder, journal: Sequence[JournalRecord], records: Records) -> TrialFinished:
    """The trial whose adapter is in `adapter/`: by the answer to the first question, or where nothing was saved by the decision."""
    decided = find_last_decision(journal)
    if records.adapters:
        chosen = records.adapters[-1].answer.trial_id
    elif decided is not None and decided.adapter_trial_id is not None:
        chosen = decided.adapter_trial_id
    else:
        raise RunFolderError(f"{folder.path}: no adapter yet; run `rightrank select` again, then export")
    trial = records.by_id.get(chosen)
    if trial is None:
        raise RunFolderError(
            f"{folder.path}: the journal lacks the trial {chosen} of the adapter; run `rightrank repair`"
        )
    return trial


def _find_best_trial(records: Records, rank: int, with_truncations: bool) -> TrialFinished:
    """The trial of a rank with the best held-out value, among trainings to their end, and truncations where these count."""
    finished = [trial for trial in records.finished() if trial.rank > 0 and trial.arm.stop_at is None]
    trials = [trial for trial in finished if with_truncations or trial.arm.is_direct]
    of_rank = [trial for trial in trials if trial.rank == rank]
    if not of_rank:
        ranks = ", ".join(map(str, sorted({trial.rank for trial in trials}))) or "none"
        what = "no adapter of" if with_truncations else "no training at"
        raise ResultsError(f"the run has {what} rank {rank}; give one of {ranks}, or leave rank out")
    sign = -1 if records.started.higher_is_better else 1
    return min(of_rank, key=lambda trial: (sign * trial.value, trial.seed))


def repair(run: str | Path) -> RepairResult:
    """Keep the whole records of a damaged journal and set the damaged lines aside in a file of their own.

    Raises:
        RunFolderError: no run there, a process at work in it, or a run whose start is damaged.
    """
    folder = RunFolder.open_existing(run)
    with folder.lock(), report_disk_errors(folder.path):
        return folder.journal.repair()


def status(run: str | Path) -> RunStatus:
    """Report where a run stands, from its files; nothing in the folder is written.

    Raises:
        RunFolderError: no run there.
    """
    folder, journal, records = _open_run(run, settled=True)
    try:
        progress = read_json_object(folder.path / PROGRESS_FILE)
    except UnreadableError:
        progress = {}  # no process runs, or it has just ended
    return build_run_status(str(run), journal, records, records.settings.goal, folder.is_in_use(), progress)


@dataclass(frozen=True, slots=True, repr=False)
class DecisionResult:
    """A decision on results that exist, and how the table was read."""

    decision: Decision
    understood: list[str]
    adapter_sentence: str | None = None  # the answer to the first question, of a run folder that has one
    next_commands: Sequence[str | None] = ()  # each next run as a command that can be pasted, of a run folder
    table: ResultsTable | None = None  # the trainings; None: a run folder has them

    def write_report(self, path: str | Path, source: str = "a table of results", command: str = "") -> Path:
        """Write the report of a table: the answer, the curve, the evidence by rank and all trainings, in one HTML file.

        Args:
            source: the table's name, as the page gives it.
            command: that decides on it; by default none.

        Raises:
            ResultsError: a run folder, which has its own report.
        """
        from rightrank.report.html import render_results_report

        if self.table is None:
            raise ResultsError(
                "a report is written of a table of trainings; that of a run folder is written by: rightrank report RUN"
            )
        with report_disk_errors(Path(path)):
            write_text(Path(path), render_results_report(self.table, self.decision, source, command))
        return Path(path)

    @property
    def next_command(self) -> str | None:
        """The first of them; None if there is none."""
        return next((command for command in self.next_commands if command is not None), None)

    def __repr__(self) -> str:
        """The answer on one line; `print` shows it in full."""
        decision = self.decision
        return f"Decided(rank={decision.rank}, verdict={decision.verdict!r}, margin={decision.margin:g})"

    def __str__(self) -> str:
        view = build_answer_view(Answers(self.decision), self.next_commands)
        rows = [("decision", view.training_rank), ("", view.safe_choice), *view.build_next_rows()]
        return "\n".join([*self.understood, *format_labelled_rows(rows, 10)])

    def _repr_html_(self) -> str:
        from rightrank.report.figures import build_rank_figure
        from rightrank.report.svg import render_svg_file

        return render_notebook_html(build_answer_view(Answers(self.decision)), "", render_svg_file(build_rank_figure(self.decision)))


def decide(
    results: str | Path | Iterable[Mapping[str, Any]],
    *,
    metric: str | None = None,
    higher_is_better: bool | None = None,
    margin: float | None = None,
    confidence: float | None = None,
    columns: Mapping[str, str] | None = None,
    checkpoint: Checkpoint | None = None,
) -> DecisionResult:
    """Decide on trainings that have finished, whoever ran them.

    Args:
        results: a CSV or JSONL file, a run folder, another tool's results (see docs/how-to/decide.md), a study of Optuna, or
            mappings in memory with `rank`, `value` and, if there are any, `lr`, `seed`, `std`, `item`.
        metric: the column of the held-out number, or its name where the column is `value`.
        higher_is_better: None for that of a metric with a known name; any other needs it.
        margin: how much worse than the best is still enough, in the metric's unit; None for the metric's default.
        confidence: name the smallest rank that is enough with this probability, where scores by example give one; None for
            that of a run folder, else 0.75.
        columns: canonical name → column, where a column has an unusual name; `group` says which examples belong together.
        checkpoint: which evaluation of each training is compared, where there are several: `last` or `best`; None
            for that of a run folder, else the last.

    Raises:
        ResultsError: the table can't be used; the message names file and row.
    """
    from rightrank.interop.table_rows import raw_rows, rows_of_mappings
    from rightrank.interop.tables import results_of_rows

    further: dict[str, Any] = {} if confidence is None else {"confidence": confidence}
    if isinstance(results, str | Path):
        folder = RunFolder(Path(results))
        if folder.journal.path.is_file():
            if columns:
                raise ResultsError(
                    "--columns: a run folder has its own columns and groups in its journal; leave it out"
                )
            return _decide_run_folder(folder, metric, margin, further | {"higher": higher_is_better, "checkpoint": checkpoint})
        where, rows = str(results), raw_rows(Path(results))
    else:
        given: Any = results
        if hasattr(given, "trials_dataframe"):  # a study of Optuna
            if higher_is_better is None and len(given.directions) == 1:
                higher_is_better = given.directions[0].name == "MAXIMIZE"
            given = given.trials_dataframe()
        where, rows = "results", rows_of_mappings(given)
    read = results_of_rows(rows, where, metric, higher_is_better, margin, columns or {})
    others = other_tables(read)
    decision = rule.decision_of(
        table_of_results(read), margin, checkpoint=checkpoint or "last", others=others, **further
    )
    return DecisionResult(decision, read.understood, table=read)


def _decide_run_folder(folder: RunFolder, metric: str | None, margin: float | None, further: Mapping[str, Any]) -> DecisionResult:
    """Decide on a run folder, at the run's own metric and margin unless the question gives others."""
    from rightrank.runs.run import add_base_note

    records = records_of(folder.journal.read(), str(folder.path))
    started = records.started
    direct = [outcome for outcome in records.outcomes if outcome.arm.is_direct]
    metric, asked = metric or started.metric, margin
    known = metrics_of(records)
    if metric not in known or (started.data.form == "own" and metric != started.metric):
        raise ResultsError(f"{folder.path}: the run has no metric {metric!r}; it has {', '.join(known)}")
    ranks = {outcome.rank for outcome in records.finished() if outcome.rank > 0 and outcome.arm.is_direct}
    if records.adapters and len(ranks) < 2:
        raise ResultsError(
            f"{folder.path}: one rank was trained, so the rank to train at is open (rightrank select with --goal training-rank "
            f"continues the run); the adapter: {records.adapters[-1].answer.sentence}"
        )
    outcomes = direct
    if metric == started.metric:
        outcomes = comparable(records)
        margin = records.settings.margin if margin is None else margin
    decision = add_base_note(decide_on(records, outcomes, metric, margin, **further), records)
    adapter = records.adapters[-1].answer.sentence if records.adapters else None
    decision = decision.model_copy(update={"adapter_sentence": adapter})
    commands = next_commands(started, decision.next_runs, str(folder.path), asked) if metric == started.metric else []
    return DecisionResult(decision, [f"{len(direct)} trainings of a run folder"], adapter, commands)
