"""Both answers of a run in words: sentences and tables for screen, page and model card, the final screen of a selection, and the status."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from pathlib import Path
from textwrap import wrap
from typing import Any

from rich.cells import cell_len

from rightrank.adapters.adapter_folders import format_loading_code
from rightrank.adapters.rank_math import NON_PLAIN_OPTIONS, convert_scaling, format_slot
from rightrank.decision.adapter import find_wider_margin
from rightrank.decision.rule import format_number, format_probability, plan_rate_run
from rightrank.decision.run_answers import (
    build_criterion,
    build_run_table,
    compare_run_adapters,
    describe_learning_rate,
    format_provenance,
)
from rightrank.report.format import (
    CURVE_LINES,
    ENOUGH,
    Points,
    draw_terminal_curve,
    format_duration,
    format_interval_label,
    format_labelled_rows,
    format_metric_label,
    format_quantity,
    format_table,
    format_training_settings,
    get_metric_unit,
    make_visible,
)
from rightrank.schema.events import (
    AdapterRecorded,
    DecisionRecorded,
    JournalRecord,
    Records,
    RunStarted,
    build_next_commands,
)
from rightrank.schema.results import (
    AdapterCandidate,
    Decision,
    ExportedAdapter,
    LearningRateAnswer,
    NextRun,
    RankEvidence,
)
from rightrank.schema.settings import LONGER_TRAININGS, Goal, build_budget_options, build_resume_command
from rightrank.schema.trials import OUTCOMES, Record, TrialStarted, compute_added_seconds

MAX_LINES, MAX_CURVE_LINES = 18, 7
MIN_WIDTH, LABEL_WIDTH = 40, 9  # characters
# What the command of a next run adds, by its action.
ADDITIONS = {
    "seeds": "more seeds",
    "examples": "more held-out examples",
    "rank": "a larger rank",
    "rates": "another learning rate",
}
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
        convert_scaling(settings.scaling, settings.lora_alpha, rank),
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
    heading = ["rank", decision.metric, "worse by", format_interval_label(decision.confidence), "enough"]
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


def format_screen(
    answers: Answers, run: Path, adapter: Path | None, report: Path, width: int, status: RunStatus | None = None
) -> str:
    """Format the screen of a run for a terminal of `width` characters: the result, the curve, the adapter and the next command.

    The final screen of a selection has at most `MAX_LINES` lines and ends with the next step; the curve takes the lines that the texts leave
    free. With a status, the state comes first and all details come last. Commands and paths are not wrapped, so that they can be pasted.

    Args:
        adapter: the folder of the adapter; None: a custom trainer saved no files, or there is no adapter yet.
    """
    width = max(width, MIN_WIDTH)
    headline = wrap(make_visible(describe_result(answers, is_done=status is None or status.state == "done")), width)
    missing_adapter = "the trainer saved none" if status is None else None
    rows = [
        ("adapter", missing_adapter if adapter is None else str(adapter)),
        ("load", _format_loading(answers, adapter)),
        *_wrap_row("train", describe_training(answers), width),
        ("slot", _format_slot(answers)),
    ]
    if status is None:
        status_command = shlex.join(["rightrank", "status", str(run)])
        rows += [("details", f"{report} and: {status_command}"), *_format_next_step(answers, run, width)]
    else:
        headline.insert(0, make_visible(f"{status.run}: {status.state}"))
        rows += _list_details(status, width)
    lines = list(map(make_visible, format_labelled_rows(rows, LABEL_WIDTH)))
    free_lines = MAX_LINES - sum(-(-cell_len(line) // width) for line in (*headline, *lines))
    num_lines = min(free_lines, MAX_CURVE_LINES) if status is None else CURVE_LINES
    trained, truncated = collect_curves(answers)
    started = answers.started
    label = format_metric_label(started.metric, started.higher_is_better) if started else ""
    curve = draw_terminal_curve(trained, width, truncated, label=label, num_lines=num_lines)
    return "\n".join([*headline, *curve, *lines])


def _wrap_row(label: str, text: str, width: int, label_width: int = LABEL_WIDTH) -> list[tuple[str, str]]:
    lines = wrap(make_visible(text), width - label_width, break_long_words=False, break_on_hyphens=False)
    return [(label if number == 0 else "", line) for number, line in enumerate(lines)]


def _format_slot(answers: Answers) -> str:
    """Return a sentence if a server gives the adapter the slot of a higher rank; servers load plain LoRA of a causal model."""
    started = answers.started
    if answers.adapter is None or started is None or started.is_custom_trainer or not _is_served(started):
        return ""
    return format_slot(answers.adapter.handed_over.max_module_rank)


def _is_served(started: RunStarted) -> bool:
    """Return whether servers load the adapters of a run: plain LoRA of a causal model."""
    settings: Any = started.settings
    options = settings | settings["peft_options"]
    return started.data.classes is None and not any(options.get(name) for name in NON_PLAIN_OPTIONS)


def _list_details(status: RunStatus, width: int) -> list[tuple[str, str | None]]:
    answers = status.answers
    decision, rate, adapter = answers.decision, answers.learning_rate, answers.adapter
    texts = [f"verdict {decision.verdict.replace('_', ' ')}."] if decision else []
    texts += [adapter.answer.sentence, *answers.adapter_notes, *adapter.answer.notes] if adapter else []
    texts += [answer.sentence for answer in (rate, decision) if answer]
    notes = (row for number, text in enumerate(texts) for row in _wrap_row("notes" * (number == 0), text, width))
    next_runs = zip(answers.next_runs, answers.next_commands, strict=True)
    return [
        *notes,
        *(row for run, command in next_runs for row in (*_wrap_row("next", run.sentence, width), ("", command))),
        ("cost", status.cost),
        ("now", status.progress or status.running),
        ("resume", status.resume),
    ]


def collect_curves(answers: Answers) -> tuple[Points, Points]:
    """Return the value of each rank, trained and truncated: the best one, or the mean over seeds where a decision has it."""
    by_method: dict[str, dict[int, float]] = {"trained": {}, "truncated": {}}
    better = max if answers.started is not None and answers.started.higher_is_better else min
    for candidate in answers.candidates:
        values = by_method[candidate.method]
        values[candidate.rank] = better(candidate.value, values.get(candidate.rank, candidate.value))
    if answers.decision is not None:
        by_method["trained"] = {
            evidence.rank: evidence.value for evidence in answers.decision.ranks if evidence.rank > 0
        }
    return sorted(by_method["trained"].items()), sorted(by_method["truncated"].items())


def describe_result(answers: Answers, is_done: bool = True) -> str:
    """Describe the result in a few sentences: the training rank, the adapter and the cost."""
    trainings = format_quantity(round(answers.trainings, 1), "training")
    cost = f"It took {trainings}." if is_done else f"{trainings} so far."
    if not is_done and answers.decision is None and answers.adapter is None:
        return f"No answer yet; {cost}"
    decision, adapter = answers.decision, "" if answers.adapter is None else answers.adapter.answer.sentence
    if decision is None:
        return f"{adapter or 'The trainer saved no adapter.'} {cost}"
    if answers.adapter is not None and len(answers.adapter.answer.candidates) > 1 and decision.verdict != "no_gain":
        likely = "" if decision.probability is None else f" ({format_probability(decision.probability)} likely)"
        return f"{answers.rank_headline}{likely}. {adapter} {cost}"
    # The settings of a built-in training are in another line.
    has_rate = decision.rank and decision.learning_rate and not is_built_in(answers.started)
    rate = f" Its learning rate is {decision.learning_rate:g}." if has_rate else ""
    return f"{decision.sentence}{rate} {cost}"


def _format_loading(answers: Answers, folder: Path | None) -> str:
    """Return one line of Python that loads the adapter, or the file that has more of them; empty for a custom trainer's files."""
    started = answers.started
    if started is None or folder is None or started.is_custom_trainer:
        return ""
    if started.model_name is None:
        return f"peft.PeftModel.from_pretrained(model, {str(folder)!r})"
    code = format_loading_code(str(folder), started.model_name, started.data.classes is not None)
    return f"peft.{code[-1].removeprefix('model = ')}" if len(code) == 2 else f"the code in {folder / 'README.md'}"


