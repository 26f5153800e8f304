"""Both answers of a run in words, and the evidence for them as tables: what terminal, status, report and model card print."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

from rightrank.adapters.rank_math import convert_scaling
from rightrank.decision.rule import format_number, format_probability, plan_rate_run
from rightrank.decision.run_answers import (
    build_criterion,
    build_run_table,
    compare_run_adapters,
    describe_learning_rate,
    format_provenance,
)
from rightrank.report.format import (
    ENOUGH,
    format_duration,
    format_interval_label,
    format_quantity,
    format_training_settings,
    get_metric_unit,
)
from rightrank.schema.events import AdapterRecorded, Records, RunStarted, build_next_commands
from rightrank.schema.results import (
    AdapterCandidate,
    Decision,
    ExportedAdapter,
    LearningRateAnswer,
    NextRun,
    RankEvidence,
)
from rightrank.schema.settings import Goal
from rightrank.schema.trials import Record, compute_added_seconds

FLAGS = {
    "underpowered": "there are too few held-out examples to resolve the margin",
    "rising": "the largest rank that was tried is better than all others by more than the margin",
    "lr_edge": "the best learning rate is the smallest or the largest that was tried",
    "unstable": "some trainings ended without a result",
    "outlier": "a training ended far from the other seeds of its rank and learning rate, and is left out",
    "larger_rank_worse": "a larger rank is clearly worse than the best one, so its training may have failed",
    "one_seed": "the answer depends on a rank with only one seed, so it is an indication",
    "unequal_length": "the compared trainings have different lengths",
    "selection_bias": "the best of several ranks looks better than it is, by more than half the margin",
}


@dataclass(frozen=True, slots=True)
class Answers:
    """The deployment rank and the training rank. An answer that was not requested, or is not known yet, is None."""

    decision: Decision | None  # of the training rank
    goal: Goal = "training-rank"
    adapter: AdapterRecorded | None = None
    provenance: str | None = None  # how the adapter was made, as a sentence
    adapter_rate: float = 0.0  # the learning rate of the adapter's training; 0: unknown
    adapter_steps: int = 0  # its optimizer steps; 0: unknown
    trainings: float = 0.0  # so far
    started: RunStarted | None = None  # None: the results are not from a run
    # at a learning rate beyond the adapter's, if that is the lowest or the highest one tried
    adapter_run: NextRun | None = None
    learning_rate: LearningRateAnswer | None = None  # of the adapter; None if only one was tried
    candidates: Sequence[AdapterCandidate] = ()  # every adapter of the run against the reference
    # for each next run, the command that continues this run; None if there is none
    next_commands: Sequence[str | None] = ()

    @property
    def adapter_headline(self) -> str:
        """Return the deployment rank in a few words; empty without an adapter."""
        return f"Adapter: rank {self.adapter.handed_over.rank_text}" if self.adapter else ""

    @property
    def rank_headline(self) -> str:
        """Return the training rank in a few words; empty if it was not requested, and before the first answer."""
        if self.goal != "training-rank" or not (self.adapter or self.decision):
            return ""
        if self.decision is None:
            return "Training rank: not available yet"
        return f"Training rank: {self.decision.rank or self.decision.verdict.replace('_', ' ')}"

    @property
    def headline(self) -> str:
        """Summarise both answers in a few words."""
        return " · ".join(filter(None, (self.adapter_headline, self.rank_headline))) or "Running: no answer yet"

    @property
    def adapter_sentence(self) -> str:
        return self.adapter.answer.sentence if self.adapter else ""

    @property
    def adapter_notes(self) -> list[str]:
        """Say how the adapter was made, whether a larger one may be better, its result on the test split, and how to train again."""
        return list(filter(None, _format_adapter_notes(self)))

    @property
    def training_rank(self) -> str:
        """Return the training rank in a sentence; until it is available, what is missing."""
        if self.decision is not None:
            return self.decision.sentence
        return "not measured: it needs two ranks with a result, and --goal training-rank."

    @property
    def next_runs(self) -> list[NextRun]:
        """Return the next runs of both answers, those of the decision first."""
        runs = [] if self.decision is None else self.decision.next_runs
        planned = {rate for run in runs if run.action == "rates" for rate in run.learning_rates}
        is_new = self.adapter_run is not None and not planned.issuperset(self.adapter_run.learning_rates)
        return [*runs, self.adapter_run] if self.adapter_run is not None and is_new else runs

    @property
    def cost(self) -> dict[str, float | None]:
        first = None if self.adapter is None else self.adapter.trainings
        return {"trainings": self.trainings, "trainings_to_adapter": first}

    def build_document(self) -> dict[str, Any]:
        """Return the object of `decision.json` and of `select --json`."""
        started, adapter = self.started, self.adapter
        fields: dict[str, Any] = dict.fromkeys(("rank", "verdict", "confidence", "sentence"))
        fields |= _dump_record(self.decision) or {}
        shares: dict[str, Any] = dict.fromkeys(("gain", "share_kept", "share_kept_low"))
        if adapter is not None:
            shares = adapter.answer.model_dump(include=set(shares))
        of_run = {} if started is None else started.model_dump(include={"metric", "higher_is_better"})
        return (
            {**of_run, "goal": self.goal}
            | fields
            | {
                "adapter_sentence": adapter and adapter.answer.sentence,
                **shares,
                "cost": self.cost,
                "adapter_provenance": self.provenance,
                "adapter_flags": ["lr_edge"] * (self.adapter_run is not None)
                + ["no_gain"] * (adapter is not None and adapter.answer.has_no_gain),
                "handed_over": _dump_record(adapter and adapter.handed_over),
                "learning_rate": self.adapter_rate or fields.get("learning_rate"),
                "learning_rates": [candidate.model_dump() for candidate in self.learning_rate.candidates]
                if self.learning_rate
                else [],
                "learning_rate_sentence": self.learning_rate and self.learning_rate.sentence,
                "adapter_answer": _dump_record(adapter and adapter.answer),
            }
        )


def build_answers(
    records: Records, decision: Decision | None, goal: Goal = "training-rank", run: str | None = None
) -> Answers:
    """Build the answers of a run.

    Args:
        decision: on the training rank; None if it was not requested, or is not known yet.
        run: the run folder as commands name it; None: without candidates and commands.
    """
    answers = Answers(decision, goal, trainings=records.count_trainings(), started=records.started)
    if records.adapters:
        answers = replace(answers, adapter=records.adapters[-1])
        chosen = records.by_id.get(records.adapters[-1].answer.trial_id)
        trained = chosen and records.by_id.get(chosen.truncate_from or chosen.trial_id, chosen)
        if chosen is not None and trained is not None:
            rank, rate = trained.rank, trained.learning_rate
            answers = replace(
                answers,
                provenance=format_provenance(chosen, trained),
                adapter_rate=rate,
                adapter_steps=trained.steps,
                adapter_run=plan_rate_run(build_run_table(records), rank, rate, [rank]),
                learning_rate=describe_learning_rate(trained, records.outcomes, build_criterion(records)),
            )
    if run is None:
        return answers
    commands = build_next_commands(records.started, answers.next_runs, run, tried_rates=records.list_tried_rates())
    return replace(answers, candidates=compare_run_adapters(records), next_commands=commands)


def _dump_record(record: Record | None) -> Any:
    return record and record.model_dump()


def build_next_rows(answers: Answers) -> list[tuple[str, str]]:
    """Return a row for each suggested next run, followed by a row with its command."""
    runs = zip_longest(answers.next_runs, answers.next_commands)
    return [row for run, command in runs for row in (("next", run.sentence), ("", command or ""))]


def _format_adapter_notes(answers: Answers) -> list[str]:
    if answers.adapter is None:
        return []
    answer, handed_over = answers.adapter.answer, answers.adapter.handed_over
    return [
        f"It was {answers.provenance}." if answers.provenance else "",
        f"Rank {answer.rank} is the largest rank that was trained, so a larger one may be better. Training rank "
        f"{2 * answer.rank} too, with --ranks, takes about the cost of this answer."
        if answer.is_top_rank_required
        else "",
        _format_test_result(handed_over),
    ]


def describe_training(answers: Answers) -> str:
    """Format the training to repeat in the names of PEFT and transformers: that of the decided rank, else that of the adapter.

    Returns:
        An empty string if another trainer trained, which has its own settings.
    """
    started, decision, adapter = answers.started, answers.decision, answers.adapter
    if started is None or not is_built_in(started):
        return ""
    if decision is not None and decision.rank:
        rank, rate = decision.rank, decision.learning_rate
    elif adapter is not None:
        rank, rate = adapter.answer.trained_rank, answers.adapter_rate
    else:
        return ""
    settings, modules = started.select_settings, list(started.select_settings.target_modules)
    return format_training_settings(
        rank,
        *convert_scaling(settings.scaling, settings.lora_alpha, rank),
        modules[0] if modules == ["all-linear"] else modules,
        learning_rate=rate,
        batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        steps=answers.adapter_steps or settings.max_steps,
    )


def is_built_in(started: RunStarted | None) -> bool:
    """Return whether the trainings are those of the built-in trainer, which can train for other numbers of steps."""
    return started is not None and not started.is_custom_trainer


def _format_test_result(handed_over: ExportedAdapter) -> str:
    """Describe the test-split result. Return "" if there is none, or if the exported adapter is the reference itself."""
    high = handed_over.test_difference_high
    if handed_over.test_difference is None or (handed_over.test_difference == 0 and not high):
        return ""
    bound = "" if high is None else f" (95% upper bound {high:+.2g})"
    return f"On the test split, it differs from the reference by {handed_over.test_difference:+.2g}{bound}."


def format_brief(value: float | None) -> str:
    """Format a number with two significant digits; return "" for None."""
    return "" if value is None else "0" if abs(value) < 1e-12 else format_number(value)


def build_evidence_table(decision: Decision) -> list[list[str]]:
    """Return the evidence as rows of text, heading first, then one row for each rank."""
    with_learning_rate = any(evidence.learning_rate for evidence in decision.ranks)
    heading = ["rank", decision.metric, "worse by", format_interval_label(decision.confidence, "bounds"), "enough"]
    heading += ["likely"] * _has_probabilities(decision)
    heading += ["rate"] * with_learning_rate + ["seeds"]
    return [heading, *(_build_evidence_row(evidence, decision, with_learning_rate) for evidence in decision.ranks)]


def _has_probabilities(decision: Decision) -> bool:
    return any(evidence.probability is not None for evidence in decision.ranks)


def _build_evidence_row(evidence: RankEvidence, decision: Decision, with_learning_rate: bool) -> list[str]:
    is_reference = evidence.rank == decision.reference_rank
    low, high = evidence.difference_low, evidence.difference_high
    row = [
        str(evidence.rank) if evidence.rank else "base",
        f"{evidence.value:.5g}",
        "best" if is_reference else format_brief(evidence.difference),
        "" if low is None or is_reference else f"{format_brief(low)} to {format_brief(high)}",
        _format_enough(evidence, decision),
        *["" if evidence.probability is None else format_probability(evidence.probability)]
        * _has_probabilities(decision),
    ]
    rate = f"{evidence.learning_rate:.2g}" if evidence.learning_rate else ""
    return [*row, *[rate] * with_learning_rate, str(evidence.seeds)]


def _format_enough(evidence: RankEvidence, decision: Decision) -> str:
    """Return whether a rank is enough, as one word.

    A rank below one that failed, or next to a higher one that may be better, is inconclusive, whatever its own bound says.
    """
    is_doubtful = evidence.non_inferior and 0 < evidence.rank < decision.recommended_rank
    return ENOUGH[None if is_doubtful else evidence.non_inferior]


def build_certainty_rows(decision: Decision) -> list[tuple[str, str]]:
    """Return `(label, sentence)` rows that explain how certain the answer is: basis, optimism and flags."""
    optimism = (
        f"The best of several ranks looks up to {decision.selection_bias:.2g} {get_metric_unit(decision.metric)} better than it is; "
        "the lower bounds are lower by this."
    )
    rows = [
        ("basis", decision.basis_note),
        ("optimism", optimism if decision.selection_bias else ""),
        *(("flag", f"{flag}: {FLAGS.get(flag, '')}") for flag in decision.flags),
    ]
    return [row for row in rows if row[1]]


def format_cost(records: Records) -> str:
    """Describe the cost of all trials so far: trainings, truncations, trials without a result, and the total time."""
    by_id = records.by_id
    finished = by_id.values()
    truncations = sum(trial.truncate_from is not None for trial in finished)
    num_without_result = len(records.outcomes) - len(finished)
    texts = [format_quantity(records.count_trainings(), "training")]
    texts += [format_quantity(truncations, "truncation")] if truncations else []
    texts += [f"{format_quantity(num_without_result, 'trial')} without a result"] if num_without_result else []
    seconds = sum(compute_added_seconds(trial, by_id) for trial in finished)
    return ", ".join([*texts, *([format_duration(seconds)] if seconds else [])])
