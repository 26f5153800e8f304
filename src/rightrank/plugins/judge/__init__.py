"""Blind judgements in place of a metric: pairs of answers for people or programs, and the decision on the choices."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rightrank.runs.plugins import Plugin

if TYPE_CHECKING:
    from rightrank.data.rows import Row
    from rightrank.plugins.judge.pairs import JudgedRun
    from rightrank.schema.decision import Decision


def judge(
    run: str | Path,
    *,
    prompts: int = 50,
    collect: Sequence[str | Path] = (),
    margin: float | None = None,
    notice: Callable[[str], None] = lambda _: None,
) -> JudgedRun:
    """Make blind pairs of the answers of a run's ranks, and decide on what people or programs chose.

    Args:
        run: a run folder whose data has `prompt` and `completion`.
        prompts: test prompts that every rank answers, when the pairs are made.
        collect: files that the page saved, or a program wrote: `{"judge": NAME, "choices": {ID: "a", "b" or "tie"}}`.
        margin: how far below 1/2 a win rate may be; None for .05.
        notice: receives each line for a person.

    Raises:
        InputError: a run without two adapters or prompts, or choices that can't be used.
    """
    from rightrank.plugins.judge.pairs import judge_run

    return judge_run(Path(run), prompts, [Path(file) for file in collect], margin, notice)


@click.command(
    "judge",
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
def _judge(run: Path, as_json: bool, **asked: Any) -> None:
    """Let people or programs judge the answers of RUN's ranks, blind, and decide by their win rates.

    Without --collect, RUN/judging/judge.html is a page to click through, and RUN/judging/pairs.jsonl the same for a program.
    """
    judged = judge(run, **asked, notice=lambda line: click.echo(line, err=True))
    if as_json:
        files = {"page": str(judged.page), "pairs": str(judged.pairs), "count": judged.count}
        files |= {"judgements": None if judged.judgements is None else str(judged.judgements)}
        decision = {} if judged.decision is None else judged.decision.model_dump(mode="json")
        click.echo(json.dumps({**decision, **files, "understood": judged.understood}))
        return
    if judged.decision is None:
        click.echo(
            f"{judged.count} pairs to judge: open {judged.page}, then `rightrank judge {run} --collect choices.json`"
        )
        return
    click.echo(judged.decision.sentence)
    click.echo(f"verdict: {judged.decision.verdict} ({', '.join(judged.understood)})")
    click.echo(f"next:    {judged.decision.next_run}")


def _decide_rows(rows: Sequence[Row], margin: float | None) -> tuple[Decision, list[str]] | None:
    """The decision on rows of judgements."""
    if not rows or not {"rank_a", "rank_b"} <= rows[0].fields.keys():
        return None
    from rightrank.plugins.judge.judgements import decide_judged, judgements_of

    judgements, understood = judgements_of(rows)
    return decide_judged(judgements, margin), understood


PLUGIN = Plugin(name="judge", commands=[_judge], functions={"judge": judge}, decide_rows=_decide_rows)
