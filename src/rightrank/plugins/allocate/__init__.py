"""A rank for each module, proposed only where trainings support it: a pattern against a uniform rank and against its own shuffle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rightrank.cli.options import comma, gather, whole_numbers
from rightrank.runs.plugins import Plugin
from rightrank.schema.settings import SelectSettings

if TYPE_CHECKING:
    from rightrank.schema.results import Allocation, AllocationTrial


def allocate(
    adapter: str | Path,
    data: str | Path,
    *,
    rank: int,
    learning_rate: float,
    max_steps: int,
    seeds: Sequence[int] = (0, 1),
    base: str | None = None,
    settings: SelectSettings | None = None,
    on_trial: Callable[[AllocationTrial], None] = lambda _: None,
) -> Allocation:
    """Propose a rank for each module where trained evidence supports it; otherwise answer uniform.

    Args:
        adapter: a trained PEFT adapter folder, whose spectra give the pattern.
        data: the data to train and test on.
        rank: the rank of the uniform adapter that sets the number of parameters.
        learning_rate: the learning rate of every training.
        max_steps: the optimizer steps of every training.
        seeds: one training of each pattern for each seed.
        base: the base model; None for the one that the adapter names.
        settings: see `SelectSettings`; None for the defaults.
        on_trial: receives each training that has ended.

    Raises:
        InputError: the adapter, or data can't be used.
        RunError: a training diverged.
    """
    from rightrank.plugins.allocate.proposal import AllocateOptions
    from rightrank.plugins.allocate.proposal import allocate as allocate_ranks

    read = settings or SelectSettings()
    options = AllocateOptions(rank, learning_rate, max_steps, tuple(seeds), base, read, on_trial)
    return allocate_ranks(Path(adapter), Path(data), options)


@click.command(
    "allocate",
    short_help="Test ranks that differ by module against a uniform one.",
    epilog="Example: rightrank allocate run/adapter data.jsonl --rank 8 --learning-rate 1e-3 --max-steps 200",
)
@click.argument("adapter", type=click.Path(path_type=Path))
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--rank", type=int, required=True, help="Rank of the uniform adapter that sets the number of parameters.")
@click.option("--learning-rate", type=float, required=True, help="Learning rate of every training.")
@click.option("--max-steps", type=int, required=True, help="Optimizer steps of every training.")
@click.option("--seeds", callback=comma, help="Seeds (default 0,1).")
@click.option("--base", help="The base model (default: the one that the adapter names).")
@click.option(
    "--set", "assignments", multiple=True, metavar="NAME=VALUE", help="A setting of select, such as seq_len=256."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def _allocate(seeds: list[str] | None, assignments: tuple[str, ...], as_json: bool, **asked: Any) -> None:
    """Propose a rank for each module if trained evidence supports it; otherwise answer uniform.

    The pattern comes from the spectra of the trained ADAPTER. It must beat the uniform rank at equal parameters, and the same
    ranks shuffled over the modules.
    """
    allocation = allocate(
        **asked,
        seeds=tuple(whole_numbers(seeds, "--seeds") or (0, 1)),
        settings=SelectSettings(**gather(None, assignments, {})),
        on_trial=lambda trial: click.echo(f"{trial.pattern}, seed {trial.seed}: {trial.value:.4f}", err=True),
    )
    click.echo(allocation.model_dump_json() if as_json else _allocation_text(allocation))


def _allocation_text(allocation: Allocation) -> str:
    """The answer and the comparisons behind it."""
    from rightrank.report.evidence_tables import table_lines

    rows = [["pattern", "seed", "parameters", "held-out"]]
    for trial in allocation.trials:
        rows.append([trial.pattern, str(trial.seed), f"{trial.parameters:,}", f"{trial.value:.4f}"])
    compared = [
        f"pattern against {verdict.against}: {verdict.difference:+.4f} [{verdict.low:+.4f}, {verdict.high:+.4f}]"
        for verdict in allocation.verdicts
    ]
    return "\n".join([allocation.sentence, *table_lines(rows, left=(0,)), *compared])


PLUGIN = Plugin(name="allocate", commands=[_allocate], functions={"allocate": allocate})
