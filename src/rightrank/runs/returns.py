"""What the verbs of the API return where that is more than one record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rightrank.decision.run import Records, document
from rightrank.runs.folder import RunFolder
from rightrank.schema.decision import AdapterCandidate, Decision, HandedOver
from rightrank.schema.errors import ResultsError
from rightrank.schema.settings import Goal
from rightrank.search.strategies import training_rank_estimate


def answers(records: Records, decision: Decision | None, goal: Goal) -> dict[str, Any]:
    """Both answers as one JSON object; with goal "adapter", an estimate in place of the second."""
    return document(records, decision, goal, training_rank_estimate(records) if goal == "adapter" else None)


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one of the two questions."""

    rank: int | None  # None: undecided, or no rank is better than the base
    sentence: str
    path: Path | None  # of an adapter of that rank; where there is none, of `rank_at_hand`. None: nothing was saved


if TYPE_CHECKING:
    from rightrank.report.answer import AnswerView


@dataclass(frozen=True, slots=True, repr=False)
class Selected:
    """The result of a selection: both answers, and where run folder, adapter and report are."""

    decided: Decision | None  # of the training rank; None with goal "adapter"
    run: Path
    adapter: (
        Answer | None
    )  # the smallest adapter that loses nothing, in `adapter/`; None if a custom trainer saved none
    training: Answer | None  # the rank to train at; None with goal "adapter"
    report: Path
    answers: Mapping[str, Any]  # both answers, as in decision.json
    next_commands: Sequence[
        str | None
    ] = ()  # each next run as a command that can be pasted, where one continues this run
    adapters: list[AdapterCandidate] = field(default_factory=list)  # every adapter of the run against the reference

    @property
    def next_command(self) -> str | None:
        """The first of the next runs that can be pasted; None if there is none."""
        return first_command(self.next_commands)

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
                f"{self.run}: goal 'adapter' has no decision on the training rank; see adapter and answers, or select "
                "again with goal 'training-rank'"
            )
        return self.decided

    @property
    def cost(self) -> Mapping[str, float | None]:
        """`trainings`: optimizer steps of all trials over those of one training; `trainings_to_adapter`: up to the first answer."""
        found: Mapping[str, float | None] = self.answers["cost"]
        return found

    def __repr__(self) -> str:
        """The ranks and where they are, on one line; `print` shows the answers."""
        verdict = None if self.decided is None else self.decided.verdict
        adapter, training = (None if one is None else one.rank for one in (self.adapter, self.training))
        return f"Selected(adapter={adapter}, training={training}, verdict={verdict!r}, run={str(self.run)!r})"

    def __str__(self) -> str:
        """Both answers in a few lines; the fields hold the rest."""
        from rightrank.report.answer import labelled

        view = self.view
        rows = [("run", str(self.run)), ("adapter", view.adapter)]
        if self.decided is not None:
            rows += [("training rank", view.training_rank), ("verdict", view.verdict), *view.safe_rows()]
            rows += view.next_rows()[: 2 if any(self.next_commands[:1]) else 1]
        if self.adapter is not None:  # a custom trainer may save none
            rows.append(("folder", f"{self.adapter.path}  (rank {self.adapter.rank})"))
        rows.append(("report", str(self.report)))
        return "\n".join(labelled([row for row in rows if row[1]], 15))

    @property
    def view(self) -> AnswerView:
        """Both answers in words."""
        from rightrank.report.answer import answer_view

        return answer_view(self.decided, self.answers, self.next_commands)

    def _repr_html_(self) -> str:
        """The answers with their figures, as the run's folder has them."""
        from rightrank.report.answer import notebook_html

        folder = RunFolder(self.run).figures
        names = ["adapters", *(["rank_curve"] if self.decided is not None else [])]
        files = {name: folder / f"{name}.svg" for name in names}
        drawings = {name: file.read_text(encoding="utf-8") for name, file in files.items() if file.is_file()}
        return notebook_html(self.view, drawings.get("adapters", ""), drawings.get("rank_curve", ""))


def first_command(commands: Sequence[str | None]) -> str | None:
    return next((command for command in commands if command is not None), None)
