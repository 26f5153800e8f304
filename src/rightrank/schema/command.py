"""Settings as the arguments of `rightrank select`: the command that repeats a run, and those that continue it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from decimal import Decimal
from itertools import islice
from typing import Any

from rightrank.schema.decision import Decision, NextRun
from rightrank.schema.events import RunStarted
from rightrank.schema.settings import MAX_SEED, SelectSettings
from rightrank.schema.table import Setting


def reproduce_command(settings: Mapping[str, Any]) -> str | None:
    """The command that repeats a run with these settings; None if the model or the data were objects in memory."""
    model, data = settings.get("model"), settings.get("data")
    if not isinstance(model, str) or not isinstance(data, str) or "in memory" in (model + data):
        return None
    arguments: list[str] = []
    for name, row in SelectSettings.model_fields.items():
        value = settings.get(name)
        value = tuple(value) if isinstance(value, list) else value
        if value is not None and value != row.default:
            arguments += _arguments_of(name, row, value)
    return shlex.join(["rightrank", "select", model, data, "--out", "run", *arguments])


def _arguments_of(name: str, row: Setting, value: Any) -> list[str]:
    if isinstance(value, dict) or (isinstance(value, tuple) and not _can_be_joined(value, row)):
        return ["--set", f"{name}={json.dumps(value)}"]
    if not row.option:
        return ["--set", f"{name}={','.join(map(_text, value)) if isinstance(value, tuple) else _text(value)}"]
    if isinstance(value, bool):
        return [row.option if value else row.option.replace("--", "--no-", 1)]
    if isinstance(value, tuple) and not row.split:
        return [part for one in value for part in _pair(row.option, one)]
    if name == "budget_hours":
        return _pair(row.option, f"{Decimal(repr(value)):f}h")
    if name == "memory_bytes":
        return _pair(row.option, f"{value // 2**30}GiB" if value % 2**30 == 0 else f"{value}B")
    return _pair(row.option, ",".join(map(_text, value)) if isinstance(value, tuple) else _text(value))


def _can_be_joined(values: tuple[Any, ...], row: Setting) -> bool:
    """Whether a list can be written with commas between its values, or by an option that is repeated."""
    texts = list(map(_text, values))
    if not row.split:
        return bool(texts and row.option)
    return bool(texts) and not any(not text or text != text.strip() or "," in text or text[0] == "[" for text in texts)


def _pair(option: str, text: str) -> list[str]:
    return [f"{option}={text}"] if text.startswith("-") else [option, text]


def _text(value: Any) -> str:
    """A number in the fewest digits that give it back."""
    if not isinstance(value, float):
        return str(value)
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def next_commands(
    started: RunStarted, decision: Decision | None, run: str, margin: float | None = None
) -> list[str | None]:
    """For each of the decision's next runs its command, or None if options of `select` can't express it.

    `margin` is one that is not the run's own: part of the command, so that the continued run answers at this margin.
    """
    if decision is None:
        return []
    if started.data.form == "own":
        return [None] * len(decision.next_runs)
    further = [] if margin is None else ["--margin", f"{margin:g}"]
    return [
        shlex.join(["rightrank", "select", "--out", run, *options, *further]) if options else None
        for options in (_further_options(started, wanted) for wanted in decision.next_runs)
    ]


def _further_options(started: RunStarted, wanted: NextRun) -> list[str]:
    settings: dict[str, Any] = started.settings
    options: list[str] = []
    held_out = len(started.evaluation_items) + started.data.not_evaluated  # at most so many examples can be evaluated
    if wanted.items is not None and len(started.evaluation_items) < wanted.items <= held_out:
        options += ["--eval-items", str(wanted.items)]
    ranks, rates, seeds = (settings[name] for name in ("ranks", "learning_rates", "seeds"))
    if wanted.action == "seeds" and wanted.seeds is not None:
        further = (seed for seed in range(MAX_SEED) if seed not in seeds)
        options += _with_added("--seeds", seeds, [*seeds, *islice(further, wanted.seeds - len(seeds))])
    if wanted.action == "rank":
        options += _with_added("--ranks", ranks, [*ranks, *wanted.ranks])
    if wanted.action in ("rank", "rates"):
        options += _with_added("--learning-rates", rates, [*rates, *wanted.learning_rates])
    return options


def _with_added(option: str, before: Sequence[float], after: Sequence[float]) -> list[str]:
    """The option with all values; empty where nothing is added."""
    added = sorted(set(after))
    return [option, ",".join(f"{value:g}" for value in added)] if set(after) > set(before) else []
