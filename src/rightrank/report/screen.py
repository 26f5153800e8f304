"""Format the screen of a run: the answer in a sentence, the curve, the adapter and the next command; for `rightrank status`, all details too."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from textwrap import wrap

from pydantic import Field
from rich.cells import cell_len

from rightrank.adapters.adapter_folders import format_loading_code
from rightrank.adapters.rank_math import format_slot
from rightrank.decision.adapter import find_wider_margin
from rightrank.decision.rule import format_probability
from rightrank.report.answer import (
    Answers,
    build_certainty_rows,
    build_evidence_table,
    build_next_rows,
    describe_training,
    format_brief,
    format_cost,
    is_built_in,
)
from rightrank.report.format import (
    CURVE_LINES,
    Points,
    draw_terminal_curve,
    format_labelled_rows,
    format_metric_label,
    format_quantity,
    format_table,
    make_visible,
)
from rightrank.schema.events import DecisionRecorded, JournalRecord, Records
from rightrank.schema.results import Decision
from rightrank.schema.settings import LONGER_TRAININGS, Goal, build_budget_options, build_resume_command
from rightrank.schema.trials import OUTCOMES, Record, TrialStarted

MAX_LINES, MAX_CURVE_LINES = 18, 7
MIN_WIDTH, LABEL_WIDTH = 40, 9  # characters
# What the command of a next run adds, by its action.
ADDITIONS = {
    "seeds": "more seeds",
    "examples": "more held-out examples",
    "rank": "a larger rank",
    "rates": "another learning rate",
}


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
    """Return a row whose text is wrapped beside its label."""
    lines = wrap(make_visible(text), width - label_width, break_long_words=False, break_on_hyphens=False)
    return [(label if number == 0 else "", line) for number, line in enumerate(lines)]


def _format_slot(answers: Answers) -> str:
    """Return a sentence if a server gives the adapter the slot of a higher rank; servers load no classifiers and no custom trainer's files."""
    started = answers.started
    if answers.adapter is None or started is None or started.is_custom_trainer or started.data.classes is not None:
        return ""
    return format_slot(answers.adapter.handed_over.max_module_rank)


def _list_details(status: RunStatus, width: int) -> list[tuple[str, str | None]]:
    """Return rows with all answers and notes, the next runs with their commands, and what is running."""
    texts = [status.adapter_sentence, *status.adapter_notes, status.learning_rate_sentence, status.sentence]
    named = (f"verdict {status.verdict.replace('_', ' ')}." if status.verdict else None, *texts)
    next_runs = zip(status.next_runs, status.next_commands, strict=True)
    return [
        *(
            row
            for number, text in enumerate(filter(None, named))
            for row in _wrap_row("notes" * (number == 0), text, width)
        ),
        *(row for sentence, command in next_runs for row in (*_wrap_row("next", sentence, width), ("", command))),
        ("cost", status.cost),
        ("now", status.progress or status.running),
        ("resume", status.resume if status.state == "stopped" else None),
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
    is_classifier = started.data.classes is not None  # which servers of language models do not load
    reason = "merge it" if is_classifier else "serve it"
    command = ["export", run, "--to", "merged" if is_classifier else "vllm"]
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
    answer = (decision.verdict.replace("_", " "), decision.sentence)
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


NO_ANSWER = "no answer yet"
# An older progress file belongs to a process that has ended, or to a very long step.
STALE_SECONDS = 600


class RunStatus(Record):
    """The state of a run, read from its journal and from its process if one is running."""

    run: str
    state: str  # running, stopped (unfinished without a running process) or done
    goal: Goal
    trainings: float  # so far; a partial training counts as a fraction
    trials_ended: int
    trials_without_result: int
    running: str | None  # the trial that is running
    resume: (
        str | None
    )  # the command that resumes the run; None if it is done or if a custom trainer has to be called again
    progress: str | None  # the current step and the remaining time, as the process reports them
    cost: str
    answer: str
    learning_rate: float | None  # of the adapter
    learning_rate_sentence: str | None  # None if only one was tried
    adapter_sentence: str | None  # the answer about the deployment rank
    adapter_notes: list[str] = Field(
        default_factory=list
    )  # how the adapter was made, what it was tested on, and what to do
    rank: int | None
    sentence: str | None = None  # the answer about the training rank
    verdict: str | None
    next_runs: list[str] = Field(default_factory=list)  # suggested next runs, the most useful first
    next_commands: list[str | None] = Field(default_factory=list)  # the command for each of them, if it can be pasted


def build_run_status(
    run: str,
    journal: Sequence[JournalRecord],
    records: Records,
    answers: Answers,
    *,
    is_locked: bool,
    progress: Mapping[str, object],
) -> RunStatus:
    """Build the status of a run.

    Args:
        answers: the answers so far.
        is_locked: whether a process holds the run folder.
        progress: the content of the progress file; empty if there is none.
    """
    at, decision, goal = progress.get("at"), answers.decision, answers.goal
    is_fresh = isinstance(at, str) and (datetime.now(UTC) - datetime.fromisoformat(at)).total_seconds() < STALE_SECONDS
    adapter = answers.adapter.answer if answers.adapter else None
    is_done = find_last_decision(journal) is not None or (goal != "training-rank" and adapter is not None)
    state = "running" if is_locked else "done" if is_done else "stopped"
    can_resume = state != "done" and not records.started.is_custom_trainer
    return RunStatus(
        run=run,
        state=state,
        goal=goal,
        trainings=records.count_trainings(),
        trials_ended=len(records.outcomes),
        trials_without_result=len(records.outcomes) - len(records.list_finished()),
        running=_format_active_trial(journal, records) if is_locked else None,
        resume=build_resume_command(run) if can_resume else None,
        progress=str(progress["progress"]) if is_locked and is_fresh and "progress" in progress else None,
        cost=format_cost(records),
        answer=NO_ANSWER if decision is None and adapter is None else answers.headline,
        learning_rate=answers.adapter_rate or None,
        learning_rate_sentence=answers.learning_rate.sentence if answers.learning_rate else None,
        adapter_sentence=None if adapter is None else adapter.sentence,
        adapter_notes=[] if adapter is None else [*answers.adapter_notes, *adapter.notes],
        rank=decision.rank if decision is not None else None,
        sentence=decision.sentence if decision is not None else None,
        verdict=decision.verdict if decision is not None else None,
        next_runs=[next_run.sentence for next_run in answers.next_runs],
        next_commands=list(answers.next_commands),
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
