"""The text that names a metric: a built-in name, or `NAME=KIND:…` for one that other code computes.

loss                            nats per token (per example for a classification, per pair for preference pairs)
accuracy, macro_f1              for a classification
reward_accuracy, reward_margin  for preference pairs
exact_match, f1, rouge1, rouge2, rougeL    of the text that the model generates for a prompt
MODULE:FUNCTION                 a Python function; MODULE may be a file
NAME=command:PROGRAM {file}     a program that reads the answers as JSONL and prints scores
evaluate:NAME[:KEY]             a metric of Hugging Face `evaluate`, or a folder with one
lm-eval:TASK.yaml[:KEY]         a task file of lm-evaluation-harness
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

from rightrank.errors import did_you_mean

SpecKind: TypeAlias = Literal["loss", "classes", "pairs", "text", "function", "command", "evaluate", "lm-eval"]

BUILT_IN: dict[str, SpecKind] = {
    "loss": "loss",
    "accuracy": "classes",
    "macro_f1": "classes",
    "reward_accuracy": "pairs",
    "reward_margin": "pairs",
    "exact_match": "text",
    "f1": "text",
    "rouge1": "text",
    "rouge2": "text",
    "rougeL": "text",
}
_NAMED = re.compile(r"([A-Za-z_][\w-]*)=(.+)", re.DOTALL)
_FUNCTION = re.compile(r"[^:]+:[A-Za-z_]\w*")
FORMS = f"{', '.join(BUILT_IN)}, MODULE:FUNCTION, NAME=command:PROGRAM, evaluate:NAME[:KEY] or lm-eval:TASK.yaml[:KEY]"


class MetricSpec(NamedTuple):
    """One metric and who computes it."""

    name: str  # its name in every record
    kind: SpecKind
    target: str = ""  # the function, command line, metric or task file
    key: str | None = None  # evaluate and lm-eval: the key of the number

    @property
    def needs_answers(self) -> bool:
        """Whether the metric needs the model's answer to each held-out example: a generated text or a class."""
        return self.kind not in ("loss", "pairs", "lm-eval") and self.name != "accuracy"

    @property
    def is_measured_along(self) -> bool:
        """Whether every held-out evaluation measures it at no further cost."""
        return self.kind in ("loss", "pairs") or self.name == "accuracy"


def parse_metric(text: str) -> MetricSpec:
    """The metric that `text` names.

    Raises:
        ValueError: an unknown metric; the message lists the known forms.
    """
    named = _NAMED.fullmatch(text) if not text.startswith("command:") else None
    name, rest = (named[1], named[2]) if named else (None, text)
    if rest in BUILT_IN and (name is None or name == rest):
        return MetricSpec(rest, BUILT_IN[rest])
    if name in BUILT_IN:
        raise ValueError(f"metric {text!r}: {name!r} is a built-in metric; give yours another name")
    spec = _parse_foreign(name, rest.strip())
    if spec is None:
        raise ValueError(f"metric {text!r} is not known{did_you_mean(rest, BUILT_IN)}; there are: {FORMS}")
    return spec


def _parse_foreign(name: str | None, rest: str) -> MetricSpec | None:
    kind, colon, target = rest.partition(":")
    if not colon or not target.strip():
        return None
    if kind == "command":
        if name is None:
            raise ValueError(f"metric {rest!r} has no name; give NAME=command:PROGRAM, such as bleu={rest}")
        return MetricSpec(name, "command", target)
    if kind == "evaluate":
        target, key = _key(target)
        return MetricSpec(name or key or _plain(target), "evaluate", target, key)
    if kind == "lm-eval":
        target, key = _key(target)
        return MetricSpec(name or "_".join(filter(None, (_plain(target), key))), "lm-eval", target, key)
    rest = rest.removeprefix("python:")
    if not _FUNCTION.fullmatch(rest):
        return None
    return MetricSpec(name or rest.rpartition(":")[2], "function", rest)


def _key(target: str) -> tuple[str, str | None]:
    before, colon, key = target.rpartition(":")
    return (before, key) if colon else (target, None)


def _plain(target: str) -> str:
    """`tasks/gsm8k.yaml` as `gsm8k`."""
    last = re.split(r"[/\\]", target.rstrip("/\\"))[-1]
    return re.sub(r"\.(ya?ml|py)$", "", last)


def parse_metrics(deciding: str, others: Sequence[str]) -> tuple[MetricSpec, ...]:
    """The metric that decides, then the others.

    Raises:
        ValueError: an unknown metric, or two with one name.
    """
    specs = tuple(parse_metric(text) for text in (deciding, *others))
    names = [spec.name for spec in specs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"metrics: {twice!r} is given twice; give each once, under names that differ (NAME=…)")
    return specs
