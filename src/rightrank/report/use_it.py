"""The report's header line, and its box with what someone needs to use the adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from rightrank.decision.run import Records
from rightrank.maths.scaling import peft_scaling
from rightrank.records import HandedOver, RunStarted
from rightrank.records.base import split_name


@dataclass(frozen=True, slots=True)
class UseIt:
    """The adapter in the names of PEFT, with code that loads it."""

    link: str  # relative to the report
    path: str
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


def use_it(handed_over: HandedOver, records: Records) -> UseIt | None:
    """What the box shows; None for an adapter whose folder this package did not write."""
    settings, trials = records.started.settings, {trial.trial_id: trial for trial in records.finished()}
    answer = records.adapters[-1].answer
    trial, trained = trials.get(answer.trial_id), trials.get(answer.trained_id)
    model = settings.get("model")
    if trial is None or trained is None or records.started.data.form == "own" or not isinstance(model, str):
        return None
    scaling: Any = settings.get("scaling", "alpha/r")
    alpha, _ = peft_scaling(scaling, trained.lora_alpha, trained.rank)  # a truncation keeps its parent's alpha
    classes = records.started.data.classes
    kind, labels = ("CausalLM", "") if classes is None else ("SequenceClassification", f", num_labels={len(classes)}")
    code = (
        "from peft import PeftModel\n"
        f"from transformers import AutoModelFor{kind}, AutoTokenizer\n\n"
        f"tokenizer = AutoTokenizer.from_pretrained({model!r})\n"
        f"base = AutoModelFor{kind}.from_pretrained({model!r}{labels})\n"
        'model = PeftModel.from_pretrained(base, "adapter")  # beside this report'
    )
    return UseIt("adapter/", "adapter/", handed_over.rank, f"{alpha:g}", f"{trained.learning_rate:g}", code)