def _format_next_step(answers: Answers, run: Path, width: int) -> list[tuple[str, str]]:
    """Return rows with the most useful next command or, without one, with the sentence on the next run."""
    runs, is_built_in = answers.next_runs, answers.started is not None and not answers.started.is_custom_trainer
    wider = find_wider_margin(answers.adapter.answer) if answers.adapter and answers.decision is None else None
    if wider and is_built_in:
        return _format_command("the wider margin", ["select", "--out", str(run), "--margin", wider])
    for next_run, command in zip(runs, answers.next_commands, strict=False):
        if command is not None:
            return [("next", f"{ADDITIONS[next_run.action]}:"), ("", command)]
    return _wrap_row("next", runs[0].sentence, width) if runs else _choose_next_command(answers, str(run))


def _format_command(reason: str, arguments: Sequence[str]) -> list[tuple[str, str]]:
    return [("next", f"{reason}:"), ("", shlex.join(["rightrank", *arguments]))]


def _choose_next_command(answers: Answers, run: str) -> list[tuple[str, str]]:
    """Return a row with the next command after an answer that asks for no further run."""
    started, adapter = answers.started, answers.adapter
    if started is None or adapter is None or adapter.answer.has_no_gain or started.is_custom_trainer:
        return []
    reason, server = ("serve it", "vllm") if _is_served(started) else ("merge it", "merged")
    command = ["export", run, "--to", server]
    settings, select = started.select_settings, ["select", "--out", run]
    budget = settings.budget_trainings or 1.0
    if len(adapter.answer.candidates) == 1 and (larger_budget := build_budget_options(settings, budget)):
        reason, command = "a larger budget", [*select, *larger_budget]
    elif adapter.answer.is_top_rank_required:
        ranks = ",".join(map(str, (*settings.ranks, 2 * max(settings.ranks))))
        reason, command = "a larger rank", [*select, "--ranks", ranks, *build_budget_options(settings, budget)]
    elif answers.goal == "adapter":
        longer_budget = build_budget_options(settings, LONGER_TRAININGS)
        reason, command = "twice the steps", [*select, "--goal", "best-adapter", *longer_budget]
    return _format_command(reason, command)


