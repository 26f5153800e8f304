"""Many adapters of one server at one rank: the smallest to which all can be truncated within the margin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rightrank.cli.options import gather, json_line
from rightrank.runs.plugins import Plugin
from rightrank.schema.settings import SelectSettings

if TYPE_CHECKING:
    from rightrank.plugins.fleet.common_rank import Fleet


def fleet(
    adapters: Sequence[str | Path],
    out: str | Path,
    *,
    model: str,
    data: str | Path | Sequence[str | Path],
    settings: SelectSettings | None = None,
    notice: Callable[[str], None] = lambda _: None,
) -> Fleet:
    """Bring several adapters of one server to the smallest rank at which none loses more than the margin.

    Args:
        adapters: two adapter folders or more, of one base.
        out: the folder to write, which must not exist: one folder for each adapter.
        model: the base.
        data: held-out rows for all adapters, or one file for each in their order.
        settings: of evaluation and margin; see `SelectSettings`.
        notice: receives each line for a person.

    Raises:
        InputError: an adapter of another base, data that can't be used, adapters without a common module; nothing was written.
    """
    from rightrank.models.places import require_adapter_folder

    for adapter in adapters:
        require_adapter_folder(Path(adapter))  # before what brings torch

    from rightrank.plugins.fleet.common_rank import run_fleet

    files = [data] if isinstance(data, str | Path) else list(data)
    return run_fleet(
        [Path(adapter) for adapter in adapters],
        Path(out),
        model=model,
        files=[Path(file) for file in files],
        settings=settings or SelectSettings(),
        notice=notice,
    )


def _fleet_text(answer: Fleet) -> str:
    """Everything, for a person."""
    from rightrank.report.evidence_tables import table_lines
    from rightrank.report.format import visible

    ranks = sorted({candidate.rank for adapter in answer.adapters for candidate in adapter.candidates}, reverse=True)
    rows = [["adapter", "rank", "needs", *(f"at {rank}" for rank in ranks)]]
    for adapter in answer.adapters:
        best = {candidate.rank: candidate for candidate in reversed(adapter.candidates)}
        losses = {
            rank: f"{candidate.difference:+.4f}{'' if candidate.holds else '*'}" for rank, candidate in best.items()
        }
        cells = [losses.get(rank, "") for rank in ranks]
        rows.append([visible(Path(adapter.out).name), str(adapter.rank_before), str(adapter.rank), *cells])
    note = "(held-out, worse than the adapter itself by; * not shown to be within the margin)"
    return "\n".join([answer.sentence, "", *table_lines(rows), note, "", *answer.notes, "", f"adapters: {answer.out}"])


@click.command(
    "fleet",
    short_help="Bring many adapters to the smallest common rank.",
    epilog="Example: rightrank fleet tasks/first tasks/second --model ./model --data rows.jsonl --out common",
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
@click.option(
    "--set", "assignments", multiple=True, metavar="NAME=VALUE", help="A setting of select, such as seq_len=256."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def _fleet(margin: float | None, assignments: tuple[str, ...], as_json: bool, **asked: Any) -> None:
    """Find the smallest rank that all ADAPTERs can be truncated to without losing more than the margin, and write them."""
    settings = SelectSettings(**gather(None, assignments, {"margin": margin}))
    answer = fleet(**asked, settings=settings, notice=lambda line: click.echo(line, err=True))
    click.echo(json_line(answer) if as_json else _fleet_text(answer))


PLUGIN = Plugin(name="fleet", commands=[_fleet], functions={"fleet": fleet})
