"""What fits, before any weight is loaded: the memory of every rank.

skeleton (the model without weights) → trace (what the real step allocates there) → peak (the most at one time) → estimate (every
rank from two traces) → planner (the plan, and the ranks of a `select` that fit).
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import click

from rightrank.cli.options import SettingsCommand, announce, collector_paused, gather, json_line, setting_options
from rightrank.models.ranks import LARGE_RANK, rank_change_line, rate_warning
from rightrank.report.format import size
from rightrank.runs.plugins import Plugin
from rightrank.schema.command import arguments_of
from rightrank.schema.plan_settings import PlanSettings
from rightrank.schema.setting_table import given_values

SILENT_SECONDS = 2.0  # after which `plan` says what it traces

if TYPE_CHECKING:
    from rightrank.schema.keywords import PlanKeywords
    from rightrank.schema.results import Plan, RankPlan


def plan(
    model: str,
    *,
    settings: PlanSettings | None = None,
    on_progress: Callable[[str], None] = lambda _: None,
    **keywords: Unpack[PlanKeywords],
) -> Plan:
    """Predict parameters and memory of every rank, without weights and before any training.

    Args:
        model: a folder that holds at least `config.json`, a GGUF file, or a hub name.
        settings: see `PlanSettings`; None for the defaults. Without `memory_bytes` the budget is the memory of the
            CUDA device, if there is one.
        on_progress: receives what is traced next; a model of billions of parameters takes seconds.
        keywords: the command's options by name, such as `ranks=(8, 16), memory_bytes="24GiB"`; they override `settings`.

    Raises:
        InputError: the model, its modules, a rank or a length can't be used.
    """
    from rightrank.models.places import require_model

    settings = PlanSettings(**given_values(settings) | keywords)
    require_model(model)  # before what brings torch
    from rightrank.models.base_models import device_memory
    from rightrank.plugins.plan.planner import plan_config
    from rightrank.plugins.plan.skeleton import read_config

    if settings.memory_bytes is None and settings.device == "cuda":
        settings = settings.model_copy(update={"memory_bytes": device_memory()})
    config = read_config(model, settings.trust_remote_code, settings.num_labels is not None)
    return plan_config(config, model, settings, on_progress)


@click.command(
    "plan",
    cls=SettingsCommand,
    short_help="Predict memory, and which ranks fit.",
    epilog="Example: rightrank plan ./model --ranks 8,16,64 --batch-size 4 --seq-len 768 --memory 24GiB",
)
@click.argument("model")
@setting_options(PlanSettings)
@click.option(
    "--set", "assignments", multiple=True, metavar="NAME=VALUE", help="Any other setting; see docs/how-to/plan.md."
)
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="YAML file of settings.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as one JSON object.")
def _plan(model: str, config_file: Path | None, assignments: tuple[str, ...], as_json: bool, **options: Any) -> int:
    """Predict the memory of every rank and which ranks fit, from MODEL's config.json alone.

    MODEL is a folder that holds at least config.json, a GGUF file, or a hub name. What a selection on your data will do and
    cost is `rightrank select MODEL DATA --dry-run`. The exit status is 1 if there is a memory budget and no rank fits.
    """
    values = gather(config_file, assignments, options)
    announce("tracing a step of the model, in shapes alone")
    begun = time.monotonic()

    def say(text: str) -> None:
        if time.monotonic() - begun > SILENT_SECONDS:
            click.echo(f"{text} …", err=True)

    with collector_paused():
        answer: Plan = plan(model, settings=PlanSettings(**values), on_progress=say)
    click.echo(json_line(answer) if as_json else _plan_text(answer))
    return 1 if answer.memory_bytes is not None and answer.max_rank is None else 0


def _plan_text(plan: Plan) -> str:
    """The whole plan in plain lines."""
    from rightrank.report.evidence_tables import table_lines

    heads = ["rank", "parameters", "adapter", "peak", "reserved", "with headroom", "TFLOP/step"]
    heads += ["fits"] * (plan.memory_bytes is not None)
    last = plan.ranks[-1]
    components = (f"{name.replace('_', ' ')} {size(count)}" for name, count in last.components.items() if count)
    parts = [
        f"{plan.architecture}: {plan.base_parameters:,} parameters, {size(plan.base_bytes)} of weights; "
        f"{plan.targets} adapted matrices",
        "",
        *table_lines([heads, *map(_row, plan.ranks)]),
        "",
        f"rank {last.rank}, at its peak ({last.peak_at}):",
        "  " + ", ".join(components),
        "",
        *_answer(plan),
        *(f"note: {note}" for note in plan.notes),
    ]
    return "\n".join(parts)


def _row(row: RankPlan) -> list[str]:
    cells = [
        str(row.rank),
        f"{row.trainable_parameters:,}",
        size(row.adapter_bytes),
        size(row.peak_bytes),
        size(row.peak_reserved_bytes),
        size(row.needed_bytes),
        f"{row.flops_per_step / 1e12:.3g}",
    ]
    return cells if row.fits is None else [*cells, "yes" if row.fits else "no"]


def _answer(plan: Plan) -> Iterator[str]:
    last = plan.ranks[-1].rank
    yield (
        f"peak: {plan.source}, ±{plan.error_share:.0%}; needed in addition: {size(plan.context_bytes)} for the process, "
        "assumed, and headroom"
    )
    if plan.memory_bytes is not None:
        yield _fits_line(plan, plan.memory_bytes)
    if len(plan.ranks) > 1:
        yield f"learning rate, {rank_change_line(plan.ranks[0].rank, last)}"
    if last >= LARGE_RANK:
        yield rate_warning(last, 2 * last)


def _fits_line(plan: Plan, memory: int) -> str:
    if plan.max_rank is None:
        rows = PlanSettings.model_fields
        changes = shlex.join(
            word for name, value in plan.changes.items() for word in arguments_of(name, rows[name], value)
        )
        advice = f"it fits with {changes}" if changes else "no change of the step is enough"
        return f"no requested rank fits in {size(memory)}; rank {plan.ranks[0].rank}: {advice}"
    possible = ""
    if plan.largest_possible_rank != plan.max_rank:
        possible = f" (largest of all ranks: {plan.largest_possible_rank})"
    return f"largest requested rank that fits in {size(memory)}: {plan.max_rank}{possible}"


PLUGIN = Plugin(
    name="plan",
    commands=[_plan],
    functions={"plan": plan},
    memory_plan=lambda *selection: import_module("rightrank.plugins.plan.planner").plan_loaded(*selection),
)
