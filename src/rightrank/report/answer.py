"""Both answers of a run in words: one view, which terminal, status, notebook, report and card print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import zip_longest
from types import MappingProxyType
from typing import Any

from rightrank.decision.comparison import is_within
from rightrank.decision.sentences import chance
from rightrank.report.format import coverage, metric_unit, quantity, visible
from rightrank.schema.decision import (
    AdapterAnswer,
    AdapterCandidate,
    Decision,
    HandedOver,
    MetricAnswer,
    RankEvidence,
)

FLAGS = {
    "underpowered": "the data cannot show this",
    "rising": "the largest rank tried is the best by more than the margin",
    "lr_edge": "the best learning rate is the smallest or largest tried",
    "unstable": "some trainings ended without a result",
    "collapsed": "some trainings fell far below their own best: their learning rate is too high",
    "one_seed": "a rank that the answer rests on has one seed: the answer is an indication",
    "unequal_length": "trainings of unequal length are compared",
    "winner_gap": "the best of several learning rates is optimistic by more than half the margin",
    "metric_conflict": "another metric of the same trainings contradicts the answer for a rank",
    "may_be_capacity_limited": "the differences between ranks were still growing when training ended",
    "checkpoint_matters": "at the other checkpoint of each training, the best or the last, the values pick another rank",
    "extrapolated": "the answer is for a longer training than was measured",
}
ENOUGH = {True: "yes", False: "no", None: "inconclusive"}  # by `RankEvidence.non_inferior`
NO_ANSWERS: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class AnswerView:
    """Both answers in words; a part that is not known yet, or was not asked, is empty."""

    adapter_headline: str  # the first question in a few words
    rank_headline: str  # the second
    adapter: str  # the first question in a sentence
    adapter_notes: tuple[str, ...]  # how it was made, what it learned, the guard's data, the test split
    training_rank: str  # the second; before its answer, what is missing
    estimate: str  # of the second, where it was not asked
    verdict: str  # with the flags in brackets
    safe_choice: str  # what is shown to be enough until an undecided answer is decided
    metrics: tuple[str, ...]  # what further metrics say
    next_runs: tuple[tuple[str, str | None], ...]  # each with its command, where one can be pasted

    @property
    def headline(self) -> str:
        """Both answers in a few words."""
        return " · ".join(filter(None, (self.adapter_headline, self.rank_headline))) or "Running: no answer yet"

    def adapter_rows(self) -> list[tuple[str, str]]:
        """The first answer as labelled lines."""
        return [("Adapter", self.adapter), *(("", note) for note in self.adapter_notes)] if self.adapter else []

    def rank_rows(self) -> list[tuple[str, str]]:
        """The second answer as labelled lines."""
        rows = [("Training rank", f"{self.training_rank} {self.estimate}".rstrip())]
        rows += [("verdict", self.verdict)] if self.verdict else []
        rows += [("metric", metric) for metric in self.metrics]
        return [*rows, *self.safe_rows(), *self.next_rows()]

    def safe_rows(self) -> list[tuple[str, str]]:
        return [("", self.safe_choice)] if self.safe_choice else []

    def next_rows(self) -> list[tuple[str, str]]:
        """Each next run, below it its command."""
        return [row for run, command in self.next_runs for row in (("next", run), ("", command or "")) if row[1]]


def answer_view(
    decision: Decision | None, answers: Mapping[str, Any] = NO_ANSWERS, commands: Sequence[str | None] = ()
) -> AnswerView:
    """The view of a decision and of `answers`, the object of `decision.json`; `commands` are those of the next runs.

    Results that come from no run have a decision alone.
    """
    adapter, asked = answers.get("adapter_answer"), answers.get("goal") != "adapter"
    rank = "not known yet" if decision is None else decision.rank or decision.verdict.replace("_", " ")
    missing = "not asked (--goal adapter)."
    if decision is None and asked:
        so_far = quantity(answers["cost"]["trainings"], "training")
        missing = f"{so_far} so far. A comparison needs two ranks with a result."
    return AnswerView(
        adapter_headline=f"Adapter: rank {adapter['rank']}" if adapter else "",
        rank_headline="" if not asked or not (adapter or decision) else f"Training rank: {rank}",
        adapter=answers.get("adapter_sentence") or "",
        adapter_notes=tuple(filter(None, _adapter_notes(answers))),
        training_rank=decision.sentence if decision is not None else missing,
        estimate=(answers.get("training_rank_estimate") or {}).get("sentence", ""),
        verdict=""
        if decision is None
        else decision.verdict + (f" ({', '.join(decision.flags)})" if decision.flags else ""),
        safe_choice="" if decision is None or decision.verdict != "undecided" else _safe_choice(decision),
        metrics=() if decision is None else tuple(map(_metric_text, decision.other_metrics)),
        next_runs=()
        if decision is None
        else tuple((run.sentence, command) for run, command in zip_longest(decision.next_runs, commands)),
    )


def _safe_choice(decision: Decision) -> str:
    if decision.fallback_rank is None:
        return f"No rank is shown to be enough; rank {decision.best_so_far} came out best so far, without proof."
    if decision.confidence is None:
        return f"Rank {decision.fallback_rank} is the smallest that one seed indicates to be enough at the margin of {decision.margin:g}."
    return (
        f"Until this is decided, rank {decision.fallback_rank} is the safe choice at the margin of {decision.margin:g}."
    )


def labelled(rows: Sequence[tuple[str, str]], width: int) -> list[str]:
    """`label: text` in lines, the texts below each other from column `width` on."""
    return [f"{f'{label}:' if label else '':<{width - 1}} {text}" for label, text in rows]


def _adapter_notes(answers: Mapping[str, Any]) -> list[str]:
    guard, handed_over, making = (answers.get(name) for name in ("guard", "handed_over", "adapter_making"))
    return [
        f"It was {making}." if making else "",
        _top_text(answers.get("adapter_answer")),
        guard["sentence"] if guard else "",
        _test_text(HandedOver.model_validate(handed_over)) if handed_over else "",
    ]


def _top_text(answer: Mapping[str, Any] | None) -> str:
    """What would show whether a larger top is better, where even its largest truncation loses more than the margin."""
    if answer is None or not AdapterAnswer.model_validate(answer).keeps_the_top:
        return ""
    return (
        f"Rank {answer['rank']} is the largest that was trained, so a larger one may be better: --extend trains rank "
        f"{2 * answer['rank']} too, for about the price of this answer."
    )


def _test_text(found: HandedOver) -> str:
    """The reading on the test split; empty without one, and where the adapter is the reference itself."""
    high = found.test_difference_high
    if found.test_difference is None or (found.test_difference == 0 and not high):
        return ""
    bound = "" if high is None else f" (95% upper bound {high:+.2g})"
    return f"On the test split, read once, it differs from the reference by {found.test_difference:+.2g}{bound}."


def _metric_text(other: MetricAnswer) -> str:
    if other.conflict:
        return other.sentence
    answer = f"rank {other.rank}" if other.rank else other.verdict.replace("_", " ")
    return f"{other.metric}: {answer}, at a margin of {brief(other.margin)}"


def candidate_table(answer: AdapterAnswer, metric: str) -> list[list[str]]:
    """The candidates as text, a heading first: rank, how, value, difference from the reference, its bound, whether it holds."""
    heading = ["rank", "how", metric, "worse by", "95% bound", "holds"]
    return [heading, *(_candidate_row(one, answer) for one in answer.candidates)]


def _candidate_row(one: AdapterCandidate, answer: AdapterAnswer) -> list[str]:
    is_reference = one.trial_id == answer.reference_id
    bound = "–" if one.difference_high is None else f"{one.difference_high:+.4f}"
    return [
        str(one.rank),
        one.how,
        f"{one.value:.4f}",
        "reference" if is_reference else f"{one.difference:+.4f}",
        "" if is_reference else bound,
        ENOUGH[one.holds],
    ]


def evidence_table(decision: Decision) -> list[list[str]]:
    """The evidence, a row a rank and a heading first."""
    with_learning_rate = any(evidence.learning_rate for evidence in decision.ranks)
    interval, bounds = coverage(decision, "interval"), coverage(decision, "bounds")
    heading = ["rank", decision.metric, interval, "worse by", bounds, "enough"]
    heading += ["likely"] * _has_probabilities(decision)
    heading += ["learning rate"] * with_learning_rate + ["seeds"]
    return [heading, *(_evidence_row(evidence, decision, with_learning_rate) for evidence in decision.ranks)]


def _has_probabilities(decision: Decision) -> bool:
    return any(evidence.probability is not None for evidence in decision.ranks)


def _evidence_row(evidence: RankEvidence, decision: Decision, with_learning_rate: bool) -> list[str]:
    is_reference = evidence.rank == decision.reference_rank
    low, high = evidence.difference_low, evidence.difference_high
    row = [
        str(evidence.rank) if evidence.rank else "base",
        f"{evidence.value:.5g}",
        f"{evidence.low:.5g} to {evidence.high:.5g}" if evidence.low < evidence.high else "unknown",
        _reference_word(decision) if is_reference else brief(evidence.difference),
        "" if low is None or is_reference else f"{brief(low)} to {brief(high)}",
        _enough(evidence, decision),
        *["" if evidence.probability is None else chance(evidence.probability)] * _has_probabilities(decision),
    ]
    rate = f"{evidence.learning_rate:.2g}" if evidence.learning_rate else ""
    return [*row, *[rate] * with_learning_rate, str(evidence.seeds)]


def _reference_word(decision: Decision) -> str:
    """The reference is the rank that came out best, but where judgements compare all ranks with a given one."""
    return "best" if decision.best_so_far in (None, decision.reference_rank) else "reference"


def _enough(evidence: RankEvidence, decision: Decision) -> str:
    """`yes`, `no` or `inconclusive`; of one number a rank, which shows nothing, what the values suggest.

    A rank below one that failed, or beside a higher one that may be better, is inconclusive, whatever its own bound.
    """
    is_reading = decision.basis in ("std", "values")
    nothing_shown = decision.rank is None and decision.fallback_rank is None
    if evidence.rank == decision.reference_rank and (is_reading or nothing_shown):
        word = _reference_word(decision)
        return "best so far" if word == "best" else word
    answer = decision.rank if decision.rank is not None else decision.fallback_rank
    if evidence.non_inferior and not is_reading and evidence.rank > 0 and (answer is None or evidence.rank < answer):
        return ENOUGH[None]
    if not is_reading or evidence.non_inferior is False:
        return ENOUGH[evidence.non_inferior]
    return "perhaps" if is_within(evidence.difference or 0.0, decision.margin) else "unlikely"


def certainty_rows(decision: Decision) -> list[tuple[str, str]]:
    """What the answer rests on, as labelled sentences: checkpoint, basis, optimism, flags."""
    optimism = (
        f"The best of several learning rates looks up to {decision.winner_gap:.2g} {metric_unit(decision.metric)} better than "
        "it is; the comparison corrects for that."
    )
    compared = ""
    if (found := decision.checkpoint) is not None:
        picks = f". By values alone, the last evaluations pick rank {found.last}, the best ones rank {found.best}."
        picks = "; by values alone, its last and its best pick the same rank." if found.last == found.best else picks
        compared = f"Each training counts at its {found.used} evaluation{picks}"
    rows = [
        ("checkpoint", compared),
        ("basis", decision.basis_note or ""),
        ("likely", decision.probability_note if "one_seed" in decision.flags else ""),
        ("optimism", optimism if decision.winner_gap else ""),
        *(("flag", f"{flag}: {FLAGS.get(flag, '')}") for flag in decision.flags),
    ]
    return [row for row in rows if row[1]]


def brief(value: float | None) -> str:
    """Two significant digits; empty for None."""
    if value is None:
        return ""
    return "0" if abs(value) < 1e-12 else f"{value:.2g}" if abs(value) < 100 else f"{value:.0f}"


def notebook_html(view: AnswerView, adapters: str, ranks: str) -> str:
    """The answers, each with its drawing (SVG), for a notebook; without a drawing an answer is left out."""
    next_run = f" Next: {view.next_runs[0][0]}" if view.next_runs else ""
    parts = [
        (view.adapter_headline, view.adapter, adapters, ""),
        (view.rank_headline, view.training_rank, ranks, f"<p>Verdict: {_html(view.verdict)}.{_html(next_run)}</p>"),
    ]
    style = 'role="img" style="display: block; width: 100%; height: auto"'
    return "".join(
        f"<div><p><strong>{_html(headline)}</strong>. {_html(sentence)}</p><div style='max-width: 40em'>{drawing.replace('<svg', f'<svg {style}', 1)}</div>{further}</div>"
        for headline, sentence, drawing, further in parts
        if drawing
    )


def _html(value: str) -> str:
    return escape(visible(value))
