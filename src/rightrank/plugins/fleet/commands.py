"""`fleet`: many adapters on one server at one rank."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

import rightrank
from rightrank.cli.options import gather

if TYPE_CHECKING:
    from rightrank.plugins.fleet.common_rank import Fleet
    from rightrank.schema.decision import AdapterCandidate


def _fleet_text(found: Fleet) -> str:
    """Everything, for a person."""
    from rightrank.report.format import table_lines, visible

    ranks = sorted({one.rank for adapter in found.adapters for one in adapter.candidates}, reverse=True)
    rows = [["adapter", "rank", "needs", *(f"at {rank}" for rank in ranks)]]
    for adapter in found.adapters:
        best = {one.rank: one for one in reversed(adapter.candidates)}
        cells = ["" if rank not in best else _loss(best[rank]) for rank in ranks]
        rows.append([visible(Path(adapter.out).name), str(adapter.rank_before), str(adapter.rank), *cells])
    lines = [
        found.sentence,
        "",
        *table_lines(rows),
        "(held-out, worse than the adapter itself by; * not shown to be within the margin)",
        "",
    ]
    padded = "" if found.padded_to is None else f", each padded to rank {found.padded_to}"
    return "\n".join([*lines, f"adapters: {found.out}{padded}"])


def _loss(one: AdapterCandidate) -> str:
    return f"{one.difference:+.4f}{'' if one.holds else '*'}"


@click.command(
    short_help="Bring many adapters to the smallest common rank.",
    epilog="Example: rightrank fleet tasks/first tasks/second --model ./model --out common",
)
@click.argument("adapters", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="ADAPTER...")
@click.option("--model", required=True, help="The base model of all adapters.")
@click.option(
    "--data",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path),
    help="Held-out rows: once for all adapters, or once for each in their order.",
)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder to write, one folder for each adapter."
)
@click.option("--margin", type=float, help="How much an adapter may lose (default 0.005 nats a token).")
@click.option("--pad", is_flag=True, help="Write all adapters at the one rank that vLLM serves, with one scale.")
@click.option("--ignore-base-name", is_flag=True, help="Accept adapters that name another base, if their shapes fit.")
@click.option(
    "--set", "assignments", multiple=True, metavar="NAME=VALUE", help="A setting of select, such as seq_len=256."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def fleet(
    adapters: tuple[Path, ...],
    model: str,
    data: tuple[Path, ...],
    out: Path,
    margin: float | None,
    pad: bool,
    ignore_base_name: bool,
    assignments: tuple[str, ...],
    as_json: bool,
) -> None:
    """Find the smallest rank that all ADAPTERs can be truncated to without losing more than the margin, and write them."""
    from rightrank.schema.settings import make_settings

    found = rightrank.fleet(
        adapters,
        out,
        model=model,
        data=data,
        settings=make_settings(gather(None, assignments, {"margin": margin})),
        pad=pad,
        ignore_base_name=ignore_base_name,
        notice=lambda line: click.echo(line, err=True),
    )
    click.echo(found.model_dump_json() if as_json else _fleet_text(found))
