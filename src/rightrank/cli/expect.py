"""The command `expect`, and its text."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from rightrank.atlas import expect
from rightrank.atlas.counts import ALL_SWEEPS, FAMILIES, TOP_RANK, Expectation
from rightrank.cli.options import format_json, parse_integers, split_commas


@click.command(
    "expect",
    short_help="Count what public sweeps found for similar models and data.",
    epilog="Example: rightrank expect Qwen/Qwen2.5-1.5B data.jsonl --task language",
)
@click.argument("model", required=False)
@click.argument("data", required=False, type=click.Path(path_type=Path))
@click.option("--task", metavar="FAMILY", help=f"chat, {', '.join(FAMILIES[:-1])}, or {FAMILIES[-1]}.")
@click.option("--rows", type=int, help="Number of training rows (default: the rows of DATA).")
@click.option("--metric", help="loss, accuracy, or another.")
@click.option("--ranks", callback=split_commas, help="Ranks to show (default: powers of two to 256).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def _expect(ranks: list[str] | None, as_json: bool, **inputs: Any) -> None:
    """Count in how many public sweeps each rank was enough. `--json` lists the sources.

    All arguments are optional, and DATA may stand alone. Needs no network, model or GPU. To measure what your own data
    need, run `rightrank select`.
    """
    expectation = expect(**inputs, ranks=parse_integers(ranks, "--ranks"))
    click.echo(format_json(asdict(expectation)) if as_json else _format_expectation(expectation))


def _format_expectation(answer: Expectation) -> str:
    counts = [f"{rank['rank']:>6}   {rank['enough_in']:>4} of {rank['of']}" for rank in answer.ranks]
    opening = f"{answer.sweeps} public sweeps are similar to yours ({answer.like})."
    if answer.like == ALL_SWEEPS:
        opening = (
            f"These are all {answer.sweeps} public sweeps; MODEL, DATA, --task and --rows select those like yours."
        )
    return "\n".join(
        [
            f"{opening} How often each rank was enough, among the sweeps that can judge it:",
            f"{'rank':>6}   enough in",
            *counts,
            *(f"note: {note}" for note in answer.notes),
            f"next: train once at rank {TOP_RANK}, with a search of the learning rate, and keep the smallest adapter that is as good:",
            f"  {answer.next_command}",
        ]
    )


COMMANDS = [_expect]
