"""Blind judgements in place of a metric: pairs of answers for people or programs, and the decision on the choices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rightrank.runs.plugins import Plugin

if TYPE_CHECKING:
    import click

    from rightrank.plugins.judge.pairs import JudgedRun
    from rightrank.schema.decision import Decision


class Judge(Plugin):
    name = "judge"

    def commands(self) -> Sequence[click.Command]:
        from rightrank.plugins.judge import commands

        return [commands.judge]

    def functions(self) -> Mapping[str, Callable[..., Any]]:
        return {"judge": judge}

    def decide_rows(self, rows: str | Path | Iterable[Any], margin: float | None) -> tuple[Decision, list[str]] | None:
        from rightrank.plugins.judge.judgements import are_judgements, judgements_of, rows_of

        found = rows_of(rows)
        if not are_judgements(found):
            return None
        judgements, understood = judgements_of(found)
        from rightrank.plugins.judge.judgements import decide_judged

        return decide_judged(judgements, margin), understood


PLUGIN = Judge()


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
