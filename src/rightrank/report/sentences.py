"""The sentences of a report: the answer and its certainty, the cost, what was not tested, the command to run again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from rightrank.decision.run import Records, trainings
from rightrank.models.places import CLASSIFIER_FILE
from rightrank.models.ranks import peft_scaling
from rightrank.report.format import duration, metric_unit, quantity
from rightrank.schema.decision import Decision, HandedOver
from rightrank.schema.events import RunStarted, TestEvaluated
from rightrank.schema.trials import TrialFinished, split_name


@dataclass(frozen=True, slots=True)
class _UseIt:
    """The adapter in the names of PEFT, with code that loads it."""

    r: int
    alpha: str
    learning_rate: str
    code: str


def subject_text(started: RunStarted) -> str:
    """Model and data in one line, with the number of examples."""
    model, data = (str(started.settings.get(name) or "a custom trainer") for name in ("model", "data"))
    counts = ", ".join(f"{split.items:,} {split_name(name)}" for name, split in started.data.splits.items())
    if "data" not in started.settings:
        return model
    return f"{_last(model)} on {_last(data)}" + (f": {counts} examples" if counts else "")


def _last(name: str) -> str:
    """The last part of a path; a name on the hub as it is."""
    return PurePath(name).name if name.startswith((".", "/", "~")) else name


def use_it(handed_over: HandedOver, records: Records) -> _UseIt | None:
    """What the box shows; None for an adapter whose folder this package did not write."""
    settings, trials = records.started.settings, {trial.trial_id: trial for trial in records.finished()}
    answer = records.adapters[-1].answer
    trial, trained = trials.get(answer.trial_id), trials.get(answer.trained_id)
    model = settings.get("model")
    if trial is None or trained is None or records.started.data.form == "own" or not isinstance(model, str):
        return None
    scaling: Any = settings.get("scaling", "alpha/r")
    alpha, _ = peft_scaling(scaling, trained.lora_alpha, trained.rank)  # a truncation keeps its parent's alpha
    name = f"tokenizer = AutoTokenizer.from_pretrained({base_arguments(model)})"
    if records.started.data.classes is not None:
        loading = loading_lines("adapter", model, is_classifier=True)
        code = "\n".join(["from transformers import AutoTokenizer", *loading, name])
    else:
        code = (
            "from peft import PeftModel\n"
            f"from transformers import AutoModelForCausalLM, AutoTokenizer\n\n{name}\n"
            f"base = AutoModelForCausalLM.from_pretrained({base_arguments(model)})\n"
            'model = PeftModel.from_pretrained(base, "adapter")  # beside this report'
        )
    return _UseIt(handed_over.rank, f"{alpha:g}", f"{trained.learning_rate:g}", code)


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of the trials so far."""

    trainings: float  # optimizer steps over those of a whole training
    truncations: int  # evaluated without a training step
    without_result: int
    seconds: float

    def sentence(self) -> str:
        parts = [quantity(self.trainings, "training")]
        if self.truncations:
            parts.append(quantity(self.truncations, "truncation"))
        if self.without_result:
            parts.append(f"{quantity(self.without_result, 'trial')} without a result")
        return ", ".join([*parts, duration(self.seconds)])


def cost_of(records: Records) -> Cost:
    """The cost of all trials; the seconds include the evaluation of the base model.

    A training that resumes a stopped one contains its seconds, so those of the stopped one are subtracted.
    """
    finished = records.finished()
    by_id = {trial.trial_id: trial for trial in finished}
    resumed = [by_id[trial.continue_from] for trial in finished if trial.continue_from in by_id]
    return Cost(
        trainings=trainings(records),
        truncations=sum(trial.truncate_from is not None and trial.steps == 0 for trial in finished),
        without_result=sum(not isinstance(outcome, TrialFinished) for outcome in records.outcomes),
        seconds=sum(map(_seconds, finished)) - sum(map(_seconds, resumed)),
    )


def _seconds(trial: TrialFinished) -> float:
    return trial.train_seconds + trial.eval_seconds


