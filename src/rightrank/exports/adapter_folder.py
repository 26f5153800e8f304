"""`adapter/`: the chosen adapter in PEFT format, with a model card that holds the evidence."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from rightrank.io.files import replacing_folder
from rightrank.io.licence import licence_of
from rightrank.records import Decision, HandedOver, RunStarted, TestEvaluated, TrialFinished

CURVE = "rank_curve.png"


@dataclass(frozen=True, slots=True)
class AdapterCardFacts:
    """What the card says of the adapter itself."""

    sentence: str  # the answer to the first question
    origin: str  # how it was made
    handed_over: HandedOver
    margin: float
    learning_rate: float  # of the training at the trained rank


def hand_over(
    trial_adapter: Path,
    target: Path,
    started: RunStarted,
    trial: TrialFinished,
    decision: Decision | None,
    tests: list[TestEvaluated],
    figures: Path,
    adapter: AdapterCardFacts,
) -> None:
    """Copy the trial's adapter to `target`, with its card and the rank curve in `figures`. `target` is replaced."""
    with replacing_folder(target) as temporary:
        for path in sorted(path for path in trial_adapter.iterdir() if path.is_file()):
            shutil.copy2(path, temporary / path.name)
        if (figures / CURVE).exists():
            shutil.copy2(figures / CURVE, temporary / CURVE)
        (temporary / "README.md").write_text(model_card(started, trial, decision, tests, adapter), encoding="utf-8")


def model_card(
    started: RunStarted,
    trial: TrialFinished,
    decision: Decision | None,
    tests: list[TestEvaluated],
    adapter: AdapterCardFacts,
) -> str:
    """The card: front matter for the hub with the base's licence, the answers, the evidence, how to load the adapter."""
    environment = Environment(
        loader=PackageLoader("rightrank.exports", "templates"),
        autoescape=False,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("model_card.md").render(
        started=started,
        trial=trial,
        decision=decision,
        adapter=adapter,
        tests=tests,
        classification=started.data.form == "classification",
        licence=licence_of(started.settings.get("model")),
        curve=CURVE,
    )
