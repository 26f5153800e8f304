"""`allocate`: a rank for each module, tested against a uniform one."""

from __future__ import annotations

from pathlib import Path

import click

import rightrank
from rightrank.cli.options import comma, gather, whole_numbers


@click.command(
    short_help="Test ranks that differ by module against a uniform one.",
    epilog="Example: rightrank allocate run/adapter data.jsonl --rank 8 --learning-rate 1e-3 --max-steps 200",
)
@click.argument("adapter", type=click.Path(path_type=Path))
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--rank", type=int, required=True, help="Rank of the uniform adapter that sets the number of parameters.")
@click.option("--learning-rate", type=float, required=True, help="Learning rate of every training.")
@click.option("--max-steps", type=int, required=True, help="Optimizer steps of every training.")
@click.option("--pattern", type=click.Path(path_type=Path), help="Test this JSON file of {module: rank} instead.")
@click.option("--seeds", callback=comma, help="Seeds (default 0,1).")
@click.option("--base", help="The base model (default: the one that the adapter names).")
@click.option(
    "--set", "assignments", multiple=True, metavar="NAME=VALUE", help="A setting of select, such as seq_len=256."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def allocate(
    adapter: Path,
    data: Path,
    rank: int,
    learning_rate: float,
    max_steps: int,
    pattern: Path | None,
    seeds: list[str] | None,
    base: str | None,
    assignments: tuple[str, ...],
    as_json: bool,
) -> None:
    """Propose a rank for each module if trained evidence supports it; otherwise answer uniform.

    The pattern comes from the spectra of the trained ADAPTER. It must beat the uniform rank at equal parameters, and the same
    ranks shuffled over the modules.
    """
    from rightrank.schema.settings import make_settings

    allocation = rightrank.allocate(
        adapter,
        data,
        rank=rank,
        learning_rate=learning_rate,
        max_steps=max_steps,
        pattern=pattern,
        seeds=tuple(whole_numbers(seeds, "--seeds") or (0, 1)),
        base=base,
        settings=make_settings(gather(None, assignments, {})),
        on_trial=lambda trial: click.echo(f"{trial.pattern}, seed {trial.seed}: {trial.value:.4f}", err=True),
    )
    if as_json:
        click.echo(allocation.model_dump_json())
        return
    from rightrank.report.spectra import allocation_text

    click.echo(allocation_text(allocation))
