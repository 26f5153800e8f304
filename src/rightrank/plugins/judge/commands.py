"""`judge`: blind pairs for people or for a program."""

from __future__ import annotations

import json
from pathlib import Path

import click

import rightrank
from rightrank.cli.options import comma, whole_numbers


@click.command(
    short_help="Decide by blind judgements of people or a program.",
    epilog="Example: rightrank judge run --prompts 50, then: rightrank judge run --collect choices.json",
)
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--prompts", type=click.IntRange(min=2), default=50, show_default=True, help="Test prompts to answer.")
@click.option("--ranks", callback=comma, help="Ranks to judge against the reference (default: all of the run).")
@click.option("--command", help="Program that judges: it reads {file}, JSON lines with id, prompt, a and b.")
@click.option(
    "--collect", multiple=True, type=click.Path(path_type=Path), help="Choices that the page saved; may be repeated."
)
@click.option("--judge", help="Name of the judge (default: as the page saved it, or `command`).")
@click.option("--margin", type=float, help="How far below one half a win rate may be (default 0.05).")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the order of the pairs.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def judge(
    run: Path,
    prompts: int,
    ranks: list[str] | None,
    command: str | None,
    collect: tuple[Path, ...],
    judge: str | None,
    margin: float | None,
    seed: int,
    as_json: bool,
) -> None:
    """Let people or a program judge the answers of RUN's ranks, blind, and decide by their win rates.

    Without --command and --collect, RUN/judging/judge.html is a page to click through.
    """
    found = rightrank.judge(
        run,
        prompts=prompts,
        ranks=whole_numbers(ranks, "--ranks"),
        command=command,
        collect=collect,
        judge_name=judge,
        margin=margin,
        seed=seed,
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
