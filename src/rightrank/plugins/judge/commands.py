"""`judge`: blind pairs for people or programs."""

from __future__ import annotations

import json
from pathlib import Path

import click

import rightrank


@click.command(
    short_help="Decide by blind judgements of people or programs.",
    epilog="Example: rightrank judge run --prompts 50, then: rightrank judge run --collect choices.json",
)
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--prompts", type=click.IntRange(min=2), default=50, show_default=True, help="Test prompts to answer.")
@click.option(
    "--collect", multiple=True, type=click.Path(path_type=Path), help="Choices that the page saved; may be repeated."
)
@click.option("--margin", type=float, help="How far below one half a win rate may be (default 0.05).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def judge(
    run: Path,
    prompts: int,
    collect: tuple[Path, ...],
    margin: float | None,
    as_json: bool,
) -> None:
    """Let people or programs judge the answers of RUN's ranks, blind, and decide by their win rates.

    Without --collect, RUN/judging/judge.html is a page to click through, and RUN/judging/pairs.jsonl the same for a program.
    """
    found = rightrank.judge(
        run,
        prompts=prompts,
        collect=collect,
        margin=margin,
        notice=lambda line: click.echo(line, err=True),
    )
    if as_json:
        files = {"page": str(found.page), "pairs": str(found.pairs), "count": found.count}
        files |= {"judgements": None if found.judgements is None else str(found.judgements)}
        decision = {} if found.decision is None else found.decision.model_dump(mode="json")
        click.echo(json.dumps({**decision, **files, "understood": found.understood}))
        return
    if found.decision is None:
        click.echo(
            f"{found.count} pairs to judge: open {found.page}, then `rightrank judge {run} --collect choices.json`"
        )
        return
    click.echo(found.decision.sentence)
    click.echo(f"verdict: {found.decision.verdict} ({', '.join(found.understood)})")
    click.echo(f"next:    {found.decision.next_run}")
