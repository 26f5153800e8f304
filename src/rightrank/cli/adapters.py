"""`inspect`, `resize`, `allocate` and `compare` (a gate for CI): commands on adapters."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rightrank.cli.options import SettingsCommand, announce, comma, gather, setting_options, whole_numbers
from rightrank.schema.errors import SettingsError
from rightrank.schema.settings import SelectSettings

if TYPE_CHECKING:
    from rightrank.hooks.process import JsonLog
    from rightrank.hooks.terminal import View

EXIT = {"not_worse": 0, "worse": 3, "cannot_tell": 4}


@click.command(
    "inspect",
    short_help="Show the singular spectrum of an adapter's modules.",
    epilog="Example: rightrank inspect run/adapter --plot spectrum.svg",
)
@click.argument("adapter", required=False, type=click.Path(path_type=Path))
@click.option("--base", type=click.Path(path_type=Path), help="With --finetuned: the base model's folder.")
@click.option(
    "--finetuned", type=click.Path(path_type=Path), help="Fully fine-tuned model folder, compared with --base."
)
@click.option("--gradient", nargs=2, metavar="MODEL DATA", help="Inspect the gradient at initialisation instead.")
@click.option("--set", "assignments", multiple=True, metavar="NAME=VALUE", help="With --gradient: a setting of select.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the effective rank by layer to this .svg file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def _inspect(
    gradient: tuple[str, str] | None,
    assignments: tuple[str, ...],
    plot: Path | None,
    as_json: bool,
    **places: Path | None,
) -> None:
    """Show the singular spectrum of every module of a LoRA ADAPTER.

    With --base A --finetuned B: of every matrix that full fine-tuning changed. With --gradient MODEL DATA: of the
    gradient of the loss before any training.
    """
    from rightrank.api import adapters as api
    from rightrank.report.adapters import inspection_text, layer_figure
    from rightrank.report.svg import write_plot

    if gradient is not None:
        if any(place is not None for place in places.values()):
            raise SettingsError("--gradient can't be combined with an adapter, --base or --finetuned: leave them out")
        from rightrank.adapters.checkpoints import inspect_gradient

        found = inspect_gradient(gradient[0], Path(gradient[1]), SelectSettings(**gather(None, assignments, {})))
    elif assignments:
        raise SettingsError("--set needs --gradient MODEL DATA: give both, or leave it out")
    else:
        found = api.inspect(**places)
    if plot is not None:
        write_plot(layer_figure(found.modules), plot)
    click.echo(found.model_dump_json() if as_json else inspection_text(found))


@click.command(
    "resize",
    short_help="Write an adapter at another rank, with what it loses.",
    epilog="Example: rightrank resize run/adapter small --data held_out.jsonl --margin 0.005",
)
@click.argument("adapter", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--rank", type=int, help="One rank for all modules; a rank above the present one pads.")
@click.option("--energy", type=float, help="Per module, the fewest singular values with this fraction of the energy.")
@click.option(
    "--data", type=click.Path(path_type=Path), help="The smallest rank that is enough on held-out rows of this file."
)
@click.option(
    "--train",
    type=click.Path(path_type=Path),
    help="With --data: what the adapter was trained on; these rows are not scored.",
)
@click.option(
    "--margin",
    type=float,
    help="With --data: how much worse than the best is still enough (default 0.005 nats a token).",
)
@click.option("--ranks", callback=comma, help="With --data: ranks to measure (default: powers of two).")
@click.option("--base", help="With --data: the base model (default: the one that the adapter names).")
@click.option("--uniform", is_flag=True, help="With --energy: one rank for all modules, the largest needed.")
@click.option("--set", "assignments", multiple=True, metavar="NAME=VALUE", help="With --data: a setting of select.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--quiet", is_flag=True, help="Print no progress.")
@click.option("--log-json", is_flag=True, help="Log progress to stderr, one JSON object per line.")
def _resize(
    adapter: Path,
    out: Path,
    margin: float | None,
    ranks: list[str] | None,
    assignments: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    log_json: bool,
    **rule: Any,
) -> None:
    """Write ADAPTER to OUT at another rank and report the truncation error."""
    from rightrank.api import adapters as api
    from rightrank.report.adapters import resized_text

    needing = {
        "--margin": margin,
        "--ranks": ranks,
        "--set": assignments,
        "--train": rule["train"],
        "--base": rule["base"],
    }
    alone = next((option for option, value in needing.items() if value), None)
    if alone is not None and rule["data"] is None:
        raise SettingsError(f"{alone} goes with --data FILE, which was not given; give both, or leave it out")
    with _view(quiet, log_json) as view:
        resized = api.resize(
            adapter,
            out,
            ranks=whole_numbers(ranks, "--ranks"),
            settings=SelectSettings(**gather(None, assignments, {"margin": margin})),
            on_event=view.on_event,
            **rule,
        )
    click.echo(resized.model_dump_json() if as_json else resized_text(resized))


def _view(quiet: bool, log_json: bool) -> AbstractContextManager[View | JsonLog]:
    """What shows the progress of evaluations on stderr."""
    from rightrank.hooks.process import JsonLog
    from rightrank.hooks.terminal import make_view

    return nullcontext(JsonLog(sys.stderr)) if log_json else make_view(quiet)


@click.command(
    "compare",
    cls=SettingsCommand,
    short_help="Test whether adapter B is no worse than A.",
    epilog="Example: rightrank compare old new --model ./model --data held_out.jsonl --margin 0.01",
)
@click.argument("a")
@click.argument("b")
@click.option("--model", required=True, help="The base model of the adapters.")
@click.option(
    "--data",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path),
    help="Held-out rows; all are read. May be repeated.",
)
@setting_options(
    SelectSettings,
    "margin",
    "metric",
    "metrics",
    "higher_is_better",
    "lower_is_better",
    "columns",
    "seq_len",
    "dtype",
    "device",
)
@click.option("--set", "assignments", multiple=True, metavar="NAME=VALUE", help="Any other setting of select.")
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as one JSON object.")
@click.option("--quiet", is_flag=True, help="Print no progress.")
@click.option("--log-json", is_flag=True, help="Log progress to stderr, one JSON object per line.")
def _compare(
    a: str,
    b: str,
    model: str,
    data: tuple[Path, ...],
    assignments: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    log_json: bool,
    **options: Any,
) -> int:
    """Is B no worse than A?

    A and B are adapter folders, model folders, or `base`. Exit status: 0 not worse, 3 worse by more than the margin, 4 the
    examples cannot tell.
    """
    from rightrank.api import adapters as api

    settings = SelectSettings(**gather(None, assignments, options))
    if not quiet and not log_json:
        announce("loading model and data")
    with _view(quiet, log_json) as view:
        found = api.compare(a, b, model=model, data=list(data), settings=settings, on_event=view.on_event)
    click.echo(found.model_dump_json() if as_json else found.sentence)
    return EXIT[found.verdict]


COMMANDS = (_inspect, _resize, _compare)
