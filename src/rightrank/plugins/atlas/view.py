"""The expectation for a person: `rightrank expect`, its picture, the lines of a selection, and the row that a run gives back."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import click

import rightrank
from rightrank.cli.options import comma, whole_numbers
from rightrank.models.ranks import LARGE_RANK, rank_change_line, rate_warning
from rightrank.plugins.atlas.estimate import Expectation, Question, expectation, of_run
from rightrank.plugins.atlas.rows import FAMILIES
from rightrank.report.figure import Axis, Figure, Series, rank_axis

if TYPE_CHECKING:
    from rightrank.decision.run import Records
    from rightrank.schema.events import RunStarted

BAR = 20  # letters of a probability of 1


@click.command(
    short_help="What public sweeps found for models and data like yours.",
    epilog="Example: rightrank expect Qwen/Qwen2.5-1.5B data.jsonl --task language",
)
@click.argument("model", required=False)
@click.argument("data", required=False, type=click.Path(path_type=Path))
@click.option("--task", metavar="FAMILY", help=f"{', '.join(FAMILIES[:-1])}, or {FAMILIES[-1]}.")
@click.option("--parameters", type=float, help="Of the base, such as 1.5e9 (default: by MODEL's name or weights).")
@click.option("--rows", type=int, help="Training rows (default: those of DATA).")
@click.option("--tokens", type=float, help="Trained on, all epochs (default: about those of DATA).")
@click.option("--metric", help="loss, accuracy, or another.")
@click.option("--ranks", callback=comma, help="Ranks to show (default: powers of two to 256).")
@click.option("--margin", type=float, help="As of `decide`: nats, a share of answers, or a share of another metric.")
@click.option("--plot", "plot_file", type=click.Path(path_type=Path), help="Write the picture to this .svg file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def expect(ranks: list[str] | None, plot_file: Path | None, as_json: bool, **known: Any) -> None:
    """Say before any training how often each rank was enough in public sweeps, with the most alike and their addresses.

    Every part may be left out. No network, no model and no GPU. A start of a search: the answer is what `select` measures.
    """
    found: Expectation = rightrank.expect(**known, ranks=whole_numbers(ranks, "--ranks"))
    if plot_file is not None:
        from rightrank.report.svg import write_plot

        write_plot(figure_of(found), plot_file)
    click.echo(json.dumps(asdict(found)) if as_json else _text(found))


def _text(found: Expectation) -> str:
    """Everything, with the picture."""
    bars = [
        f"{rank.rank:>6}   {f'{rank.enough_in} of {rank.of}':>10}   {'█' * round(BAR * rank.probability):<{BAR}} "
        f"{rank.probability:.0%} ({rank.low:.0%} to {rank.high:.0%})"
        for rank in found.ranks
    ]
    nearest = [
        f"  {'more than ' + str(row['ranks'][-2]) if row['rank'] is None else row['rank']} of {', '.join(map(str, row['ranks']))}: "
        f"{row['base']}, {row['task']} ({row['not_tuned'] or 'rates by rank, with seeds'}) {row['source']}"
        for row in found.nearest
    ]
    return "\n".join(
        [
            sentence(found),
            f"{'rank':>6}   {'enough in':>10}   chance, over all sweeps",
            *bars,
            f"start at rank {found.start_rank}, top {found.top_rank}; a start, not a bound: `rightrank select` measures it on your data",
            *(["the most alike, one a source, with the smallest rank that was enough:"] if nearest else []),
            *nearest,
            *found.notes,
            rank_change_line(16, 64),
            *([rate_warning()] if found.ranks[-1].rank >= LARGE_RANK else []),
        ]
    )


def sentence(found: Expectation) -> str:
    """The counts, for people: a rank that was enough in half, in three quarters, in nine of ten."""
    told = [rank for rank in found.ranks if rank.of]
    wanted = {next((r.rank for r in told if r.enough_in >= share * r.of), None): share for share in (0.9, 0.75, 0.5)}
    counts = [f"rank {r.rank} was enough in {r.enough_in} of the {r.of} that say" for r in told if r.rank in wanted]
    where = f"{found.sweeps} public sweeps" + (
        f" like yours ({found.like})" if found.like != "all of the atlas" else ""
    )
    return f"In {where}, " + ("; ".join(counts) if counts else "no rank was tried that says") + "."


def figure_of(found: Expectation) -> Figure:
    """The chance of each rank."""
    ranks = tuple(rank.rank for rank in found.ranks)
    chances = Series(
        "chance that the rank is enough, 90% interval",
        ranks,
        tuple(rank.probability for rank in found.ranks),
        tuple(rank.low for rank in found.ranks),
        tuple(rank.high for rank in found.ranks),
    )
    return Figure(
        name="expected_rank",
        title="Before any training: how often each rank was enough in public sweeps",
        alt=sentence(found),
        x=rank_axis(ranks),
        y=Axis("chance", limits=(0, 1)),
        series=(chances,),
        columns=("rank", "enough_in", "of", "probability", "low", "high"),
        rows=tuple((r.rank, r.enough_in, r.of, r.probability, r.low, r.high) for r in found.ranks),
    )


def outlook(started: RunStarted, measured: int | None) -> list[str]:
    """A line for a selection: before it, and with what was measured. Nothing of a custom trainer's metric is in the atlas."""
    question = of_run(started)
    if question.kind == "other" or started.is_own:
        return []
    likely = _start_rank(question)
    if measured is not None:
        return [f"before: {likely} likely; measured: {measured}"]
    return [f"before: rank {likely} was enough in half of the public sweeps; a start, not a bound (`rightrank expect`)"]


@cache
def _start_rank(question: Question) -> int:
    """Asked at each line that a run shows."""
    return expectation(question).start_rank


def atlas_row(records: Records) -> dict[str, Any]:
    """The run as a row of the atlas: figures and counts, no data, no names of files.

    A rank has its best rate's mean over seeds, of direct trainings of the deciding metric on the validation split.
    """
    from rightrank.decision.run import checkpoint_of  # `expect` needs none of it and answers at once

    started = records.started
    question = of_run(started)
    trials = [t for t in records.finished() if t.rank > 0 and t.arm.is_direct and t.value_metric is None]
    values: dict[int, dict[float, list[float]]] = {}
    for trial in sorted(trials, key=lambda t: t.rank):
        values.setdefault(trial.rank, {}).setdefault(trial.learning_rate, []).append(trial.value)
    best = max if started.higher_is_better else min
    by_rank = {rank: best((fmean(found), len(found)) for found in rates.values()) for rank, rates in values.items()}
    return {
        "family": question.family,
        "form": started.data.form,
        "metric": started.metric,
        "kind": question.kind,
        "better": "high" if started.higher_is_better else "low",
        "rows": question.rows,
        "tokens": question.tokens,
        "steps": max((t.steps for t in trials), default=None),
        "alpha": f"{started.settings.get('lora_alpha')}, {started.settings.get('scaling')}",
        "ranks": list(by_rank),
        "values": [round(value, 5) for value, _ in by_rank.values()],
        "seeds": min((seeds for _, seeds in by_rank.values()), default=0),
        "tuned": min(map(len, values.values()), default=0) > 1,
        "checkpoint": checkpoint_of(started),
        "rightrank_version": started.rightrank_version,
    }
