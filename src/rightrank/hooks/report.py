"""The views of a run: decision.json, the report, the figures and the adapter's card. Each is computed from the records and replaced as a whole."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from statistics import median

from rightrank.data.files import replace_file, write_text
from rightrank.decision.records import Answers, Records, decide_if_possible
from rightrank.report.figure import Axis, Figure, Series, compute_log_ticks
from rightrank.report.figures import build_adapter_figure, build_figures
from rightrank.report.html import ADAPTERS_IMAGE, RANK_CURVE_IMAGE, render_model_card, render_report
from rightrank.report.svg import write_figures
from rightrank.runs.folder import RunFolder
from rightrank.runs.hook import Hook, SelectionEnd, SelectionStart
from rightrank.runs.values import collect_answers
from rightrank.schema.decision import Decision
from rightrank.schema.errors import InputError
from rightrank.schema.events import AdapterRecorded, Event, RunStopped
from rightrank.schema.results import Inspection
from rightrank.schema.trials import OUTCOMES, SCHEMA_VERSION

MAX_SHARE = 0.05  # the fraction of the wall time for writing the report while trials run
MAX_TICKS = 12  # up to this number, each singular value has a tick


class Report(Hook):
    """Keeps the report, the figures, decision.json and the adapter's card up to date."""

    is_required = False
    _start: SelectionStart
    _next_write = 0.0  # the earliest time of the next report, by the monotonic clock

    def on_start(self, start: SelectionStart) -> None:
        self._start = start

    def on_event(self, event: Event) -> None:
        if isinstance(event, AdapterRecorded):
            records = self._start.records()
            _write_card(self._start.folder, records, None)
            self._write_views(records, None)
        if isinstance(event, RunStopped) or (isinstance(event, OUTCOMES) and time.monotonic() >= self._next_write):
            start, records = time.monotonic(), self._start.records()
            decides_training_rank = self._start.selection.settings.goal == "training-rank"
            self._write_views(records, decide_if_possible(records) if decides_training_rank else None)
            end = time.monotonic()  # a report of many trials takes longer, so the next one waits in proportion
            self._next_write = end + (end - start) / MAX_SHARE

    def on_end(self, end: SelectionEnd) -> None:
        folder, records, selected = end.folder, end.records, end.selected
        write_figures(folder.figures, build_figures(records, selected.decision_or_none))
        if selected.adapter is not None:
            _write_card(folder, records, selected.decision_or_none)
        write_figures(folder.figures, self._write_views(records, selected.decision_or_none))

    def _write_views(self, records: Records, decision: Decision | None) -> list[Figure]:
        """Write decision.json, once a deployment rank or a training rank is known, and the report; see `write_report`."""
        folder, answers = self._start.folder, collect_answers(records, decision, self._start.selection.settings.goal)
        if decision is not None or records.adapters:
            write_text(
                folder.decision,
                json.dumps({"schema_version": SCHEMA_VERSION} | answers.build_document(), indent=2, allow_nan=False)
                + "\n",
            )
        return write_report(folder, records, answers)


def _write_card(folder: RunFolder, records: Records, decision: Decision | None) -> None:
    """Write the adapter's card, with its figures, into `adapter/`."""
    figure = build_adapter_figure(records)
    write_figures(folder.figures, [] if figure is None else [figure])
    for name in (ADAPTERS_IMAGE, RANK_CURVE_IMAGE):
        if (folder.figures / name).exists():
            with replace_file(folder.adapter / name) as temporary:
                shutil.copy2(folder.figures / name, temporary)
    write_text(folder.adapter / "README.md", render_model_card(records, decision))


def write_report(folder: RunFolder, records: Records, answers: Answers) -> list[Figure]:
    """Write the report of the answers; return its figures that are not computed from the records."""
    extra_figures = _build_adapter_figures(folder.adapter)
    exports = folder.path / "exports"
    page = render_report(
        records,
        answers,
        extra_figures,
        run=str(folder.path),
        exports=sorted(path.name for path in exports.iterdir() if path.is_dir()) if exports.is_dir() else (),
    )
    write_text(folder.report, page)
    return extra_figures


def _build_adapter_figures(adapter: Path) -> list[Figure]:
    """Build the spectrum of the exported adapter.

    There is no figure before the export, for an adapter that is not in PEFT's format, or where torch is not installed.
    """
    if not (adapter / "adapter_config.json").exists():
        return []
    try:
        from rightrank.adapters.spectra import inspect_adapter
    except ModuleNotFoundError:
        return []
    try:
        figure = _build_spectrum_figure(inspect_adapter(adapter))
    except InputError:
        return []
    return [] if figure is None else [figure]


def _build_spectrum_figure(inspection: Inspection) -> Figure | None:
    """Plot the median of the singular values over the modules, in descending order, with the smallest and the largest."""
    spectra = [module.singular_values for module in inspection.modules if any(v > 0 for v in module.singular_values)]
    if not spectra:
        return None
    count = max(len(spectrum) for spectrum in spectra)
    columns = [[s[k] for s in spectra if k < len(s) and s[k] > 0] for k in range(count)]
    nonempty = [(k + 1, values) for k, values in enumerate(columns) if values]
    x = tuple(k for k, _ in nonempty)
    low, high = 0.9 * min(min(values) for _, values in nonempty), 1.1 * max(max(values) for _, values in nonempty)
    return Figure(
        name="spectrum",
        title=f"Singular values of the adapter, {len(spectra)} modules",
        alt=f"Singular values of s·B·A over {len(spectra)} modules, median from "
        f"{median(nonempty[0][1]):.3g} for the first to {median(nonempty[-1][1]):.3g} for number {x[-1]}. {inspection.summary.sentence}",
        x=Axis("singular value, largest first", ticks=x if len(x) <= MAX_TICKS else ()),
        y=Axis("size", "log10", compute_log_ticks(low, high), (low, high)),
        series=(
            Series("median module", x, tuple(median(values) for _, values in nonempty)),
            Series("largest and smallest", x, tuple(max(values) for _, values in nonempty), kind="line", tone="faint"),
            Series("largest and smallest", x, tuple(min(values) for _, values in nonempty), kind="line", tone="faint"),
        ),
        columns=("number", "median", "smallest", "largest", "modules"),
        rows=tuple((k, median(values), min(values), max(values), len(values)) for k, values in nonempty),
    )
