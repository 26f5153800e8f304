"""Functions on a run folder: its status, its report, and the files for other programs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rightrank.adapters.adapter_folders import CONFIG_FILE
from rightrank.api.runs import open_run
from rightrank.bases.model_sources import list_hub_errors
from rightrank.data.files import UnreadableError, read_json_object, report_disk_errors, require_absent
from rightrank.decision.records import Records, decide_if_possible
from rightrank.report.status import RunStatus, build_run_status, find_last_decision
from rightrank.runs.folder import PROGRESS_FILE, RunFolder
from rightrank.schema.decision import Decision
from rightrank.schema.errors import ResultsError, RunError, RunFolderError, SettingsError, get_first_line
from rightrank.schema.events import EvaluationProgress, JournalRecord
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import TrialFinished

if TYPE_CHECKING:
    from rightrank.exports.exports import ExportResult


def write_report(run: str | Path, figures: Sequence[str] = ()) -> Path:
    """Write `report.html` and the figures of a run again, from its journal alone.

    Args:
        figures: additional formats of the figures besides SVG: pdf, png.

    Raises:
        RunFolderError: there is no run.
        SettingsError: another format.
        MissingExtraError: a format is given, and matplotlib is not installed.
    """
    from rightrank.runs.values import collect_answers
    from rightrank.runs.views import write_report as write_views

    folder, records, decision = read_run(run, is_live=False)
    with report_disk_errors(folder.path):
        write_views(folder, records, collect_answers(records, decision, records.settings.goal), figures)
    return folder.report


def read_run(run: str | Path, *, is_live: bool) -> tuple[RunFolder, Records, Decision | None]:
    """Read a run with its decision on the training rank, which is None if it was not requested or if fewer than two ranks have a result.

    With `is_live`, another process may still be writing.

    Raises:
        RunFolderError: there is no run.
    """
    folder, journal, records = open_run(run, is_live=is_live)
    if records.settings.goal != "training-rank":
        return folder, records, None
    last_decision = find_last_decision(journal)
    return folder, records, decide_if_possible(records) if last_decision is None else last_decision.decision


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
    on_event: Callable[[EvaluationProgress], None] = lambda _: None,
) -> ExportResult:
    """Write the files that another program needs to train with or serve the run's adapter.

    A merged model is loaded back and compared with the adapter on its base.

    Args:
        run: a run folder whose selection has ended; for a merged model an adapter folder too.
        to: peft, trl, axolotl, llamafactory, unsloth, vllm, sglang or merged.
        out: the folder to write, which must not exist; None for `exports/<to>` in the run folder, which is replaced. If it holds
            files of yours, it is moved to `earlier-N` in the run folder.
        rank: the rank of the adapter to export, or for a trainer the rank of the training; the best one at this rank is used. None
            for the adapter in `adapter/`, and the training that it comes from.
        check: for a merged model: held-out rows to compare on; by default the run's test split.
        kind: for a merged model: the type of its values, f32, bf16 or f16; None for f32.
        base: for a merged model from an adapter folder; None for the base that the adapter names.
        settings: for a merged model from an adapter folder, as in `compare`.
        push_to_hub: for peft: `OWNER/NAME` on the Hugging Face hub. The folder is uploaded with its card, with the login of
            `hf auth login`. If the repository does not exist, it is created as a private one.
        on_event: receives the progress of each evaluation.

    Raises:
        SettingsError: an unknown target, or an argument that belongs to another target.
        RunFolderError: there is no run, it has no decision or adapter, or `out` exists.
        ResultsError: a rank that the server does not serve, or that the run has not trained.
        ModelError: a merged model that can't be made.
        RunError: the hub can't be reached, or refuses the upload.
    """
    from rightrank.exports.exports import ADAPTER_TARGETS, MERGED, require_target, resolve_path, write_export
    from rightrank.exports.recipe import build_recipe

    require_target(to)
    if push_to_hub is not None and to != "peft":
        raise SettingsError(f"push_to_hub uploads an adapter with its card; it works with peft, not with {to}")
    files = [Path(check)] if isinstance(check, str | Path) else list(map(Path, check))
    is_adapter = (Path(run) / CONFIG_FILE).is_file()
    if to != MERGED and (files or kind or base):
        raise SettingsError(f"--to {to}: check, type and base work only with {MERGED}; leave them out")
    if settings is not None and not is_adapter:
        raise SettingsError(f"{run}: a run has its own settings; leave them out, or give an adapter folder")
    if is_adapter and rank is not None:
        raise SettingsError(f"{run}: an adapter folder has one rank; leave rank out, or give a run folder")
    if is_adapter and to != MERGED:
        raise RunFolderError(f"{run}: an adapter folder can only be exported to {MERGED}; for {to} give a run folder")
    if out is not None:
        require_absent(Path(out))
    if is_adapter:
        base = base or read_json_object(Path(run) / CONFIG_FILE).get("base_model_name_or_path")
        if out is None or base is None:
            raise SettingsError(
                f"{run}: this is an adapter folder; give --out FOLDER, and --base MODEL if the adapter names none"
            )
        target = Path(out)
        source: tuple[Path, str, SelectSettings, str | None] = Path(run), base, settings or SelectSettings(), None
    else:
        folder, journal, records = open_run(run, is_live=False)
        if rank is None:
            trial, adapter = _find_exported_trial(folder, journal, records), folder.adapter
        else:
            trial = _find_best_trial(records, rank, to in (*ADAPTER_TARGETS, MERGED))
            adapter = folder.require_trial_adapter(trial.trial_id)
        recipe = build_recipe(records.started, trial, adapter, records.list_finished())
        target = folder.path / "exports" / to if out is None else Path(out)
        model, data = (resolve_path(name, recipe.adapter) for name in (base or recipe.model, recipe.data))
        source = recipe.adapter, model, recipe.settings, data

    def write() -> ExportResult:
        if to == MERGED:
            from rightrank.exports.merge import MergeRequest, write_merged_model

            return write_merged_model(MergeRequest(*source, kind or "f32", files, on_event), target)
        return write_export(to, recipe, target)

    with report_disk_errors(target):
        exported = write() if out is not None else _replace_export(folder, target, write)
    return exported if push_to_hub is None else replace(exported, address=_upload_adapter(exported.folder, push_to_hub))


def _replace_export(folder: RunFolder, target: Path, write: Callable[[], ExportResult]) -> ExportResult:
    """Write an export over an earlier one. If the earlier one holds files that the new one lacks, it stays in `earlier-N`."""
    earlier_folder = folder.move_aside([str(target.relative_to(folder.path))])
    try:
        exported = write()
    finally:
        if earlier_folder is not None and not target.exists():
            (earlier_folder / target.name).rename(target)
            earlier_folder.rmdir()
    if earlier_folder is None:
        return exported
    names, earlier_names = (
        {path.name for path in export.iterdir()} for export in (target, earlier_folder / target.name)
    )
    if not earlier_names - names:
        shutil.rmtree(earlier_folder)
        return exported
    user_files = ", ".join(sorted(earlier_names - names))
    note = f"the earlier export contained files that this one does not write ({user_files}); it was moved to {earlier_folder / target.name}"
    return replace(exported, notes=[*exported.notes, note])


def _upload_adapter(adapter: Path, repo_id: str) -> str:
    """Upload a folder with an adapter and its card, and return the address."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError

    hub = HfApi()
    try:
        full_name = hub.create_repo(repo_id, private=True, exist_ok=True).repo_id
        hub.upload_folder(repo_id=full_name, folder_path=adapter, commit_message="Upload the LoRA adapter")
    except (HFValidationError, LocalTokenNotFoundError) as error:
        raise SettingsError(
            f"{repo_id}: {get_first_line(error)}; give OWNER/NAME, and log in with: hf auth login"
        ) from None
    except list_hub_errors() as error:
        raise RunError(
            f"{repo_id}: not uploaded ({get_first_line(error)}); the files are in {adapter}: try again"
        ) from None
    return f"{hub.endpoint}/{full_name}"


