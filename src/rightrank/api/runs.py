"""Verbs on a run folder: report, export, repair, status."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rightrank.data.files import UnreadableError, read_json_object, report_disk_errors, require_absent
from rightrank.decision.run import Records, decision_so_far, last_decided, records_of
from rightrank.hooks.event_log import PROGRESS_FILE
from rightrank.interop.exports import Exported, require_target, write_export
from rightrank.interop.recipe import recipe_of
from rightrank.report.status import RunStatus, is_fresh, run_status
from rightrank.runs.folder import RunFolder
from rightrank.runs.journal import Repaired, collector_paused
from rightrank.schema.decision import Decision
from rightrank.schema.errors import RunFolderError
from rightrank.schema.events import JournalRecord
from rightrank.schema.settings import Goal
from rightrank.schema.trials import TrialFinished


def write_report(run: str | Path) -> Path:
    """Write `report.html` and the figures of a run again, from its journal alone.

    Raises:
        RunFolderError: no run there.
    """
    from rightrank.hooks import report as views  # which `status` does without

    folder, journal, records = _opened(run, settled=False)
    goal = _goal(records)
    decision = None if goal == "adapter" else _decision(journal, records)
    with report_disk_errors(folder.path):
        views.write_report(folder, records, decision, goal)
        views.write_all_figures(folder, records, decision)
    return folder.report


def begun_as(run: str | Path) -> dict[str, object]:
    """Return the model, the data and the settings of a run, with which `select_rank` resumes or continues it.

    Raises:
        RunFolderError: no run there, or one of another version that has settings this one does not know.
    """
    folder, _, records = _opened(run, settled=True)
    started = records.started
    for name in ("model", "data"):
        value = started.settings.get(name)
        if not isinstance(value, str) or value.startswith("in memory"):
            raise RunFolderError(
                f"{folder.path}: its {name} was in memory; call select_rank with it to continue the run"
            )
    return dict(started.settings)


def _opened(run: str | Path, *, settled: bool) -> tuple[RunFolder, list[JournalRecord], Records]:
    """A run to read; `settled` where its process may still be writing."""
    folder = RunFolder.existing(run)
    journal = folder.journal.read_settled() if settled else folder.journal.read()
    return folder, journal, records_of(journal, str(folder.path))


def _decision(journal: Sequence[JournalRecord], records: Records) -> Decision | None:
    """The decision of the run, or the one so far."""
    decided = last_decided(journal)
    return decision_so_far(records) if decided is None else decided.decision


def _goal(records: Records) -> Goal:
    """The goal of the last `select`; an own trainer's run without one asked for the training rank."""
    return "adapter" if records.started.settings.get("goal") == "adapter" else "training-rank"


def export(run: str | Path, to: str, out: str | Path | None = None) -> Exported:
    """Write what another program needs to train or serve the run's adapter.

    Args:
        run: a run folder whose selection has ended.
        to: peft, trl, axolotl, llamafactory, unsloth or vllm, or a plug-in's.
        out: the folder to write, which must not exist; None for `exports/<to>` in the run folder, replaced whole.

    Raises:
        SettingsError: an unknown target.
        RunFolderError: no run there, one without a decision or an adapter, or `out` exists.
        ResultsError: a rank that the server does not serve.
    """
    require_target(to)
    folder, journal, records = _opened(run, settled=False)
    recipe = recipe_of(records.started, _handed_over(folder, journal, records), folder.adapter, records.finished())
    if records.adapters and records.adapters[-1].guard:
        recipe = replace(recipe, guard=records.adapters[-1].guard.sentence)
    with report_disk_errors(folder.path):
        return write_export(to, recipe, _place(folder, to, out))


def _handed_over(folder: RunFolder, journal: Sequence[JournalRecord], records: Records) -> TrialFinished:
    """The trial whose adapter is in `adapter/`: by the answer to the first question, or where nothing was saved by the decision."""
    decided = last_decided(journal)
    if records.adapters:
        chosen = records.adapters[-1].answer.trial_id
    elif decided is not None and decided.adapter_trial_id is not None:
        chosen = decided.adapter_trial_id
    else:
        raise RunFolderError(f"{folder.path}: no adapter yet; run `rightrank select` again, then export")
    trial = next((trial for trial in records.finished() if trial.trial_id == chosen), None)
    if trial is None:
        raise RunFolderError(
            f"{folder.path}: the journal lacks the trial {chosen} of the adapter; run `rightrank repair`"
        )
    return trial


def repair(run: str | Path) -> Repaired:
    """Keep the whole records of a damaged journal and set the damaged lines aside in a file of their own.

    Raises:
        RunFolderError: no run there, a process at work in it, or a run whose start is damaged.
    """
    folder = RunFolder.existing(run)
    with folder.locked(), report_disk_errors(folder.path):
        return folder.journal.repair()


def _place(folder: RunFolder, to: str, out: str | Path | None) -> Path:
    """The folder of an export: a folder that the user names must not exist, the run's own is replaced."""
    if out is None:
        return folder.path / "exports" / to
    require_absent(Path(out))
    return Path(out)


@collector_paused()
def status(run: str | Path) -> RunStatus:
    """Report where a run stands, from its files; nothing in the folder is written.

    Raises:
        RunFolderError: no run there.
    """
    folder, journal, records = _opened(run, settled=True)
    try:
        found = read_json_object(folder.path / PROGRESS_FILE)
    except UnreadableError:
        found = {}  # no process runs, or it has just ended
    progress = found if "progress" in found and is_fresh(found) else None
    return run_status(str(run), journal, records, _goal(records), folder.is_locked(), progress)
