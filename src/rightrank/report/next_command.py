"""The next run as a command that can be pasted."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from rightrank.records import Decision, NextRun, RunStarted
from rightrank.settings.select import MAX_SEED


def next_command(started: RunStarted, decision: Decision | None, run: str) -> str | None:
    """`rightrank select --out RUN …` for the first next run that options of `select` can express; None if none can.

    The command continues the run: its model, data and other settings are in the run folder.
    """
    if decision is None or started.data.form == "own":
        return None
    for wanted in decision.next_runs:
        options = _options(started, wanted)
        if options:
            return shlex.join(["rightrank", "select", "--out", run, *options])
    return None


def _options(started: RunStarted, wanted: NextRun) -> list[str]:
    settings, options = started.settings, list[str]()
    if wanted.items is not None and started.data.not_evaluated:  # the data has more examples than are evaluated
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
