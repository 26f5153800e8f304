"""The values of a selection: what is asked, and what refuses it at once before torch is imported; and what is returned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from rightrank.data.rows import require_rows
from rightrank.decision.adapter import probable_ranks, smallest_holding_truncation
from rightrank.decision.records import Answers, Records, answers_of, records_of, trials_frame
from rightrank.models.places import last_part, require_model
from rightrank.runs.folder import RunFolder
from rightrank.runs.plugins import merged
from rightrank.schema.decision import AdapterCandidate, Decision, HandedOver, TrainingRankEstimate
from rightrank.schema.errors import ModelError, ResultsError, SettingsError
from rightrank.schema.setting_table import require_no_secret
from rightrank.schema.settings import Goal, SelectSettings
from rightrank.search import make_strategy
from rightrank.search.history import space_of

if TYPE_CHECKING:
    from pandas import DataFrame
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rightrank.report.answer import AnswerView

Rows: TypeAlias = Iterable[Mapping[str, object]]  # a `datasets.Dataset` is one


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked."""

    model: str | PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    data: str | Path | Rows | Mapping[str, Rows]
    settings: SelectSettings
    begun: Mapping[str, Any] | None = None  # if it resumes a run: the settings that the run began with

    @property
    def model_name(self) -> str:
        return self.model if isinstance(self.model, str) else f"in memory ({type(self.model).__name__})"

    @property
    def data_name(self) -> str:
        if not isinstance(self.data, str | Path):
            return f"in memory ({type(self.data).__name__})"
        return str(self.data).encode("utf-8", "backslashreplace").decode()  # a file's name may hold what JSON can't


def check(request: Request) -> None:
    """Refuse what can't work.

    Raises:
        SettingsError: an unknown strategy, one that can't work within its budget, odd ranks for `orthogonal`, or workers for what is
            in memory.
        DataError: a data file that is missing or of a type that is not read.
        ModelError: a model folder that is missing or holds no model, a name that the hub does not know, or another model than the
            settings state.
    """
    settings = request.settings
    try:
        require_no_secret("model", request.model_name)
        require_no_secret("data", request.data_name)
    except ValueError as error:
        raise SettingsError(str(error)) from None
    make_strategy(settings.strategy, space_of(settings, settings.max_steps or 1))
    for source in (request.data, settings.validation or None):
        if isinstance(source, str | Path):
            require_rows(Path(source))
    if isinstance(request.model, str):
        require_model(request.model)
    stated, name = settings.stated.get("base_model_name_or_path"), getattr(request.model, "name_or_path", request.model)
    if stated and isinstance(name, str) and name and last_part(stated) != last_part(name):
        raise ModelError(
            f"base_model_name_or_path: got {stated!r}, and the model is {name!r}; give that model, or leave base_model_name_or_path out"
        )
    odd = next((rank for rank in settings.ranks if rank % 2), None)
    if odd is not None and settings.init_lora_weights == "orthogonal":
        raise SettingsError(
            f"init_lora_weights orthogonal: PEFT makes it at even ranks, got rank {odd}; give even ranks"
        )
    if settings.executor != "local" and settings.executor not in merged(lambda plugin: plugin.executors):
        raise SettingsError(f"executor {settings.executor!r} needs the plug-in cluster, which is not there")
    for what, given in (("model", request.model), ("data", request.data)):
        if settings.executor != "local" and not isinstance(given, str | Path):
            raise SettingsError(
                f"executor {settings.executor!r}: the {what} is in memory, which workers can't read; "
                "give a path or a name, or executor 'local'"
            )


