"""`adapter/`: the chosen adapter in PEFT format, with a model card that holds the evidence."""

from __future__ import annotations

from dataclasses import dataclass

from rightrank.decision.adapter import Making
from rightrank.report.answer import evidence_table
from rightrank.report.html import templates
from rightrank.report.sentences import loading_lines
from rightrank.schema.decision import Decision, HandedOver
from rightrank.schema.events import GuardAnswer, RunStarted, TestEvaluated
from rightrank.schema.trials import TrialFinished

PICTURE, CURVE = "adapters.svg", "rank_curve.svg"


@dataclass(frozen=True, slots=True)
class AdapterCardFacts:
    sentence: str  # the answer to the first question
    making: Making
    handed_over: HandedOver
    margin: float
    candidates: list[list[str]]  # the adapters that were compared, a heading first
    guard: GuardAnswer | None = None


def model_card(
    started: RunStarted,
    trial: TrialFinished,
    decision: Decision | None,
    tests: list[tuple[str, TestEvaluated]],
    adapter: AdapterCardFacts,
) -> str:
    """The card: front matter for the hub, the answers, the evidence, how to load the adapter."""
    model = started.settings.get("model")
    return (
        templates(escaped=False)
        .get_template("model_card.md")
        .render(
            started=started,
            trial=trial,
            decision=decision,
            evidence=evidence_table(decision) if decision is not None else [],
            adapter=adapter,
            tests=tests,
            classification=started.data.form == "classification",
            loading="\n".join(
                loading_lines(
                    "this/folder", model if isinstance(model, str) else None, started.data.classes is not None
                )
            ),
            picture=PICTURE,
            curve=CURVE,
        )
    )
