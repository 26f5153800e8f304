"""What a report says in words: what it cost, what was not tested, how to do it again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rightrank.decision.run import Records
from rightrank.records import Decision, TrialFinished
from rightrank.report.format import duration, metric_unit, quantity, size
from rightrank.settings import SelectSettings


@dataclass(frozen=True, slots=True)
class Cost:
    """What the trials so far took."""

    trainings: int
    without_result: int
    seconds: float
    tokens: int
    peak_bytes: int

    def sentence(self) -> str:
        parts = [quantity(self.trainings, "training")]
        if self.without_result:
            parts.append(f"{self.without_result} of them without a result")
        parts.append(duration(self.seconds))
        if self.tokens:
            parts.append(quantity(self.tokens, "token"))
        if self.peak_bytes:
            parts.append(f"peak memory {size(self.peak_bytes)}")
        return ", ".join(parts)


def cost_of(records: Records) -> Cost:
    """The cost of all trials, the base's evaluation included in the seconds.

    A training that went on from a stopped one holds its seconds and tokens: the stopped one is not counted again.
    """
    went_on = {outcome.continue_from for outcome in records.outcomes if isinstance(outcome, TrialFinished)}
    finished = [trial for trial in records.finished() if trial.trial_id not in went_on]
    arms = [outcome for outcome in records.outcomes if outcome.rank > 0 and outcome.trial_id not in went_on]
    return Cost(
        trainings=len(arms),
        without_result=sum(not isinstance(outcome, TrialFinished) for outcome in arms),
        seconds=sum(trial.train_seconds + trial.eval_seconds for trial in finished),
        tokens=sum(trial.train_tokens for trial in finished),
        peak_bytes=max((trial.peak_bytes for trial in finished), default=0),
    )


def confidence_words(records: Records, decision: Decision) -> str:
    """How sure, and from what."""
    items = len(records.started.evaluation_items)
    seeds = max((e.seeds for e in decision.ranks if e.rank > 0), default=1)
    held_out = f", paired over {quantity(items, 'held-out item')}" if items else ""
    return f"{decision.confidence:.0%} confidence{held_out} and {quantity(seeds, 'seed')} a rank"


def certainty_notes(decision: Decision) -> list[str]:
    """What else is known of how sure the answer is: the fit's own view, the rate's optimism, the horizon."""
    said = [decision.basis_note] if decision.basis_note else []
    curve, unit = decision.curve, metric_unit(decision.metric)
    if curve is not None:
        said.append(
            f"The fitted curve comes within the margin of its best at rank {curve.r_margin:.3g} "
            f"(95% interval {curve.r_margin_low:.3g} to {curve.r_margin_high:.3g}); still to gain above the largest rank: "
            f"{curve.gain_to_come:.2g} {unit} ({curve.gain_to_come_low:.2g} to {curve.gain_to_come_high:.2g})."
        )
    if decision.winner_gap:
        said.append(
            f"The best of several rates looks up to {decision.winner_gap:.2g} {unit} better than it is; taken out."
        )
    if decision.horizon is not None:
        said.append(
            f"The same rank was the answer from step {decision.horizon.holds_from} of {decision.horizon.steps} on."
        )
    return said


def next_run_words(records: Records, decision: Decision) -> str:
    """How long the next run would take at the pace of the finished trainings nearest in rank; empty where unknown."""
    run = decision.next_runs[0] if decision.next_runs else None
    finished = [trial for trial in records.finished() if trial.rank > 0 and trial.arm.is_direct]
    if run is None or not run.trials or not finished:
        return ""
    seconds = 0.0
    for rank in run.ranks:
        nearest = min((trial.rank for trial in finished), key=lambda other: abs(other - rank))
        paces = [trial.train_seconds + trial.eval_seconds for trial in finished if trial.rank == nearest]
        seconds += fmean(paces) * run.trials / len(run.ranks)
    return f"{quantity(run.trials, 'training')}, about {duration(seconds)} at the pace so far."


def headline(decision: Decision | None) -> str:
    if decision is None:
        return "Running: no answer yet"
    if decision.rank is not None:
        return f"Rank {decision.rank}"
    return decision.verdict.replace("_", " ").capitalize()


def progress_words(records: Records) -> str:
    """Before there is a decision: how far the run is."""
    done = len(records.outcomes)
    return f"{quantity(done, 'trial')} ended so far. A comparison needs two ranks with a result."


def not_tested(records: Records, decision: Decision | None) -> list[str]:
    """What the evidence does not speak of."""
    settings = records.started.settings
    ranks = sorted({trial.rank for trial in records.finished() if trial.rank > 0 and trial.arm.is_direct})
    said: list[str] = []
    if ranks:
        said.append(f"Ranks other than {', '.join(map(str, ranks))}.")
    steps = max((trial.steps for trial in records.finished()), default=0)
    if steps:
        said.append(f"Trainings longer than {steps} steps: low ranks fall behind later, so a longer one may need more.")
    beside = [answer.metric for answer in decision.other_metrics] if decision else []
    said.append(f"Metrics other than {', '.join([records.started.metric, *beside])}; other data, prompts or models.")
    if "target_modules" in settings:
        said.append(
            f"Other target modules than {_plain(settings['target_modules'])}, other scalings than "
            f"{_plain(settings.get('scaling'))} with alpha {_plain(settings.get('lora_alpha'))}."
        )
    if decision is not None and max((e.seeds for e in decision.ranks if e.rank > 0), default=1) < 2:
        said.append("The spread between seeds: there is one seed a rank.")
    lost = [o for o in records.outcomes if o.rank > 0 and not isinstance(o, TrialFinished)]
    if lost:
        cells = ", ".join(f"rank {o.rank} at {o.learning_rate:g}" for o in lost[:6])
        said.append(
            f"Cells without a result: {cells}{' and more' if len(lost) > 6 else ''}. They count neither for nor against a rank."
        )
    if not records.tests:
        said.append("The test split: it is measured at the end.")
    return said


def reproduce_command(settings: Mapping[str, Any]) -> str | None:
    """The command that makes this run again; None where model or data were objects in memory."""
    model, data = settings.get("model"), settings.get("data")
    if not isinstance(model, str) or not isinstance(data, str) or "in memory" in (model + data):
        return None
    words = ["rightrank", "select", model, data, "--out", "run"]
    for name, field in SelectSettings.model_fields.items():
        value = settings.get(name)
        if value is None or name not in settings or _plain(value) == _plain(field.default):
            continue
        option = "--" + name.replace("_", "-")
        if name == "metrics":
            metrics = value if isinstance(value, list) else [value]
            words += [word for metric in metrics for word in (option, _plain(metric))]
        elif name in NAMED_OPTIONS:
            words += [option, _plain(value)]
        else:
            words += ["--set", f"{name}={_plain(value)}"]
    return shlex.join(words)


# Settings that `rightrank select` has an option for; the others go through --set.
NAMED_OPTIONS = frozenset(
    [
        "strategy",
        "ranks",
        "learning_rates",
        "seeds",
        "margin",
        "metric",
        "report_to",
        "max_steps",
        "target_modules",
        "layers_to_transform",
        "lora_alpha",
        "batch_size",
        "seq_len",
        "eval_items",
        "dtype",
        "device",
    ]
)


def margin_words(decision: Decision) -> str:
    return f"{decision.margin:g} {metric_unit(decision.metric)}"


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(_plain(part) for part in value)
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)