def confidence_text(records: Records, decision: Decision) -> str:
    """The confidence level, or that the answer is an indication, and the evidence behind it."""
    examples = len(records.started.evaluation_items)
    held_out = f", paired over {quantity(examples, 'held-out example')}" if examples else ""
    level = "An indication" if decision.confidence is None else f"{decision.confidence:.0%} confidence"
    return f"{level}{held_out} and {quantity(_seeds(decision), 'seed')} per rank"


def _seeds(decision: Decision) -> int:
    return max((e.seeds for e in decision.ranks if e.rank > 0), default=1)


def test_rows(records: Records) -> list[tuple[str, TestEvaluated]]:
    """`(adapter, its reading on the test split)`: "base", "rank 16", "rank 4, truncated"."""
    stages = {trial.trial_id: trial.arm.stage() for trial in records.finished()}
    names = [f"rank {test.rank}" if test.rank else "base" for test in records.tests]
    return [
        (", ".join(filter(None, [name, stages.get(test.trial_id)])), test)
        for name, test in zip(names, records.tests, strict=True)
    ]


def not_tested(records: Records, decision: Decision | None) -> list[str]:
    """The limits of the evidence, one sentence each."""
    settings = records.started.settings
    ranks = sorted({trial.rank for trial in records.finished() if trial.rank > 0 and trial.arm.is_direct})
    limits: list[str] = []
    if ranks:
        limits.append(f"Ranks other than {', '.join(map(str, ranks))}.")
    steps = max((trial.steps for trial in records.finished()), default=0)
    if steps:
        limits.append(
            f"Trainings longer than {steps} steps. Low ranks fall behind later, so a longer training may need a higher rank."
        )
    others = [answer.metric for answer in decision.other_metrics] if decision else []
    limits.append(f"Metrics other than {', '.join([records.started.metric, *others])}; other data, prompts or models.")
    if "target_modules" in settings:
        limits.append(
            f"Target modules other than {_plain(settings['target_modules'])}; scalings other than "
            f"{_plain(settings.get('scaling'))} with alpha {_plain(settings.get('lora_alpha'))}."
        )
    if decision is not None and _seeds(decision) < 2:
        limits.append("Seed noise: each rank has one seed.")
    missing = sum(one.rank > 0 and not isinstance(one, TrialFinished) for one in records.outcomes)
    if missing:
        limits.append(f"{quantity(missing, 'training')} without a result: they count neither for nor against a rank.")
    if not records.tests:
        limits.append("The test split, which is evaluated at the end of the run.")
    return limits


def margin_text(decision: Decision) -> str:
    return f"{decision.margin:.4g} {metric_unit(decision.metric)}"


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(_plain(part) for part in value)
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def loading_lines(folder: str, base: str | None, is_classifier: bool) -> list[str]:
    """Python that loads a model with the adapter in `folder`: PEFT finds the base, but for one in a GGUF file."""
    kind, more = "AutoPeftModelFor" + ("SequenceClassification" if is_classifier else "CausalLM"), ""
    head: list[str] = []
    if is_classifier:
        more = ", **head"
        head = [
            f"head = json.load(open({f'{folder}/{CLASSIFIER_FILE}'!r}, encoding='utf-8'))",
            "head['id2label'] = {int(number): label for number, label in head['id2label'].items()}",  # JSON has no numbers as keys
        ]
    imports = ["import json"] if is_classifier else []
    if base is None or not base.lower().endswith(".gguf"):
        return [*imports, f"from peft import {kind}", *head, f"model = {kind}.from_pretrained({folder!r}{more})"]
    plain = kind.replace("AutoPeft", "Auto")
    imports += ["from peft import PeftModel", f"from transformers import {plain}"]
    loaded = f"base = {plain}.from_pretrained({base_arguments(base)}{more})"
    return [*imports, *head, loaded, f"model = PeftModel.from_pretrained(base, {folder!r})"]


def base_arguments(base: str) -> str:
    """What `from_pretrained` takes for a base: its name, or the folder and the name of a GGUF file."""
    path = PurePath(base)
    return f"{str(path.parent)!r}, gguf_file={path.name!r}" if path.suffix.lower() == ".gguf" else repr(base)
