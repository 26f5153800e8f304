"""The views of a run: decision.json, the report, the figures and the adapter's card, each computed from the records, replaced whole."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from statistics import median

from rightrank.data.files import replacing, write_text
from rightrank.decision.records import Answers, Records, decision_so_far
from rightrank.report.figure import Axis, Figure, Series, log_ticks
from rightrank.report.figures import adapter_figure, figures_of
from rightrank.report.html import CURVE, PICTURE, model_card, render_report
from rightrank.report.svg import write_figures
from rightrank.runs.folder import RunFolder
from rightrank.runs.hook import Finished, Hook, Started
from rightrank.runs.values import answers
from rightrank.schema.decision import Decision
from rightrank.schema.errors import InputError
from rightrank.schema.events import AdapterRecorded, Event, RunStopped
from rightrank.schema.results import Inspection
from rightrank.schema.trials import OUTCOMES, SCHEMA_VERSION

MAX_SHARE = 0.05  # of the wall time, for writing the report while trials run
MAX_TICKS = 12  # of the singular values, each of which is then a tick


class Report(Hook):
    """Keeps the report, the figures, decision.json and the adapter's card up to date."""

    ends_run = False
    _started: Started
    _next = 0.0  # when it is written again, by the monotonic clock

    def on_start(self, started: Started) -> None:
        self._started = started

    def on_event(self, event: Event) -> None:
        if isinstance(event, AdapterRecorded):
            records = self._started.records()
            _write_card(self._started.folder, records, None)
            self._write_views(records, None)
        if isinstance(event, RunStopped) or (isinstance(event, OUTCOMES) and time.monotonic() >= self._next):
            begun, records = time.monotonic(), self._started.records()
            asked = self._started.plan.settings.goal == "training-rank"
            self._write_views(records, decision_so_far(records) if asked else None)
            ended = time.monotonic()  # with many trials it takes longer, so the next one waits in proportion
            self._next = ended + (ended - begun) / MAX_SHARE

    def on_end(self, finished: Finished) -> None:
        folder, records, selected = finished.folder, finished.records, finished.selected
        write_figures(folder.figures, figures_of(records, selected.decided))
        if selected.adapter is not None:
            _write_card(folder, records, selected.decided)
        write_figures(folder.figures, self._write_views(records, selected.decided))

    def _write_views(self, records: Records, decision: Decision | None) -> list[Figure]:
        """Write decision.json, once either question has an answer, and the report; see `write_report`."""
        folder, known = self._started.folder, answers(records, decision, self._started.plan.settings.goal)
        if decision is not None or records.adapters:
            write_text(
                folder.decision,
                json.dumps({"schema_version": SCHEMA_VERSION} | known.document(), indent=2, allow_nan=False) + "\n",
            )
        return write_report(folder, records, known)


def _write_card(folder: RunFolder, records: Records, decision: Decision | None) -> None:
    """Write the adapter's card, with its figures, into `adapter/`."""
    figure = adapter_figure(records)
    write_figures(folder.figures, [] if figure is None else [figure])
    for name in (PICTURE, CURVE):
        if (folder.figures / name).exists():
            with replacing(folder.adapter / name) as temporary:
                shutil.copy2(folder.figures / name, temporary)
    write_text(folder.adapter / "README.md", model_card(records, decision))


def write_report(folder: RunFolder, records: Records, known: Answers) -> list[Figure]:
    """Write the report of the answers; return its figures that are not those of the records."""
    further = _further_figures(folder.adapter)
    exports = folder.path / "exports"
    page = render_report(
        records,
        known,
        further,
        run=str(folder.path),
        exports=sorted(path.name for path in exports.iterdir() if path.is_dir()) if exports.is_dir() else (),
    )
    write_text(folder.report, page)
    return further


def _further_figures(adapter: Path) -> list[Figure]:
    """The spectrum of the adapter that was handed over.

    No figure before there is one, nor for one that is not in PEFT's format.
    """
    if not (adapter / "adapter_config.json").exists():
        return []
    from rightrank.adapters.spectra import inspect_adapter  # brings torch, which a report without it spares

    try:
        figure = _spectrum_figure(inspect_adapter(adapter))
    except InputError:
        return []
    return [] if figure is None else [figure]


def _spectrum_figure(inspection: Inspection) -> Figure | None:
    """The median of the singular values over the modules, in descending order, with the smallest and the largest."""
    spectra = [module.singular_values for module in inspection.modules if any(v > 0 for v in module.singular_values)]
    if not spectra:
        return None
    count = max(len(spectrum) for spectrum in spectra)
    columns = [[s[k] for s in spectra if k < len(s) and s[k] > 0] for k in range(count)]
    known = [(k + 1, values) for k, values in enumerate(columns) if values]
    x = tuple(k for k, _ in known)
    low, high = 0.9 * min(min(values) for _, values in known), 1.1 * max(max(values) for _, values in known)
    return Figure(
        name="spectrum",
        title=f"Singular values of the adapter, {len(spectra)} modules",
        alt=f"Singular values of s·B·A over {len(spectra)} modules, median from "
        f"{median(known[0][1]):.3g} for the first to {median(known[-1][1]):.3g} for number {x[-1]}. {inspection.summary.sentence}",
        x=Axis("singular value, largest first", ticks=x if len(x) <= MAX_TICKS else ()),
        y=Axis("size", "log10", log_ticks(low, high), (low, high)),
        series=(
            Series("median module", x, tuple(median(values) for _, values in known)),
            Series("largest and smallest", x, tuple(max(values) for _, values in known), kind="line", tone="faint"),
            Series("largest and smallest", x, tuple(min(values) for _, values in known), kind="line", tone="faint"),
        ),
        columns=("number", "median", "smallest", "largest", "modules"),
        rows=tuple((k, median(values), min(values), max(values), len(values)) for k, values in known),
    )
