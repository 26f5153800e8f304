"""Commands on results: a run folder, or finished trainings of whoever ran them."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from rightrank.cli.options import collector_paused, comma, gather, json_line


@click.command("status", short_help="Show where a run stands.", epilog="Example: rightrank status run")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the status as one JSON object.")
def _status(run: Path, as_json: bool) -> None:
    """Report where RUN stands, from another terminal or after its end. Nothing in the folder is written."""
    from rightrank.api import runs as api
    from rightrank.report.status import status_lines

    with collector_paused():
        status = api.status(run)
    click.echo(json_line(status) if as_json else status_lines(status, shutil.get_terminal_size().columns))


@click.command(
    "report", short_help="Write the report and figures of a run again.", epilog="Example: rightrank report run"
)
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--figures", callback=comma, help="Write the figures in these formats too: pdf, png.")
@click.option("--json", "as_json", is_flag=True, help="Print the report's path as one JSON object.")
def _report(run: Path, figures: list[str] | None, as_json: bool) -> None:
    """Write report.html and the figures of RUN again, from its journal alone.

    While a selection runs, the report shows what is known so far.
    """
    from rightrank.api import runs as api

    path = api.write_report(run, figures or ())
    click.echo(json_line({"report": str(path)}) if as_json else str(path))


@click.command(
    "export",
    short_help="Write an adapter, or settings for a trainer or server.",
    epilog="Example: rightrank export run --to axolotl",
)
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--to", required=True, help="peft, trl, axolotl, llamafactory, unsloth, vllm, sglang, or merged.")
@click.option("--out", type=click.Path(path_type=Path), help="New folder to write (default: RUN/exports/TARGET).")
@click.option("--rank", type=int, help="Another rank of the run (default: the adapter handed over, and its training).")
@click.option("--push-to-hub", metavar="OWNER/NAME", help="peft: upload it with its card; a new repository is private.")
@click.option(
    "--check",
    multiple=True,
    type=click.Path(path_type=Path),
    help="merged: held-out rows (default: the run's test split).",
)
@click.option("--type", "kind", help="merged: f32 (default), bf16 or f16.")
@click.option("--base", help="Of an adapter folder in place of RUN (default: the base that it names).")
@click.option(
    "--set", "assignments", multiple=True, metavar="NAME=VALUE", help="With an adapter folder: a setting of select."
)
@click.option("--json", "as_json", is_flag=True, help="Print what was written as one JSON object.")
@click.option("--quiet", is_flag=True, help="Print no progress and no notes.")
def _export(
    run: Path,
    to: str,
    out: Path | None,
    assignments: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    **whole: Any,
) -> int:
    """Write what another program needs to train with RUN's rank or to serve its adapter.

    A merged model is loaded back and compared with the adapter over its base; RUN may be an adapter folder then. Exit
    status: 0 not worse, 3 worse by more than the margin or broken, 4 the examples cannot tell.
    """
    from rightrank.api import runs as api
    from rightrank.cli.adapter_commands import EXIT, progress_view
    from rightrank.schema.settings import SelectSettings

    settings = SelectSettings(**gather(None, assignments, {})) if assignments else None
    with progress_view(quiet) as view:
        exported = api.export(run, to, out, settings=settings, on_event=view.on_event, **whole)
    if as_json:
        click.echo(json_line(asdict(exported) | {"folder": str(exported.folder)}))
    else:
        for note in () if quiet else exported.notes:
            click.echo(f"note: {note}", err=True)
        click.echo(exported.address or f"cd {shlex.quote(str(exported.folder))} && {exported.command}")
    return 0 if exported.check is None else EXIT[exported.check["verdict"]]


@click.command(
    "repair", short_help="Keep the intact records of a damaged journal.", epilog="Example: rightrank repair run"
)
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print what was kept as one JSON object.")
def _repair(run: Path, as_json: bool) -> None:
    """Keep the intact records of RUN's damaged journal, and move the damaged lines to a file of their own.

    `rightrank select` with the same arguments then trains only what is missing.
    """
    from rightrank.api import runs as api

    repaired = api.repair(run)
    if as_json:
        aside = None if repaired.aside is None else str(repaired.aside)
        click.echo(json_line({"kept": repaired.kept, "set_aside": repaired.set_aside, "file": aside}))
    elif repaired.aside is None:
        click.echo(f"{run}: all {repaired.kept} records are intact; nothing was changed")
    else:
        click.echo(
            f"{run}: {repaired.kept} records kept; damaged lines moved to {repaired.aside}: {repaired.set_aside}"
        )


def _mapping(context: click.Context, parameter: click.Parameter, text: str | None) -> dict[str, str]:
    pairs = {}
    for value in comma(context, parameter, text) or []:
        name, equals, column = value.partition("=")
        if not equals or not column.strip():
            raise click.BadParameter(f"{value!r}: give NAME=COLUMN, such as rank=lora_r")
        pairs[name.strip()] = column.strip()
    return pairs


@click.command(
    "decide",
    short_help="Decide on finished trainings, whoever ran them.",
    epilog="Example: rightrank decide runs.csv --metric eval_loss --margin 0.005",
)
@click.argument("results", type=click.Path(path_type=Path))
@click.option("--metric", help="Column of the held-out metric, or the name of the column `value`.")
@click.option(
    "--higher-is-better/--lower-is-better", default=None, help="The metric's direction (default: that of a known name)."
)
@click.option(
    "--margin",
    type=float,
    help="How much worse than the best is still enough, in the metric's unit (default 0.005 nats a token, half a point of accuracy, else 1%).",
)
@click.option(
    "--confidence",
    type=float,
    help="Name the smallest rank that is enough with this probability (default 0.75).",
)
@click.option(
    "--columns",
    callback=_mapping,
    metavar="NAME=COLUMN",
    help="Columns of other names, such as rank=lora_r,value=eval_loss; group=document: which examples belong together.",
)
@click.option(
    "--checkpoint",
    type=click.Choice(["last", "best"]),
    help="Which evaluation of each training counts, where there are several; by default that of the run, else the last.",
)
@click.option(
    "--report", type=click.Path(path_type=Path), help="Of a table: write the whole report to this .html file."
)
@click.option("--json", "as_json", is_flag=True, help="Print the decision as one JSON object.")
def _decide(results: Path, report: Path | None, as_json: bool, **asked: Any) -> None:
    """Decide on finished trainings, whoever ran them.

    RESULTS is a CSV or JSONL file with `rank`, `value` and, if there are any, `lr`, `seed`, `std`, `item`; a run
    folder; or results of W&B, MLflow, Trainer or Optuna.
    """
    from rightrank.api import runs as api

    decided = api.decide(results, **asked)
    if report is not None:
        decided.write_report(report, results.name, _command_of(results, asked))
    if as_json:
        further = {
            "understood": decided.understood,
            "adapter_sentence": decided.adapter_sentence,
            "next_command": decided.next_command,
        }
        click.echo(json_line(decided.decision.model_dump(mode="json") | further))
        return
    from rightrank.report.format import visible
    from rightrank.report.terminal import decision_text

    width = shutil.get_terminal_size((100, 24)).columns
    click.echo(decision_text(decided.decision, decided.understood, width, decided.next_commands))
    if decided.adapter_sentence is not None:
        click.echo(f"adapter: {visible(decided.adapter_sentence)}")


def _command_of(results: Path, asked: Mapping[str, Any]) -> str:
    """The command that decides so again."""
    options: list[str] = []
    for name, value in asked.items():
        if name == "higher_is_better" and value is not None:
            options.append("--higher-is-better" if value else "--lower-is-better")
        elif value:
            text = ",".join(f"{key}={column}" for key, column in value.items()) if name == "columns" else str(value)
            options += [f"--{name}", text]
    return shlex.join(["rightrank", "decide", str(results), *options])


COMMANDS = (_status, _report, _export, _repair, _decide)
