"""Blind judgements in place of a metric: pairs of answers for people or a program, and the decision on the choices."""

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
        from rightrank.plugins.judge.win_rate import decide_judged

        return decide_judged(judgements, margin), understood


PLUGIN = Judge()


def judge(
    run: str | Path,
    *,
    prompts: int = 50,
    ranks: Sequence[int] | None = None,
    command: str | None = None,
    collect: Sequence[str | Path] = (),
    judge_name: str | None = None,
    margin: float | None = None,
    seed: int = 0,
    timeout_seconds: float = 3600.0,
    notice: Callable[[str], None] = lambda _: None,
) -> JudgedRun:
    """Make blind pairs of the answers of a run's ranks, and decide on what people or a program chose.

    Args:
        run: a run folder whose data has `prompt` and `completion`.
        prompts: test prompts that every rank answers, when the pairs are made.
        ranks: to judge against the reference; None for all.
        command: a program that reads the pairs and prints `{"id": …, "outcome": "a"}`, `"b"` or `"tie"`, a line each.
        collect: files that the page saved.
        judge_name: in place of the name that the page saved, or of `command`.
        margin: how far below 1/2 a win rate may be; None for .05.
        seed: of the order of the pairs.
        timeout_seconds: for the program.
        notice: receives each line for a person.

    Raises:
        InputError: a run without two adapters or prompts, or choices that can't be used.
        RunError: the program failed.
    """
    from rightrank.plugins.judge.pairs import JudgeRequest, judge_run

    files = [Path(file) for file in collect]
    request = JudgeRequest(Path(run), prompts, ranks, command, files, judge_name, margin, seed, timeout_seconds, notice)
    return judge_run(request)