def _training_rank_estimate(records: Records) -> TrainingRankEstimate | None:
    """Estimate the training rank from the plain truncations of the top adapter; None without an answer to the first question.

    Above rank 4 a training loses more than a truncation to the same rank, at lower ranks it may lose less. So the
    smallest truncation that loses at most the margin is near the lower end of where the training rank lies.
    """
    answer = records.adapters[-1].answer if records.adapters else None
    if answer is None or records.started.is_own:
        return None
    low, high = probable_ranks(answer)
    where = f"{low}" if low == high else f"{low} to {high}"
    ranks = records.settings.ranks
    compared = ranks if len(ranks) > 1 else tuple(sorted({low, high, answer.trained_rank} | {max(1, low // 2)}))
    steps = max((trial.steps for trial in records.finished() if trial.arm.is_direct), default=1) or 1
    unlimited = dict.fromkeys(("budget_trainings", "budget_hours"))
    settings = records.settings.model_copy(update={**unlimited, "goal": "training-rank", "ranks": compared})
    space = space_of(settings, steps, records.started.data.loss_kind)
    cost = make_strategy(settings.strategy, space).cost()
    trainings = round(cost.expected - cost.to_adapter, 2)
    noun = "training" if trainings == 1 else "trainings"
    takes = f"about {trainings:.2g} more {noun}" if trainings else "no further training"
    further = "" if compared == ranks else f" --ranks {','.join(map(str, compared))}"
    sentence = (
        f"An estimate, not evidence: the rank to train at probably is {where}, since the smallest truncation that loses at "
        f"most the margin has rank {smallest_holding_truncation(answer)}. To show it takes {takes}: run the same command with "
        f"--goal training-rank{further}."
    )
    return TrainingRankEstimate(low=low, high=high, trainings=trainings, sentence=sentence)


def answers(records: Records, decision: Decision | None, goal: Goal) -> Answers:
    """Both answers; with goal "adapter", an estimate in place of the second."""
    return answers_of(records, decision, goal, _training_rank_estimate(records) if goal == "adapter" else None)


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one of the two questions."""

    rank: int | None  # None: undecided, or no rank is better than the base
    sentence: str
    path: Path | None  # of an adapter of that rank; where there is none, of `rank_at_hand`. None: nothing was saved


@dataclass(frozen=True, slots=True, repr=False)
class Selected:
    """The result of a selection: both answers, and where run folder, adapter and report are."""

    run: Path
    # The smallest adapter within the margin, in `adapter/`; None if a custom trainer saved none.
    adapter: Answer | None
    training: Answer | None  # the rank to train at; None with goal "adapter"
    report: Path
    answers: Answers  # both; its `document()` is the object of decision.json
    # Each next run as a command that can be pasted, where one continues this run.
    next_commands: Sequence[str | None] = ()
    adapters: list[AdapterCandidate] = field(default_factory=list)  # every adapter of the run against the reference

    @property
    def next_command(self) -> str | None:
        """The first of the next runs that can be pasted; None if there is none."""
        return next((command for command in self.next_commands if command is not None), None)

    @property
    def handed_over(self) -> HandedOver | None:
        """What the adapter's folder holds; None without one."""
        return None if self.answers.adapter is None else self.answers.adapter.handed_over

    @property
    def advice(self) -> str:
        """What to do with the answers, in one line; empty where no adapter was saved."""
        adapter, handed_over = self.adapter, self.handed_over
        if adapter is None or handed_over is None:
            return ""
        trained, again = handed_over.trained_rank, None if self.decided is None else self.decided.rank
        is_truncated = handed_over.how == "truncated" and handed_over.rank < trained
        ways = [f"start at rank {trained} and truncate" if is_truncated else f"train at rank {trained}"]
        if again is not None and again != trained:
            ways.append(f"train at rank {again}")
        rank = ", ".join(filter(None, [f"rank {handed_over.rank}", handed_over.module_range]))
        return f"Use {adapter.path} now ({rank}). To train again, {', or '.join(ways)}."

    @property
    def decided(self) -> Decision | None:
        """The decision on the training rank; None with goal "adapter"."""
        return self.answers.decision

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
        return self.answers.cost

    def __repr__(self) -> str:
        """The ranks and where they are, on one line; `print` shows the answers."""
        verdict = None if self.decided is None else self.decided.verdict
        adapter, training = (None if answer is None else answer.rank for answer in (self.adapter, self.training))
        return f"Selected(adapter={adapter}, training={training}, verdict={verdict!r}, run={str(self.run)!r})"

    def __str__(self) -> str:
        """Both answers in a few lines; the fields hold the rest."""
        from rightrank.report.answer import labelled

        view = self.view
        rows = [("run", str(self.run)), ("adapter", view.adapter)]
        if self.decided is not None:
            rows += [("training rank", view.training_rank), ("verdict", view.verdict), ("", view.safe_choice)]
        rows += view.next_rows()[:2]
        if self.adapter is not None:  # a custom trainer may save none
            rows.append(("use", self.advice))
        rows.append(("report", str(self.report)))
        return "\n".join(labelled(rows, 15))

    def to_pandas(self, *, examples: bool = False) -> DataFrame:
        """The trials as a table, or the scores of their held-out examples; see `rightrank.to_pandas`."""
        records = records_of(RunFolder(self.run).journal.read_settled(), str(self.run))
        return trials_frame(records, examples)

    @property
    def view(self) -> AnswerView:
        """Both answers in words."""
        from rightrank.report.answer import answer_view

        return answer_view(self.answers, self.next_commands)

    def _repr_html_(self) -> str:
        """The answers with their figures, as the run's folder has them."""
        from rightrank.report.answer import notebook_html

        folder = RunFolder(self.run).figures
        names = ["adapters", *(["rank_curve"] if self.decided is not None else [])]
        files = {name: folder / f"{name}.svg" for name in names}
        drawings = {name: file.read_text(encoding="utf-8") for name, file in files.items() if file.is_file()}
        return notebook_html(self.view, drawings.get("adapters", ""), drawings.get("rank_curve", ""))
