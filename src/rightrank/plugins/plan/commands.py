"""`plan`: memory and time before any training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rightrank.cli.options import announce, comma, folders, garbage_kept, gather, names
from rightrank.schema.errors import SettingsError

if TYPE_CHECKING:
    from rightrank.schema.results import Plan

PLAN_OPTIONS = [
    click.option("--ranks", callback=comma, help="Ranks, such as 8,16 (default: powers of two, 1 to 512)."),
    click.option("--target-modules", callback=comma, help="Module names, or all-linear (default)."),
    click.option("--modules-to-save", callback=comma, help="Modules trained whole and saved with the adapter."),
    click.option("--layers-to-transform", callback=comma, help="Layer numbers, such as 26,27 (default: all)."),
    click.option("--use-dora", is_flag=True, default=None, help="DoRA: one trained magnitude per row."),
    click.option("--batch-size", type=int, help="Examples per batch (default 8)."),
    click.option("--seq-len", type=int, help="Tokens per example (default 512)."),
    click.option(
        "--dtype",
        shell_complete=names("bf16", "fp16", "fp32"),
        help="bf16 (default), fp16 or fp32: the frozen weights' type.",
    ),
    click.option("--gradient-checkpointing", is_flag=True, default=None, help="Recompute blocks in the backward pass."),
    click.option("--load-in-4bit", is_flag=True, default=None, help="Frozen weights in 4 bits."),
    click.option("--load-in-8bit", is_flag=True, default=None, help="Frozen weights in 8 bits."),
    click.option(
        "--optimizer", "--optim", "optimizer", help="adamw (default), adamw_fused, adamw_8bit, paged_adamw_8bit or sgd."
    ),
    click.option("--loss", help="full (default, as Trainer) or chunked (as `rightrank select`)."),
    click.option(
        "--calibrate", is_flag=True, default=None, help="Run a few real steps first, for the seconds per step."
    ),
    click.option("--strategy", help="Time and price of a whole selection by bracket or grid."),
    click.option("--steps", type=int, help="Optimizer steps of each training, for its time and price."),
    click.option("--price-per-hour", type=float, help="Price of an hour of this device."),
    click.option("--arms", type=int, help="Adapters trained in one pass over the frozen base (default 1)."),
    click.option("--device", help="Kernels and allocator of cuda (default) or cpu."),
    click.option("--memory", "memory_bytes", help="Memory budget, such as 24GiB (default: the CUDA device's)."),
    click.option(
        "--set", "assignments", multiple=True, metavar="NAME=VALUE", help="Any other setting; see docs/how-to/plan.md."
    ),
]


SELECT_NAMES = {
    "steps": "max_steps",
    "arms": "adapters_per_pass",
    "optimizer": "optim",
}  # of options that `select` has under another name


def _plan_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(PLAN_OPTIONS):
        command = option(command)
    return command


@click.command(
    short_help="Predict memory and time, and which ranks fit.",
    epilog="Example: rightrank plan ./model --ranks 8,16,64 --batch-size 4 --seq-len 768 --memory 24GiB",
)
@click.argument("model", shell_complete=folders)
@click.argument("data", required=False, type=click.Path(path_type=Path))
@_plan_options
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
        answer = _plan_of_step(model, values)
    else:
        announce("loading model and data, then tracing and measuring a step of `select`")
        answer = _plan_of_select(model, data, values)

    from rightrank.plugins.plan.table import plan_text

    click.echo(answer.model_dump_json() if as_json else plan_text(answer))
    return 1 if answer.memory_bytes is not None and answer.max_rank is None else 0


def _plan_of_step(model: str, values: dict[str, Any]) -> Plan:
    with garbage_kept():
        from rightrank import api
        from rightrank.schema.plan_settings import make_plan_settings

        return api.plan(model, settings=make_plan_settings(values))


def _plan_of_select(model: str, data: Path, values: dict[str, Any]) -> Plan:
    """The plan of a selection; options of a step that `select` has under another name get that name.

    Raises:
        SettingsError: an option of a step that `select` can't run.
    """
    from rightrank import api
    from rightrank.schema.settings import make_settings

    values = {SELECT_NAMES.get(name, name): value for name, value in values.items()}
    if values.pop("loss", "chunked") != "chunked":
        raise SettingsError("--loss: `rightrank select` takes the loss in chunks; leave out DATA or --loss")
    price, calibrate = values.pop("price_per_hour", None), bool(values.pop("calibrate", False))
    settings = make_settings(values)
    return api.plan_selection(model, data, settings=settings, price_per_hour=price, calibrate=calibrate)
