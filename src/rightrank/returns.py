"""What the verbs of the API return where that is more than one record."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rightrank.records import Decision, Sample, SweepRow


@dataclass(frozen=True, slots=True)
class Selected:
    """The result of a selection: the decision, and where run folder, adapter and report are."""

    decision: Decision
    run: Path
    adapter: Path | None  # None: a custom trainer that saved none
    report: Path
    samples: list[Sample] = field(default_factory=list)
    sweep: list[SweepRow] = field(default_factory=list)
    trainings: int = 0  # trials of ranks above 0; each stage of a training counts

    def _repr_html_(self) -> str:
        return _decision_html(self.decision)


@dataclass(frozen=True, slots=True)
class Decided:
    """A decision on results that exist, and how the table was read."""

    decision: Decision
    understood: list[str]

    def _repr_html_(self) -> str:
        return _decision_html(self.decision)


def _decision_html(decision: Decision) -> str:
    """The answer with its plot, for a notebook."""
    from rightrank.report.notebook import decision_html  # brings matplotlib

    return decision_html(decision)
