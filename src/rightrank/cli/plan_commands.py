"""Commands before a training: `expect` and `plan`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rightrank.adapters.rank_math import format_rank_change
from rightrank.atlas import expect
from rightrank.atlas.counts import ALL_SWEEPS, FAMILIES, TOP_RANK, Expectation
from rightrank.cli.options import (
    SettingsCommand,
    add_setting_options,
    announce,
    format_json,
    gather_settings,
)
from rightrank.report.format import format_bytes
from rightrank.schema.settings import PlanSettings

if TYPE_CHECKING:
    from rightrank.schema.results import Plan, RankPlan


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
@click.option("--ranks", help="Ranks to show (default: powers of two to 256).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def _expect(ranks: str | None, as_json: bool, **inputs: Any) -> None:
    """Count in how many public sweeps each rank was enough. `--json` lists the sources.

    All arguments are optional, and DATA may stand alone. Needs no network, model or GPU. To measure what your own data
    need, run `rightrank select`.
    """
    expectation = expect(**inputs, ranks=None if ranks is None else PlanSettings(ranks=ranks).ranks)
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


@click.command(
    "plan",
    cls=SettingsCommand,
    short_help="Predict memory, and which ranks fit.",
    epilog="Example: rightrank plan ./model --ranks 8,16,64 --batch-size 4 --seq-len 768 --memory 24GiB",
)
@click.argument("model")
@add_setting_options(PlanSettings)
@click.option(
    "--set", "assignments", multiple=True, metavar="NAME=VALUE", help="Any other setting; see docs/how-to/plan.md."
)
@click.option("--json", "as_json", is_flag=True, help="Print the plan as one JSON object.")
def _plan(model: str, assignments: tuple[str, ...], as_json: bool, **options: Any) -> int:
    """Predict the memory of every rank and which ranks fit, from MODEL's config.json alone.

    MODEL is a folder that holds at least config.json, a GGUF file, or a hub name. To plan a selection on your data and estimate its
    cost, run `rightrank select MODEL DATA --dry-run`. The exit status is 1 if there is a memory budget and no rank fits.
    """
    from rightrank.planning import plan

    values = gather_settings(None, assignments, options)
    announce("tracing a training step of the model without weights")
    result = plan(model, settings=PlanSettings(**values))
    click.echo(format_json(result) if as_json else _format_plan(result))
    return 1 if result.memory_bytes is not None and result.max_rank is None else 0


def _format_plan(plan: Plan) -> str:
    from rightrank.report.format import format_table

    heading = ["rank", "parameters", "adapter", "peak", "reserved", "with headroom", "TFLOP/step"]
    heading += ["fits"] * (plan.memory_bytes is not None)
    largest = plan.ranks[-1]
    components = (
        f"{name.replace('_', ' ')} {format_bytes(count)}" for name, count in largest.components.items() if count
    )
    lines = [
        f"{plan.architecture}: {plan.base_parameters:,} parameters, {format_bytes(plan.base_bytes)} of weights; "
        f"{plan.targets} adapted matrices",
        "",
        *format_table([heading, *map(_format_row, plan.ranks)]),
        "",
        f"rank {largest.rank}, at its peak:",
        "  " + ", ".join(components),
        "",
        *_format_answer(plan),
        *(f"note: {note}" for note in plan.notes),
    ]
    return "\n".join(lines)


def _format_row(row: RankPlan) -> list[str]:
    cells = [
        str(row.rank),
        f"{row.trainable_parameters:,}",
        format_bytes(row.adapter_bytes),
        format_bytes(row.peak_bytes),
        format_bytes(row.peak_reserved_bytes),
        format_bytes(row.needed_bytes),
        f"{row.flops_per_step / 1e12:.3g}",
    ]
    return cells if row.fits is None else [*cells, "yes" if row.fits else "no"]


def _format_answer(plan: Plan) -> Iterator[str]:
    yield (
        f"peak: ±{plan.error_share:.0%}; with headroom also includes an assumed {format_bytes(plan.context_bytes)} for the process"
    )
    if plan.memory_bytes is not None and plan.max_rank is not None:
        yield f"largest requested rank that fits in {format_bytes(plan.memory_bytes)}: {plan.max_rank}"
    low, high = plan.learning_rates
    yield f"learning rates to begin with: {low:g} and {high:g}"
    if len(plan.ranks) > 1:
        yield f"learning rate, {format_rank_change(plan.ranks[0].rank, plan.ranks[-1].rank)}"


COMMANDS = (_expect, _plan)
