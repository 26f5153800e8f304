"""Many data sets over one base and one set of workers, with a run folder for each and one table for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rightrank.errors import InputError, RunError, SettingsError
from rightrank.executors.pool import Pool
from rightrank.executors.pool_factory import offloaded_base, open_pool
from rightrank.io.data import load_data
from rightrank.io.files import report_disk_errors, write_text
from rightrank.io.matrix import MatrixConfig, MatrixJob
from rightrank.io.run_folder import RunFolder
from rightrank.preparation import Bases, Request
from rightrank.records import Decision, RunEvent, TrialCollapsed, TrialDiverged, TrialFailed, TrialFinished
from rightrank.records.observer import Observer
from rightrank.report.matrix_table import MatrixRow, matrix_csv
from rightrank.returns import Selected
from rightrank.selection.early import require_request
from rightrank.selection.executor import job_of, largest_needs
from rightrank.selection.finalize import finalize, finalize_adapter
from rightrank.selection.select import run_selection
from rightrank.selection.start import PreparedSelection, prepare_selection
from rightrank.settings import SelectSettings, make_settings
from rightrank.settings.identity import PLACEMENT
from rightrank.settings.migration import current_names

TABLE = "table.csv"


@dataclass(frozen=True, slots=True)
class MatrixSelected:
    """The result of a matrix: a row for each job, and a selection for each one that was decided."""

    rows: tuple[MatrixRow, ...]
    selected: Mapping[str, Selected]
    table: Path


def select_many(matrix: MatrixConfig, out: Path, further: Mapping[str, object], observer: Observer) -> MatrixSelected:
    """Select a rank for every data set of a matrix; see `rightrank.api.select_matrix`."""
    notices: dict[str, None] = {}
    requests = {job.name: _request(matrix.model, job, further, notices) for job in matrix.jobs}
    for notice in notices:
        observer.notice(notice)
    settings = _placement(requests)
    with ExitStack() as stack:
        folders = {name: RunFolder(out / name) for name in requests}
        for folder in folders.values():
            stack.enter_context(folder.locked())
        stack.enter_context(report_disk_errors(out))
        ended = (_one_by_one if settings.executor == "local" else _on_workers)(requests, folders, out, observer)
        rows = tuple(_row(name, folders[name], ended[name]) for name in requests)
        write_text(out / TABLE, matrix_csv(rows))
    selected = {name: end for name, end in ended.items() if isinstance(end, Selected)}
    return MatrixSelected(rows, selected, out / TABLE)


def _request(model: str, job: MatrixJob, further: Mapping[str, object], notices: dict[str, None]) -> Request:
    """The job as a request, its settings and data checked before anything is loaded; `notices` collects what to report."""
    try:
        values, renamed = current_names(job.settings)
        notices |= dict.fromkeys(renamed)
        settings = make_settings({**values, **further})
        require_request(model, job.data, settings)
        load_data(Path(job.data), settings)
    except InputError as error:
        raise type(error)(f"job {job.name!r}: {error}") from None
    return Request(model, None, job.data, settings)


def _placement(requests: Mapping[str, Request]) -> SelectSettings:
    """The settings of where trainings run, which all jobs must share."""
    found = {tuple(getattr(request.settings, name) for name in PLACEMENT) for request in requests.values()}
    if len(found) > 1:
        raise SettingsError(f"jobs differ in {', '.join(PLACEMENT)}: give these once, for all")
    return next(iter(requests.values())).settings


Ended = Selected | RunError


def _one_by_one(
    requests: Mapping[str, Request], folders: Mapping[str, RunFolder], _out: Path, observer: Observer
) -> dict[str, Ended]:
    """In this process: one job after another, over one base."""
    bases: Bases = {}
    ended: dict[str, Ended] = {}
    for name, request in requests.items():
        one = prepare_selection(request, folders[name], _of_job(name, observer), bases)
        try:
            ended[name] = run_selection(one)
        except RunError as error:
            ended[name] = error
    return ended


def _on_workers(
    requests: Mapping[str, Request], folders: Mapping[str, RunFolder], out: Path, observer: Observer
) -> dict[str, Ended]:
    """On workers that all jobs share: a free worker takes a trial of any job."""
    bases: Bases = {}
    selections = {
        name: prepare_selection(request, folders[name], _of_job(name, observer), bases)
        for name, request in requests.items()
    }
    jobs = [job_of(name, requests[name], one.prepared, one.selection) for name, one in selections.items()]
    observers = {name: one.selection.observer for name, one in selections.items()}
    prepared = [one.prepared for one in selections.values()]
    settings = prepared[0].settings
    with (
        offloaded_base(prepared[0].runtime),
        open_pool(settings, jobs, out, largest_needs(prepared), observer, observers) as pool,
    ):
        decisions = _run_all(selections, pool)
    ended: dict[str, Ended] = {}
    for name, decision in decisions.items():
        ended[name] = decision if isinstance(decision, RunError) else finalize(selections[name], decision)
    return ended


def _run_all(selections: Mapping[str, PreparedSelection], pool: Pool) -> dict[str, Decision | RunError | None]:
    """Run the loops of all jobs at once: each outcome goes to its job, which submits more when it waits for none."""
    ended: dict[str, Decision | RunError | None] = {}

    def submit(name: str) -> None:
        selection = selections[name].selection
        # While workers have the base, the test split can't be read: it is at the end.
        selection.answer_adapter(partial(finalize_adapter, selections[name], reads_test_split=False))
        if trials := selection.wanted():
            pool.submit(name, trials, selection.base_loss)
            return
        try:
            ended[name] = selection.end()
        except RunError as error:
            ended[name] = error

    for name in selections:
        submit(name)
    for name, outcome in pool.outcomes():
        try:
            selections[name].selection.keep(outcome)
        except RunError as error:
            ended[name] = error
            pool.drop(name)
            continue
        if not pool.is_waiting(name):
            submit(name)
    return ended


def _of_job(name: str, observer: Observer) -> Observer:
    """The observer of one job: its notices start with the job's name."""

    def notice(text: str) -> None:
        observer.notice(f"{name}: {text}")

    return Observer(
        on_event=lambda event: _notice_outcome(event, notice), notice=notice, should_stop=observer.should_stop
    )


def _notice_outcome(event: RunEvent, notice: Callable[[str], None]) -> None:
    match event:
        case TrialFinished():
            notice(f"{event.arm.label()} held-out {event.value:.4f}")
        case TrialCollapsed() | TrialDiverged() | TrialFailed():
            notice(f"{event.arm.label()} {event.reason}")
        case _:
            pass


def _row(name: str, folder: RunFolder, ended: Ended) -> MatrixRow:
    if isinstance(ended, RunError):
        return MatrixRow(name, "failed", None, None, None, None, None, 0, str(folder.path), str(ended))
    decision = ended.decided
    if decision is None:
        answer = ended.answers["adapter_answer"]
        value = next(one["value"] for one in answer["candidates"] if one["trial_id"] == answer["trial_id"])
        top, trained = answer["trained_rank"], ended.trainings
        return MatrixRow(name, "adapter", None, answer["rank"], None, value, top, trained, str(folder.path))
    chosen = next(evidence for evidence in decision.ranks if evidence.rank == decision.fallback_rank)
    return MatrixRow(
        name,
        decision.verdict,
        decision.rank,
        decision.fallback_rank,
        chosen.learning_rate,
        chosen.value,
        decision.reference_rank,
        ended.trainings,
        str(folder.path),
    )
