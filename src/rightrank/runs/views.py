"""The views of a run: decision.json, the report, the figures and the adapter's card. Each is computed from the records and replaced as a whole."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Collection
from pathlib import Path

from rightrank.adapters.adapter_folders import CARD_IMAGES
from rightrank.data.files import replace_file, write_text
from rightrank.decision.run import decide_if_possible
from rightrank.report.answer import Answers, build_answers
from rightrank.report.figure import Figure, write_figures
from rightrank.report.figures import build_figures, build_spectrum_figure
from rightrank.report.html import render_model_card, render_report
from rightrank.runs.folder import RunFolder
from rightrank.runs.hook import Hook, Run
from rightrank.runs.values import Selected
from rightrank.schema.decision import Decision
from rightrank.schema.errors import InputError
from rightrank.schema.events import AdapterRecorded, Event, Records, RunStopped
from rightrank.schema.trials import OUTCOMES, SCHEMA_VERSION

MAX_SHARE = 0.05  # the fraction of the wall time for writing the report while trials run


class Report(Hook):
    """Keeps the report, the figures, decision.json and the adapter's card up to date."""

    is_required = False
    _run: Run
    _next_write = 0.0  # the earliest time of the next report, by the monotonic clock

    def on_start(self, run: Run) -> None:
        self._run = run

    def on_event(self, event: Event) -> None:
        if isinstance(event, AdapterRecorded):
            records = self._run.records
            self._write_views(records, None)
            _write_card(self._run.folder, records, None)
        if isinstance(event, RunStopped) or (isinstance(event, OUTCOMES) and time.monotonic() >= self._next_write):
            start, records = time.monotonic(), self._run.records
            decides_training_rank = self._run.selection.settings.goal == "training-rank"
            self._write_views(records, decide_if_possible(records) if decides_training_rank else None)
            end = time.monotonic()  # a report of many trials takes longer, so the next one waits in proportion
            self._next_write = end + (end - start) / MAX_SHARE

    def on_end(self, selected: Selected) -> None:
        self._write_views(self._run.records, selected.decision_or_none)
        if selected.adapter is not None:
            _write_card(self._run.folder, self._run.records, selected.decision_or_none)

    def _write_views(self, records: Records, decision: Decision | None) -> None:
        """Write the report and, once a deployment rank or a training rank is known, decision.json."""
        folder, answers = self._run.folder, build_answers(records, decision, self._run.selection.settings.goal)
        if decision is not None or records.adapters:
            write_text(
                folder.decision,
                json.dumps({"schema_version": SCHEMA_VERSION} | answers.build_document(), indent=2, allow_nan=False)
                + "\n",
            )
        write_report(folder, records, answers)


def _write_card(folder: RunFolder, records: Records, decision: Decision | None) -> None:
    """Write the adapter's card into `adapter/`, with the figures that there are."""
    images = [name for name in CARD_IMAGES if (folder.figures / name).exists()]
    for name in images:
        with replace_file(folder.adapter / name) as temporary:
            shutil.copy2(folder.figures / name, temporary)
    write_text(folder.adapter / "README.md", render_model_card(records, decision, images))


def write_report(folder: RunFolder, records: Records, answers: Answers, formats: Collection[str] = ()) -> None:
    """Write the figures and the report of the answers.

    Args:
        formats: formats of the figures besides SVG: pdf, png.

    Raises:
        SettingsError: another format.
        MissingExtraError: a format is given, and matplotlib is not installed.
    """
    figures = [*build_figures(records, answers.decision), *_build_spectrum_figures(folder.adapter)]
    write_figures(folder.figures, figures, formats)
    exports = folder.path / "exports"
    page = render_report(
        records,
        answers,
        figures,
        run=str(folder.path),
        exports=sorted(path.name for path in exports.iterdir() if path.is_dir()) if exports.is_dir() else (),
    )
    write_text(folder.report, page)


def _build_spectrum_figures(adapter: Path) -> list[Figure]:
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
        figure = build_spectrum_figure(inspect_adapter(adapter))
    except InputError:
        return []
    return [] if figure is None else [figure]
