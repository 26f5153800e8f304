"""`plan`: memory and time before any training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import rightrank
from rightrank.cli.options import SettingsCommand, announce, folders, garbage_kept, gather, setting_options
from rightrank.schema.errors import SettingsError
from rightrank.schema.plan_settings import PlanSettings, make_plan_settings

if TYPE_CHECKING:
    from rightrank.schema.results import Plan


@click.command(
    cls=SettingsCommand,
    short_help="Predict memory and time, and which ranks fit.",
    epilog="Example: rightrank plan ./model --ranks 8,16,64 --batch-size 4 --seq-len 768 --memory 24GiB",
)
@click.argument("model", shell_complete=folders)
@click.argument("data", required=False, type=click.Path(path_type=Path))
@setting_options(PlanSettings)
@click.option(
    "--set", "assignments", multiple=True, metavar="NAME=VALUE", help="Any other setting; see docs/how-to/plan.md."
)
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="YAML file of settings.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as one JSON object.")
def plan(
    model: str,
    data: Path | None,
    config_file: Path | None,
    assignments: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> int:
    """Predict the memory of every rank and which ranks fit, from MODEL's config.json alone.

    MODEL is a folder that holds at least config.json, a GGUF file, or a hub name. With DATA, the plan is of `rightrank select
    MODEL DATA` with the same options, and the base is loaded. The exit status is 1 if there is a memory budget and no
    rank fits.
    """
    values = gather(config_file, assignments, options)
    if data is None:
        announce("tracing a step of the model, in shapes alone")
        with garbage_kept():
            answer = rightrank.plan(model, settings=make_plan_settings(values))
    else:
        announce("loading model and data, then tracing and measuring a step of `select`")
        answer = _plan_of_select(model, data, values)

    from rightrank.plugins.plan.table import plan_text

    click.echo(answer.model_dump_json() if as_json else plan_text(answer))
    return 1 if answer.memory_bytes is not None and answer.max_rank is None else 0


def _plan_of_select(model: str, data: Path, values: dict[str, Any]) -> Plan:
    """The plan of a selection.

    Raises:
        SettingsError: an option of a step that `select` can't run.
    """
    from rightrank.schema.settings import make_settings

    if values.pop("loss", "chunked") != "chunked":
        raise SettingsError("--loss: `rightrank select` takes the loss in chunks; leave out DATA or --loss")
    price, settings = values.pop("price_per_hour", None), make_settings(values)
    answer: Plan = rightrank.plan_selection(model, data, settings=settings, price_per_hour=price)
    return answer
