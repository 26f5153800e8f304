"""`plan`: memory before any training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import rightrank
from rightrank.cli.options import SettingsCommand, announce, garbage_kept, gather, setting_options
from rightrank.schema.plan_settings import PlanSettings, make_plan_settings

if TYPE_CHECKING:
    from rightrank.schema.results import Plan


@click.command(
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
def plan(model: str, config_file: Path | None, assignments: tuple[str, ...], as_json: bool, **options: Any) -> int:
    """Predict the memory of every rank and which ranks fit, from MODEL's config.json alone.

    MODEL is a folder that holds at least config.json, a GGUF file, or a hub name. What a selection on your data will do and
    cost is `rightrank select MODEL DATA --dry-run`. The exit status is 1 if there is a memory budget and no rank fits.
    """
    values = gather(config_file, assignments, options)
    announce("tracing a step of the model, in shapes alone")
    with garbage_kept():
        answer: Plan = rightrank.plan(model, settings=make_plan_settings(values))

    from rightrank.plugins.plan.table import plan_text

    click.echo(answer.model_dump_json() if as_json else plan_text(answer))
    return 1 if answer.memory_bytes is not None and answer.max_rank is None else 0
