"""What others found before any training: public sweeps of ranks, counted. Nothing here enters what a selection tries or answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from rightrank.cli.options import comma, json_line, whole_numbers
from rightrank.plugins.atlas.counts import FAMILIES, Expectation, Question, ask, counted, group_of_metric
from rightrank.runs.plugins import Plugin

SHOWN = 5  # sources in the text; --json has all


def expect(
    model: str | None = None,
    data: str | Path | None = None,
    *,
    task: str | None = None,
    parameters: float | None = None,
    rows: int | None = None,
    metric: str | None = None,
    ranks: Sequence[int] | None = None,
    margin: float | None = None,
) -> Expectation:
    """What public sweeps found for models and data like these, before any training. No network.

    Args:
        model: its name has the size of the base.
        data: a `.jsonl` or `.csv` file, for its rows and the task family.
        task: the family, such as `language` or `classification`.
        parameters: of the base.
        rows: of training data.
        metric: `loss`, `accuracy` or another.
        ranks: of the answer; None for powers of two to 256.
        margin: in nats, as a share of answers, or as a share of another metric; None for the default of each sweep's metric.

    Raises:
        SettingsError: a number or rank that can't be, a family that is not there, or data that can't be read.
    """
    question, notes = ask(model, data, Question(task, group_of_metric(metric), parameters, rows, margin))
    return counted(question, ranks, notes)


@click.command(
    "expect",
    short_help="What public sweeps found for models and data like yours.",
    epilog="Example: rightrank expect Qwen/Qwen2.5-1.5B data.jsonl --task language",
)
@click.argument("model", required=False)
@click.argument("data", required=False, type=click.Path(path_type=Path))
@click.option("--task", metavar="FAMILY", help=f"{', '.join(FAMILIES[:-1])}, or {FAMILIES[-1]}.")
@click.option("--parameters", type=float, help="Of the base, such as 1.5e9 (default: by MODEL's name).")
@click.option("--rows", type=int, help="Training rows (default: those of DATA).")
@click.option("--metric", help="loss, accuracy, or another.")
@click.option("--ranks", callback=comma, help="Ranks to show (default: powers of two to 256).")
@click.option("--margin", type=float, help="As of `decide`: nats, a share of answers, or a share of another metric.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def _expect(ranks: list[str] | None, as_json: bool, **known: Any) -> None:
    """Say before any training in how many public sweeps each rank was enough, with their addresses.

    Every part may be left out. No network, no model and no GPU. What your data need is what `select` measures.
    """
    answer = expect(**known, ranks=whole_numbers(ranks, "--ranks"))
    click.echo(json_line(asdict(answer)) if as_json else _text(answer))


def _text(answer: Expectation) -> str:
    counts = [f"{rank['rank']:>6}   {rank['enough_in']:>4} of {rank['of']}" for rank in answer.ranks]
    sources = [f"  {sweeps:>3}   {address}" for address, sweeps in list(answer.sources.items())[:SHOWN]]
    return "\n".join(
        [
            f"{answer.sweeps} public sweeps like yours ({answer.like}), and in how many of those that say each rank was enough:",
            f"{'rank':>6}   enough in",
            *counts,
            "sweeps, and where they were published:",
            *sources,
            f"  of {len(answer.sources)} sources; --json has all",
            *answer.notes,
            "other people's sweeps: `rightrank select` measures what your data need",
        ]
    )


PLUGIN = Plugin(name="atlas", commands=[_expect], functions={"expect": expect})
