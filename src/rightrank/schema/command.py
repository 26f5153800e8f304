"""Commands of `rightrank select`: that reproduces a run, that resumes it, and that makes the next run of a decision."""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Mapping, Sequence
from decimal import Decimal
from itertools import islice
from typing import Any

from rightrank.schema.decision import NextRun
from rightrank.schema.events import RunStarted
from rightrank.schema.metrics import Margin
from rightrank.schema.setting_table import Row, list_rows
from rightrank.schema.settings import MAX_SEED, SelectSettings


def build_reproduce_command(
    model: str | None, data: str | None, settings: SelectSettings, out: str = "run"
) -> str | None:
    """Return the command that repeats a run in the folder `out`, or None if it used a custom trainer, or a model or data in memory."""
    if model is None or data is None or "in memory" in (model + data):
        return None
    arguments: list[str] = []
    for name, row in list_rows(SelectSettings).items():
        value = getattr(settings, name)
        if value is not None and value != row.default:
            arguments += build_arguments(name, row, value)
    return shlex.join(["rightrank", "select", model, data, "--out", out, *arguments])


def build_resume_command(run: str) -> str:
    """Return the command that continues a selection with the settings that it began with."""
    return shlex.join(["rightrank", "select", "--out", run])


def build_arguments(name: str, row: Row, value: Any) -> list[str]:
    """Return the command-line arguments of a setting: its option, or `--set`."""
    texts = [_format_value(entry) for entry in value] if isinstance(value, tuple) else [_format_value(value)]
    text = ",".join(texts)
    if isinstance(value, dict) or (isinstance(value, tuple) and not _can_be_joined(texts)):
        return ["--set", f"{name}={json.dumps(value)}"]
    if not row.option:
        return ["--set", f"{name}={text}"]
    if isinstance(value, bool):
        return [row.option if value else row.option.replace("--", "--no-", 1)]
    if name == "budget_hours":
        text = f"{Decimal(repr(value)).normalize():f}h"
    if name == "memory_bytes":
        text = f"{value // 2**30}GiB" if value % 2**30 == 0 else f"{value}B"
    return [f"{row.option}={text}"] if text.startswith("-") else [row.option, text]


def _can_be_joined(texts: list[str]) -> bool:
    """Return whether a list can be written with commas between its values."""
    return bool(texts) and not any(not text or text != text.strip() or "," in text or text[0] == "[" for text in texts)


def _format_value(value: Any) -> str:
    """Format a value; a number gets the fewest digits from which it can be restored."""
    if not isinstance(value, float):
        return str(value)
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def build_next_commands(
    started: RunStarted,
    runs: Sequence[NextRun],
    run: str,
    margin: Margin | None = None,
    tried_rates: Collection[float] = (),
) -> list[str | None]:
    """Return the command of each next run, or None if options of `select` can't express it.

    A command that adds learning rates has all of `tried_rates`, so that the new ones are compared with those that the search added. A
    `margin` other than the run's own is added to the command, so that the continued run answers at this margin.
    """
    if started.is_custom_trainer:
        return [None] * len(runs)
    commands: list[str | None] = []
    for next_run in runs:
        changes = _collect_changes(started, next_run, tried_rates)
        if changes and margin is not None:
            changes["margin"] = margin
        if "max_eval_examples" in changes:  # these belong to the identity of a run, so this is another one
            settings = started.select_settings.model_copy(update=changes)
            commands.append(
                build_reproduce_command(started.model_name, started.data_name, settings, f"{run}-more-examples")
            )
            continue
        budget = build_budget_options(started.select_settings, next_run.trials)
        command = shlex.join(["rightrank", "select", "--out", run, *_build_options(changes), *budget])
        commands.append(command if changes else None)
    return commands


def build_budget_options(settings: SelectSettings, trainings: float) -> list[str]:
    """Return options that add a number of trainings to the budget and double its time; empty without a budget."""
    budgets = {
        "budget_trainings": settings.budget_trainings and settings.budget_trainings + trainings,
        "budget_hours": settings.budget_hours and float(f"{2 * settings.budget_hours:.3g}"),
    }
    return [argument for name, budget in budgets.items() if budget for argument in _build_options({name: budget})]


def _build_options(settings: Mapping[str, Any]) -> list[str]:
    rows = list_rows(SelectSettings)
    return [argument for name, value in settings.items() for argument in build_arguments(name, rows[name], value)]


def _collect_changes(started: RunStarted, next_run: NextRun, tried_rates: Collection[float]) -> dict[str, Any]:
    """Collect the settings that a next run changes; empty if settings of `select` can't express it."""
    settings, added = started.select_settings, dict[str, Collection[float]]()
    if next_run.action == "seeds" and next_run.seeds is not None:
        unused_seeds = (seed for seed in range(MAX_SEED) if seed not in settings.seeds)
        added["seeds"] = list(islice(unused_seeds, max(0, next_run.seeds - len(settings.seeds))))
    if next_run.action == "rank":
        added["ranks"] = next_run.ranks
    if next_run.action in ("rank", "rates") and not {*next_run.learning_rates} <= {*settings.learning_rates}:
        added["learning_rates"] = [*tried_rates, *next_run.learning_rates]
    changes: dict[str, Any] = {
        name: tuple(sorted({*getattr(settings, name), *values}))
        for name, values in added.items()
        if not {*values} <= {*getattr(settings, name)}
    }
    examples = len(started.evaluation_examples)
    held_out = examples + started.data.not_evaluated  # the maximum number of examples that can be evaluated
    is_grouped = started.data.groups > 0  # More rows are not necessarily more groups.
    if next_run.examples is not None and not is_grouped and examples < next_run.examples <= held_out:
        changes["max_eval_examples"] = next_run.examples
    return changes
