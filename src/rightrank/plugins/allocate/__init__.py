"""A rank for each module, proposed only where trainings support it: a pattern against a uniform rank and against its own shuffle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rightrank.runs.plugins import Plugin

if TYPE_CHECKING:
    import click

    from rightrank.schema.results import Allocation, AllocationTrial
    from rightrank.schema.settings import SelectSettings


class Allocate(Plugin):
    name = "allocate"

    def commands(self) -> Sequence[click.Command]:
        from rightrank.plugins.allocate import commands

        return [commands.allocate]

    def functions(self) -> Mapping[str, Callable[..., Any]]:
        return {"allocate": allocate}


PLUGIN = Allocate()


def allocate(
    adapter: str | Path,
    data: str | Path,
    *,
    rank: int,
    learning_rate: float,
    max_steps: int,
    pattern: str | Path | None = None,
    seeds: Sequence[int] = (0, 1),
    base: str | None = None,
    settings: SelectSettings | None = None,
    on_trial: Callable[[AllocationTrial], None] = lambda _: None,
) -> Allocation:
    """Propose a rank for each module where trained evidence supports it; otherwise answer uniform.

    Args:
        adapter: a trained PEFT adapter folder, which the pattern is made from.
        data: the data to train and test on.
        rank: the rank of the uniform adapter that sets the number of parameters.
        learning_rate: the learning rate of every training.
        max_steps: the optimizer steps of every training.
        pattern: a JSON file of {module: rank}, to test in place of the one by spectra.
        seeds: one training of each pattern for each seed.
        base: the base model; None for the one that the adapter names.
        settings: see `SelectSettings`; None for the defaults.
        on_trial: receives each training that has ended.

    Raises:
        InputError: the adapter, data or pattern can't be used.
        RunError: a training diverged.
    """
    from rightrank.plugins.allocate.proposal import AllocateOptions
    from rightrank.plugins.allocate.proposal import allocate as allocate_ranks
    from rightrank.schema.settings import make_settings

    options = AllocateOptions(
        rank,
        learning_rate,
        max_steps,
        None if pattern is None else Path(pattern),
        tuple(seeds),
        base,
        settings or make_settings({}),
        on_trial,
    )
    return allocate_ranks(Path(adapter), Path(data), options)
