"""Commands on results: a run folder, or finished trainings of any origin."""

from __future__ import annotations

import shlex
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from rightrank.cli.options import format_json, gather_settings, split_commas
from rightrank.schema.errors import SettingsError

# Trainings of SmolLM2-135M-Instruct on glosses of a dictionary: `glosses_long_400_steps` of the grids in benchmarks/selection
EXAMPLE_FILE = Path(__file__).with_name("example.csv")
EXAMPLE_ADVICE = "With your own table of the same columns: rightrank decide runs.csv"


@click.command("status", short_help="Show where a run stands.", epilog="Example: rightrank status run")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the status as one JSON object.")
def _status(run: Path, as_json: bool) -> None:
    """Report the state of RUN, while it runs or after its end. Nothing in the folder is written."""
    from rightrank.api import folders as api

    if as_json:
        click.echo(format_json(api.status(run).build_document()))
    else:
        click.echo(api.format_status(run, shutil.get_terminal_size().columns))


@click.command(
    "report", short_help="Write the report and figures of a run again.", epilog="Example: rightrank report run"
)
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the report's path as one JSON object.")
def _report(run: Path, as_json: bool) -> None:
    """Write report.html and the figures of RUN again, from its journal alone.

    While a selection runs, the report shows the results so far.
    """
    from rightrank.api import folders as api

    path = api.write_report(run)
    click.echo(format_json({"report": str(path)}) if as_json else str(path))


@click.command(
    "export",
    short_help="Write a server's files, or a merged model.",
    epilog="Example: rightrank export run --to vllm",
)
@click.argument("sources", nargs=-1, required=True, metavar="RUN_OR_ADAPTER...", type=click.Path(path_type=Path))
@click.option("--to", required=True, help="vllm, sglang, or merged.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="New folder (default: exports/TARGET, in the run's folder)."
)
@click.option("--base", help="The base model (default: the one that the run or the adapter names).")
@click.option(
    "--check",
    multiple=True,
    type=click.Path(path_type=Path),
    help="merged: held-out rows (default: the run's test split).",
)
@click.option("--type", "kind", help="merged: f32 (default), bf16 or f16.")
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="NAME=VALUE",
    help="merged: a setting of select, for an adapter folder.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
def _export(
    sources: tuple[Path, ...],
    to: str,
    out: Path | None,
    assignments: tuple[str, ...],
    as_json: bool,
    **arguments: Any,
) -> int:
    """Write the files with which a server serves adapters of runs or adapter folders, or merge one into its base model.

    A merged model is loaded back and compared with the adapter on its base. Exit status: 0 not worse, 3 worse by more
    than the margin or broken, 4 the examples cannot tell.
    """
    from rightrank.api import folders as api
    from rightrank.cli.adapter_commands import EXIT_STATUS
    from rightrank.runs.hooks import View
    from rightrank.schema.settings import SelectSettings

    settings = SelectSettings(**gather_settings(None, assignments, {})) if assignments else None
    with View() as view:
        exported = api.export(sources, to, out, settings=settings, on_event=view.on_event, **arguments)
    if as_json:
        click.echo(format_json(asdict(exported) | {"folder": str(exported.folder)}))
    else:
        for note in exported.notes:
            click.echo(f"note: {note}", err=True)
        click.echo(f"cd {shlex.quote(str(exported.folder))} && {exported.command}")
    return 0 if exported.check is None else EXIT_STATUS[exported.check["verdict"]]


def _parse_pairs(
    context: click.Context, parameter: click.Parameter, texts: str | tuple[str, ...] | None
) -> dict[str, str]:
    """Parse `--columns a=b,c=d` or `--where a=b --where c=d`."""
    pairs: dict[str, str] = {}
    for text in texts if isinstance(texts, tuple) else split_commas(context, parameter, texts) or []:
        name, equals, value = text.partition("=")
        if not equals or not name.strip() or (parameter.name == "columns" and not value.strip()) or name in pairs:
            raise click.BadParameter(f"{text!r}: give {parameter.metavar}, and each name once")
        pairs[name.strip()] = value.strip() if parameter.name == "columns" else value
    return pairs


@click.command(
    "decide",
    short_help="Decide on finished trainings of any origin.",
    epilog="Example: rightrank decide runs.csv --metric eval_loss --margin 0.005",
)
@click.argument("results", required=False, type=click.Path(path_type=Path))
@click.option("--example", is_flag=True, help="Decide on an example: 24 trainings of a real model.")
@click.option("--metric", help="Column of the held-out metric, or the name of the column `value`.")
@click.option(
    "--higher-is-better/--lower-is-better",
    default=None,
    help="The metric's direction (default: known for common metrics).",
)
@click.option(
    "--margin",
    help="Accepted loss of quality: a share of the gain over rank 0 such as 2% (default 1%), or a number in the metric's unit.",
)
@click.option(
    "--confidence",
    type=float,
    help="Name the smallest rank that is enough with this probability (default 0.6).",
)
@click.option(
    "--columns",
    callback=_parse_pairs,
    metavar="NAME=COLUMN",
    help="Columns with other names, such as rank=lora_r,value=eval_loss; group=document names the groups of examples.",
)
@click.option("--ignore", multiple=True, metavar="COLUMN", help="A column in which a difference does not matter.")
@click.option(
    "--where",
    multiple=True,
    callback=_parse_pairs,
    metavar="COLUMN=VALUE",
    help="Read only the rows with this value, such as model=gemma.",
)
@click.option(
    "--checkpoint",
    type=click.Choice(["last", "best"]),
    help="The evaluation of each training to compare, if there are several (default: that of the run, else the last).",
)
@click.option(
    "--report", type=click.Path(path_type=Path), help="For a table: write the full report to this .html file."
)
@click.option("--json", "as_json", is_flag=True, help="Print the decision as one JSON object.")
def _decide(results: Path | None, example: bool, report: Path | None, as_json: bool, **arguments: Any) -> None:
    """Decide on finished trainings of any origin.

    RESULTS is a CSV or JSONL file with `rank`, `value` and, if there are any, `lr`, `seed`, `std`, `item`; a run
    folder; or results of W&B, MLflow, Trainer or Optuna.
    """
    from rightrank.api import runs as api

    if (results is None) != example:
        raise SettingsError("give RESULTS, such as runs.csv, or --example alone to decide on an example")
    results = EXAMPLE_FILE if results is None else results
    result = api.decide(results, **arguments)
    if report is not None:
        if report.suffix != ".html":
            raise SettingsError(f"--report {report}: the report is a page; give a path that ends in .html")
        typed: list[str] = click.get_current_context().find_root().obj
        result.write_report(report, results.name, shlex.join(typed))
    if as_json:
        extra_fields = {
            "input_notes": result.input_notes,
            "next_command": result.next_command,
        }
        click.echo(format_json(result.decision.model_dump(mode="json") | extra_fields))
        return
    from rightrank.report.answer import format_decision
    from rightrank.report.format import make_visible

    width = shutil.get_terminal_size((100, 24)).columns
    click.echo(format_decision(result.decision, result.input_notes, width, result.next_commands))
    if result.decision.adapter_sentence is not None:
        click.echo(f"adapter: {make_visible(result.decision.adapter_sentence)}")
    if example:
        click.echo(f"\nexample:    {EXAMPLE_FILE}\n            24 trainings of SmolLM2-135M-Instruct. {EXAMPLE_ADVICE}")


COMMANDS = (_status, _report, _export, _decide)
