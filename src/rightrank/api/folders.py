"""Functions on a run folder: its status, its report, and the files for other programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rightrank.adapters.adapter_folders import CONFIG_FILE
from rightrank.api.runs import open_run
from rightrank.data.files import UnreadableError, read_json_object, report_disk_errors, require_absent
from rightrank.decision.run_answers import decide_if_possible
from rightrank.report.answer import (
    RunStatus,
    build_answers,
    build_run_status,
    find_last_decision,
    format_screen,
)
from rightrank.runs.folder import PROGRESS_FILE, RunFolder
from rightrank.schema.errors import RunFolderError, SettingsError, suggest_name
from rightrank.schema.events import EvaluationProgress, Records
from rightrank.schema.results import Decision
from rightrank.schema.settings import SelectSettings

if TYPE_CHECKING:
    from rightrank.exports.servers import ExportResult


def write_report(run: str | Path) -> Path:
    """Write `report.html` and the figures of a run again, from its journal alone.

    Raises:
        RunFolderError: there is no run.
    """
    from rightrank.runs.hooks import write_report as write_views

    folder, records, decision = read_run(run, is_live=False)
    with report_disk_errors(folder.path):
        write_views(folder, records, build_answers(records, decision, records.settings.goal))
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
    source: str | Path | Sequence[str | Path],
    to: str,
    out: str | Path | None = None,
    *,
    base: str | None = None,
    check: str | Path | Sequence[str | Path] = (),
    kind: str | None = None,
    settings: SelectSettings | None = None,
    on_event: Callable[[EvaluationProgress], None] = lambda _: None,
) -> ExportResult:
    """Write the files with which a server serves adapters, or a model with an adapter merged into its weights.

    A merged model is loaded back and compared with the adapter on its base.

    Args:
        source: a run folder whose selection has ended, or an adapter folder; for a server also several of them.
        to: vllm, sglang or merged.
        out: the folder to write, which must not exist. None for `exports/<to>` in the current folder or, for a single run, in the run
            folder.
        base: the base model; None for the one that the run or the adapter names.
        check: for a merged model: held-out rows to compare on; by default the run's test split.
        kind: for a merged model: the type of its values, f32, bf16 or f16; None for f32.
        settings: for a merged model from an adapter folder, as in `compare`.
        on_event: receives the progress of each evaluation.

    Raises:
        SettingsError: an unknown target, an argument that belongs to another target, or adapters of different base models.
        RunFolderError: there is no run, it has no decision or adapter, or `out` exists.
        ResultsError: a rank that the server does not serve.
        ModelError: an adapter that cannot be served, or a merged model that cannot be made.
    """
    from rightrank.exports.servers import (
        MERGED,
        SERVERS,
        find_base,
        name_adapters,
        read_served_adapter,
        resolve_path,
        write_server_files,
    )

    names = [*SERVERS, MERGED]
    if to not in names:
        raise SettingsError(f"unknown export target {to!r}{suggest_name(to, names)}; allowed: {', '.join(names)}")
    paths = [Path(source)] if isinstance(source, str | Path) else list(map(Path, source))
    files = [Path(check)] if isinstance(check, str | Path) else list(map(Path, check))
    if to == MERGED and len(paths) != 1:
        raise SettingsError(f"--to {MERGED} takes one adapter, and {len(paths)} were given")
    if to != MERGED and (files or kind or settings):
        raise SettingsError(f"--to {to}: check, type and settings work only with {MERGED}; leave them out")
    sources = [_open_export_source(path) for path in paths]
    adapter, run, records = sources[0]
    adapters = [source_adapter for source_adapter, _, _ in sources]
    if run is not None and settings is not None:
        raise SettingsError(f"{run.path}: a run has its own settings; leave them out, or give an adapter folder")
    parent = run.path if run is not None and len(sources) == 1 else Path()
    target = parent / "exports" / to if out is None else Path(out)
    require_absent(target)
    if base is None and records is not None and len(sources) == 1:
        base = records.started.model_name
    base = find_base(adapters, base)
    with report_disk_errors(target):
        if to != MERGED:
            served = list(map(read_served_adapter, name_adapters(paths), adapters))
            return write_server_files(to, served, base, target)
        from rightrank.exports.merge import write_merged_model

        data = None if records is None else records.started.data_name
        merge_settings = settings or (SelectSettings() if records is None else records.started.select_settings)
        run_data = data and resolve_path(data, adapter)
        return write_merged_model(adapter, base, target, merge_settings, kind or "f32", run_data, files, on_event)


def _open_export_source(path: Path) -> tuple[Path, RunFolder | None, Records | None]:
    """Return the adapter of a run folder with the run and its records, or an adapter folder alone."""
    if (path / CONFIG_FILE).is_file():
        return path, None, None
    folder, _, records = open_run(path, is_live=False)
    if not (folder.adapter / CONFIG_FILE).is_file():
        raise RunFolderError(f"{path}: no adapter yet; run `rightrank select` again, then export")
    return folder.adapter, folder, records


def status(run: str | Path) -> RunStatus:
    """Report the state of a run from its files. Write nothing in the folder.

    Raises:
        RunFolderError: there is no run.
    """
    return _read_status(run)[1]


def format_status(run: str | Path, width: int) -> str:
    """Format the screen of a run with its state and all details, for a terminal of `width` characters.

    Raises:
        RunFolderError: there is no run.
    """
    folder, run_status = _read_status(run)
    adapter = folder.adapter if folder.adapter.is_dir() else None
    return format_screen(run_status.answers, folder.path, adapter, folder.report, width, run_status)


def _read_status(run: str | Path) -> tuple[RunFolder, RunStatus]:
    folder, journal, records = open_run(run, is_live=True)
    try:
        progress = str(read_json_object(folder.path / PROGRESS_FILE).get("progress"))
    except UnreadableError:
        progress = None  # no process is running, or it has just ended
    goal, decided = records.settings.goal, find_last_decision(journal)
    decision = decide_if_possible(records) if decided is None else decided.decision
    answers = build_answers(records, decision if goal == "training-rank" else None, goal, str(run))
    is_locked = folder.is_in_use()
    return folder, build_run_status(str(run), journal, records, answers, is_locked=is_locked, progress=progress)
