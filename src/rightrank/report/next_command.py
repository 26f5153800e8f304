"""The next runs as commands that can be pasted."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from rightrank.records import Decision, NextRun, RunStarted
from rightrank.settings.select import MAX_SEED


def next_command(started: RunStarted, decision: Decision | None, run: str) -> str | None:
    """`rightrank select --out RUN …` for the first next run that options of `select` can express; None if none can.

    The command continues the run: its model, data and other settings are in the run folder.
    """
    return next((command for command in next_commands(started, decision, run) if command is not None), None)


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
    return [_command(_options(started, wanted), further, run) for wanted in decision.next_runs]


def _command(options: list[str], further: list[str], run: str) -> str | None:
    return shlex.join(["rightrank", "select", "--out", run, *options, *further]) if options else None


def _options(started: RunStarted, wanted: NextRun) -> list[str]:
    settings, options = started.settings, list[str]()
    held_out = len(started.evaluation_items) + started.data.not_evaluated  # at most so many examples can be evaluated
    if wanted.items is not None and len(started.evaluation_items) < wanted.items <= held_out:
        options += ["--eval-items", str(wanted.items)]
    ranks, rates, seeds = (_numbers(settings.get(name)) for name in ("ranks", "learning_rates", "seeds"))
    if wanted.action == "seeds" and wanted.seeds is not None:
        options += _list("--seeds", seeds, _more_seeds(seeds, wanted.seeds))
    if wanted.action == "rank":
        options += _list("--ranks", ranks, [*ranks, *wanted.ranks])
    if wanted.action in ("rank", "rates"):
        options += _list("--learning-rates", rates, [*rates, *wanted.learning_rates])
    return options


def _more_seeds(seeds: Sequence[float], count: int) -> list[float]:
    further = (seed for seed in range(MAX_SEED) if seed not in seeds)
    return [*seeds, *(next(further) for _ in range(count - len(seeds)))]


def _list(option: str, before: Sequence[float], after: Sequence[float]) -> list[str]:
    """The option with all values; empty where nothing is added."""
    added = sorted(set(after))
    return [option, ",".join(f"{value:g}" for value in added)] if set(after) > set(before) else []


def _numbers(value: object) -> list[float]:
    return [one for one in value if isinstance(one, int | float)] if isinstance(value, list | tuple) else []
