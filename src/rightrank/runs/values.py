"""The result of a selection."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rightrank.report.answer import Answers
from rightrank.runs.folder import RunFolder
from rightrank.runs.frame import build_trials_frame
from rightrank.schema.decision import Decision, ExportedAdapter
from rightrank.schema.errors import ResultsError
from rightrank.schema.events import read_records

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True, slots=True)
class SelectedRank:
    """A selected rank: the deployment rank or the training rank."""

    rank: int | None  # None: undecided, or no rank is better than the base
    sentence: str
    # The folder of an adapter of that rank, or else of `recommended_rank`; None: no adapter was saved.
    path: Path | None


@dataclass(frozen=True, slots=True, repr=False)
class Selected:
    """The result of a selection: deployment rank and training rank, and the paths of run folder, adapter and report."""

    run: Path
    # The smallest adapter within the margin, in `adapter/`; None if a custom trainer saved none.
    adapter: SelectedRank | None
    training: SelectedRank | None  # None unless the goal is "training-rank"
    report: Path
    answers: Answers  # deployment rank and training rank; `build_document()` returns the content of decision.json

    @property
    def next_command(self) -> str | None:
        """Return the first command among the next runs; None if there is none."""
        return next((command for command in self.answers.next_commands if command is not None), None)

    @property
    def exported_adapter(self) -> ExportedAdapter | None:
        """Return the description of the exported adapter; None without one."""
        return None if self.answers.adapter is None else self.answers.adapter.handed_over

    @property
    def decision_or_none(self) -> Decision | None:
        """Return the decision on the training rank; None unless the goal is "training-rank"."""
        return self.answers.decision

    @property
    def decision(self) -> Decision:
        """Return the decision on the training rank.

        Raises:
            ResultsError: the training rank was not the goal.
        """
        if self.decision_or_none is None:
            raise ResultsError(
                f"{self.run}: goal {self.answers.goal!r} has no decision on the training rank; see adapter and answers, or select "
                "again with goal 'training-rank'"
            )
        return self.decision_or_none

    @property
    def cost(self) -> Mapping[str, float | None]:
        """Return the cost. `trainings`: optimizer steps of all trials divided by those of one training; `trainings_to_adapter`: those up to the deployment rank."""
        return self.answers.cost

    def __repr__(self) -> str:
        """Return the ranks and the run folder on one line; `print` shows more."""
        verdict = None if self.decision_or_none is None else self.decision_or_none.verdict
        adapter, training = (None if answer is None else answer.rank for answer in (self.adapter, self.training))
        return f"Selected(adapter={adapter}, training={training}, verdict={verdict!r}, run={str(self.run)!r})"

    def __str__(self) -> str:
        """Return the final screen: the result in at most fourteen lines. The fields hold the details."""
        from rightrank.report.screen import format_screen

        adapter = None if self.adapter is None else self.adapter.path
        return format_screen(self.answers, self.run, adapter, self.report, shutil.get_terminal_size((80, 24)).columns)

    def to_pandas(self, *, examples: bool = False) -> DataFrame:
        """Return the trials as a table, or the scores of their held-out examples; see `rightrank.to_pandas`."""
        records = read_records(RunFolder(self.run).journal.read_complete_lines(), str(self.run))
        return build_trials_frame(records, examples)

    def _repr_html_(self) -> str:
        """Return the result as HTML, with the figures of the run folder."""
        from rightrank.report.answer import render_notebook_html

        folder = RunFolder(self.run).figures
        names = ["adapters", *(["rank_curve"] if self.decision_or_none is not None else [])]
        files = {name: folder / f"{name}.svg" for name in names}
        drawings = {name: file.read_text(encoding="utf-8") for name, file in files.items() if file.is_file()}
        return render_notebook_html(self.answers, drawings.get("adapters", ""), drawings.get("rank_curve", ""))
