"""`status`, `watch`, `doctor` and `completion`."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

import click

SHELLS = ("bash", "zsh", "fish")


@click.command(short_help="Show where a run stands.", epilog="Example: rightrank status run")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the status as one JSON object.")
def status(run: Path, as_json: bool) -> None:
    """Report where RUN stands, from another terminal or after its end. Nothing in the folder is written."""
    from rightrank import api
    from rightrank.report.status_text import status_lines

    found = api.status(run)
    if as_json:
        click.echo(found.model_dump_json())
    else:
        click.echo(status_lines(found, shutil.get_terminal_size().columns, colour=False))


@click.command(short_help="Follow a run from another terminal.", epilog="Example: rightrank watch run --interval 5")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--interval", type=click.FloatRange(min=0.1), default=2.0, show_default=True, help="Seconds between updates."
)
def watch(run: Path, interval: float) -> None:
    """Follow RUN from another terminal until it is done or no process works on it."""
    try:
        _follow(run, interval)
    except KeyboardInterrupt:
        click.echo(f"\nstopped watching; the selection in {run} is not affected", err=True)
        raise click.exceptions.Exit(130) from None


def _follow(run: Path, interval: float) -> None:
    """Show the status of RUN until no process works on it."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from rightrank import api
    from rightrank.report.status_text import status_lines

    console = Console()
    plain = not console.is_terminal or console.no_color
    shown = ""
    with Live(console=console, auto_refresh=False, transient=False) as live:
        while True:
            found = api.status(run)
            text = status_lines(found, console.width, colour=not plain)
            if plain and text != shown:
                click.echo(text)
            elif not plain:
                live.update(Text.from_ansi(text), refresh=True)
            shown = text
            if found.state != "running":
                return
            time.sleep(interval)


@click.command(short_help="Show versions, device, memory, disk and extras.", epilog="Example: rightrank doctor --json")
@click.option("--json", "as_json", is_flag=True, help="Print what was found as one JSON object.")
def doctor(as_json: bool) -> None:
    """Show versions, device, memory, disk, extras and writable places on one screen."""
    from rightrank import api
    from rightrank.report.doctor_text import doctor_text

    found = api.doctor()
    click.echo(found.model_dump_json() if as_json else doctor_text(found))


@click.command(
    short_help="Print the completion script for a shell.", epilog='Example: eval "$(rightrank completion bash)"'
)
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print the completion script for SHELL; source it in the shell's start file."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None, "click knows the shells of the choice"
    click.echo(kind(click.get_current_context().find_root().command, {}, "rightrank", "_RIGHTRANK_COMPLETE").source())
    sys.stdout.flush()
