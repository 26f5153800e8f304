"""What the verbs of the API return where that is more than one record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rightrank.schema.decision import AdapterAnswer, AdapterCandidate, Decision, HandedOver, SweepRow
from rightrank.schema.errors import ResultsError
from rightrank.schema.events import Sample

if TYPE_CHECKING:
    from rightrank.report.answer import AnswerView


@dataclass(frozen=True, slots=True, repr=False)
class Selected:
    """The result of a selection: both answers, and where run folder, adapter and report are."""

    decided: Decision | None  # of the training rank; None with goal "adapter"
    run: Path
    adapter: Path | None  # the answer to the first question; None if a custom trainer saved none
    report: Path
    answers: Mapping[str, Any]  # both answers, as in decision.json
    samples: list[Sample] = field(default_factory=list)
    sweep: list[SweepRow] = field(default_factory=list)
    trainings: float = 0.0  # the cost in whole trainings: optimizer steps of all trials over those of one training
    next_commands: Sequence[
        str | None
    ] = ()  # each next run as a command that can be pasted, where one continues this run
    adapters: list[AdapterCandidate] = field(default_factory=list)  # every adapter of the run against the reference

    @property
    def next_command(self) -> str | None:
        """The first of the next runs that can be pasted; None if there is none."""
        return _first(self.next_commands)

    @property
    def handed_over(self) -> HandedOver | None:
        """What the adapter's folder holds; None without one."""
        found = self.answers["handed_over"]
        return None if found is None else HandedOver.model_validate(found)

    @property
    def decision(self) -> Decision:
        """The decision on the training rank.

        Raises:
            ResultsError: the goal was "adapter", and the training rank was not asked.
        """
        if self.decided is None:
            raise ResultsError(
                f"{self.run}: goal 'adapter' has no decision on the training rank; see adapter_rank and answers, or select "
                "again with goal 'training-rank'"
            )
        return self.decided

    @property
    def adapter_rank(self) -> int | None:
        """The rank of the adapter that is handed over; None without one."""
        return None if self.handed_over is None else self.handed_over.rank

    @property
    def training_rank(self) -> int | None:
        """The rank to train at; None if that is undecided or was not requested."""
        return None if self.decided is None else self.decided.rank

    def __repr__(self) -> str:
        """The ranks and where they are, on one line; `print` shows the answers."""
        verdict = None if self.decided is None else self.decided.verdict
        return (
            f"Selected(adapter_rank={self.adapter_rank}, training_rank={self.training_rank}, verdict={verdict!r}, "
            f"run={str(self.run)!r})"
        )

    def __str__(self) -> str:
        """Both answers in a few lines; the fields hold the rest."""
        from rightrank.report.answer import labelled

        view, rank = self.view, "" if self.adapter_rank is None else f"  (rank {self.adapter_rank})"
        rows = [("run", str(self.run)), ("adapter", view.adapter)]
        if self.decided is not None:
            rows += [("training rank", view.training_rank), ("verdict", view.verdict), *view.safe_rows()]
            rows += view.next_rows()[: 2 if any(self.next_commands[:1]) else 1]
        rows += [("folder", f"{self.adapter or ''}{rank}"), ("report", str(self.report))]
        return "\n".join(labelled([row for row in rows if row[1]], 15))

    @property
    def view(self) -> AnswerView:
        """Both answers in words."""
        from rightrank.report.answer import answer_view

        return answer_view(self.decided, self.answers, self.next_commands)

    def _repr_html_(self) -> str:
        from rightrank.report.adapters import figure_of
        from rightrank.report.figures import rank_figure
        from rightrank.report.html import notebook_html  # brings jinja2

        found = self.answers["adapter_answer"]
        adapters = None
        if found is not None and self.adapters:
            metric, higher = self.answers["metric"], self.answers["higher_is_better"]
            adapters = figure_of(AdapterAnswer.model_validate(found), self.adapters, metric, higher)
        return notebook_html(self.view, adapters, None if self.decided is None else rank_figure(self.decided))


@dataclass(frozen=True, slots=True, repr=False)
class Decided:
    """A decision on results that exist, and how the table was read."""

    decision: Decision
    understood: list[str]
    adapter_sentence: str | None = None  # the answer to the first question, of a run folder that has one
    next_commands: Sequence[str | None] = ()  # each next run as a command that can be pasted, of a run folder

    @property
    def next_command(self) -> str | None:
        """The first of them; None if there is none."""
        return _first(self.next_commands)

    def __repr__(self) -> str:
        """The answer on one line; `print` shows it in full."""
        found = self.decision
        return f"Decided(rank={found.rank}, verdict={found.verdict!r}, margin={found.margin:g})"

    def __str__(self) -> str:
        from rightrank.report.answer import answer_view, labelled

        view = answer_view(self.decision, commands=self.next_commands)
        rows = [("decision", view.training_rank), *view.safe_rows(), *view.next_rows()]
        return "\n".join([*self.understood, *labelled(rows, 10)])

    def _repr_html_(self) -> str:
        from rightrank.report.answer import answer_view
        from rightrank.report.figures import rank_figure
        from rightrank.report.html import notebook_html  # brings jinja2

        return notebook_html(answer_view(self.decision), None, rank_figure(self.decision))


def _first(commands: Sequence[str | None]) -> str | None:
    return next((command for command in commands if command is not None), None)