def _find_exported_trial(folder: RunFolder, journal: Sequence[JournalRecord], records: Records) -> TrialFinished:
    """Return the trial whose adapter is in `adapter/`, or if none was exported, the trial that the decision names."""
    decision = find_last_decision(journal)
    if records.adapters:
        trial_id = records.adapters[-1].answer.trial_id
    elif decision is not None and decision.adapter_trial_id is not None:
        trial_id = decision.adapter_trial_id
    else:
        raise RunFolderError(f"{folder.path}: no adapter yet; run `rightrank select` again, then export")
    trial = records.by_id.get(trial_id)
    if trial is None:
        raise RunFolderError(
            f"{folder.path}: the journal lacks the trial {trial_id} of the adapter; run the same `rightrank select` again"
        )
    return trial


def _find_best_trial(records: Records, rank: int, includes_truncations: bool) -> TrialFinished:
    """Return the full training at a rank with the best held-out value, optionally also among truncations."""
    finished = [trial for trial in records.list_finished() if trial.rank > 0 and trial.arm.stop_at is None]
    trials = [trial for trial in finished if includes_truncations or trial.arm.is_direct]
    candidates = [trial for trial in trials if trial.rank == rank]
    if not candidates:
        ranks = ", ".join(map(str, sorted({trial.rank for trial in trials}))) or "none"
        description = "no adapter of" if includes_truncations else "no training at"
        raise ResultsError(f"the run has {description} rank {rank}; give one of {ranks}, or leave rank out")
    sign = -1 if records.started.higher_is_better else 1
    return min(candidates, key=lambda trial: (sign * trial.value, trial.seed))


def status(run: str | Path) -> RunStatus:
    """Report the state of a run from its files. Write nothing in the folder.

    Raises:
        RunFolderError: there is no run.
    """
    folder, journal, records = open_run(run, is_live=True)
    try:
        progress = read_json_object(folder.path / PROGRESS_FILE)
    except UnreadableError:
        progress = {}  # no process is running, or it has just ended
    from rightrank.runs.values import estimate_training_rank

    goal = records.settings.goal
    estimate = None if goal == "training-rank" else estimate_training_rank(records)
    return build_run_status(str(run), journal, records, goal, folder.is_in_use(), progress, estimate)