def format_decision(decision: Decision, table_notes: list[str], width: int, commands: Sequence[str | None] = ()) -> str:
    """Format the complete decision: the answer, the curve, the evidence and the next run.

    Args:
        commands: the commands of the decision's next runs, in the same order.
    """
    answers = Answers(decision, next_commands=commands)
    trained = [(evidence.rank, evidence.value) for evidence in decision.ranks if evidence.rank > 0]
    curve = draw_terminal_curve(trained, width, label=format_metric_label(decision.metric, decision.higher_is_better))
    stairs = ", ".join(f"{step.rank} from {format_brief(step.margin)}" for step in decision.staircase)
    answer = (decision.verdict.replace("_", " "), decision.sentence.removeprefix("Undecided: "))
    rows = [
        ("margins", f"{stairs} (used: {decision.margin:g})"),
        *build_certainty_rows(decision),
        ("read", "; ".join(table_notes)),
        *build_next_rows(answers),
    ]
    evidence = map(make_visible, format_table(build_evidence_table(decision)))

    def format_rows(rows: Sequence[tuple[str, str]]) -> list[str]:
        is_command = {command for command in commands if command}
        wrapped = (([row] if row[1] in is_command else _wrap_row(*row, max(width, MIN_WIDTH), 12)) for row in rows)
        return format_labelled_rows(chain.from_iterable(wrapped), 12)

    return "\n".join([*format_rows([answer]), "", *curve, *evidence, "", *format_rows(rows)])


@dataclass(frozen=True, slots=True)
class RunStatus:
    """The state of a run, read from its journal and from its process if one is running, with its answers so far."""

    run: str
    state: str  # running, stopped (unfinished without a running process) or done
    running: str | None  # the trial that is running
    progress: str | None  # the current step and the remaining time, as the process reports them
    resume: (
        str | None
    )  # the command that resumes a run; None if it is not stopped, or if a custom trainer has to be called again
    cost: str
    answers: Answers

    def build_document(self) -> dict[str, Any]:
        """Return the object of `status --json`: the state, then the keys of decision.json."""
        names = ("run", "state", "running", "progress", "resume")
        return {name: getattr(self, name) for name in names} | self.answers.build_document()


def build_run_status(
    run: str,
    journal: Sequence[JournalRecord],
    records: Records,
    answers: Answers,
    *,
    is_locked: bool,
    progress: str | None,
) -> RunStatus:
    """Build the status of a run.

    Args:
        answers: the answers so far.
        is_locked: whether a process holds the run folder.
        progress: the text of the progress file; None if there is none.
    """
    is_done = find_last_decision(journal) is not None or (
        answers.goal != "training-rank" and answers.adapter is not None
    )
    state = "running" if is_locked else "done" if is_done else "stopped"
    can_resume = state == "stopped" and not records.started.is_custom_trainer
    return RunStatus(
        run=run,
        state=state,
        running=_format_active_trial(journal, records) if is_locked else None,
        progress=progress if is_locked else None,
        resume=build_resume_command(run) if can_resume else None,
        cost=format_cost(records),
        answers=answers,
    )


def _format_active_trial(journal: Sequence[JournalRecord], records: Records) -> str | None:
    """Describe the trial that started last and has not ended, with the last value that its trainer reported."""
    ended = {record.trial_id for record in journal if isinstance(record, OUTCOMES)}
    unfinished = [record for record in journal if isinstance(record, TrialStarted) and record.trial_id not in ended]
    if not unfinished:
        return None
    evaluations, label = records.evaluations.get(unfinished[-1].trial_id), unfinished[-1].arm.format_label()
    return f"{label}, step {evaluations[-1].step}: held-out {evaluations[-1].value:.4g}" if evaluations else label


def find_last_decision(journal: Sequence[JournalRecord]) -> DecisionRecorded | None:
    return next((record for record in reversed(journal) if isinstance(record, DecisionRecorded)), None)
