"""`compare`: a gate for CI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from rightrank.cli.options import DIRECTION_OPTIONS, gather

EXIT = {"not_worse": 0, "worse": 3, "cannot_tell": 4}


@click.command(
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
@click.option(
    "--margin", type=float, help="How much worse B may be, in the metric's unit (default 0.005 nats a token)."
)
@click.option("--metric", help="What to compare by: loss (default), accuracy, exact_match, …: docs/how-to/metrics.md.")
@click.option("--metrics", multiple=True, metavar="METRIC", help="A further metric; may be repeated.")
@DIRECTION_OPTIONS[0]
@DIRECTION_OPTIONS[1]
@click.option("--seq-len", type=int, help="Tokens of an example at most.")
@click.option("--dtype", help="Type of the base: float32, bfloat16 or float16.")
@click.option("--device", help="cpu, cuda, …")
@click.option("--set", "assignments", multiple=True, metavar="NAME=VALUE", help="Any other setting of select.")
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as one JSON object.")
def compare(
    a: str, b: str, model: str, data: tuple[Path, ...], assignments: tuple[str, ...], as_json: bool, **options: Any
) -> int:
    """Is B no worse than A?

    A and B are adapter folders, model folders, or `base`. Exit status: 0 not worse, 3 worse by more than the margin, 4 the
    examples cannot tell.
    """
    from rightrank import api
    from rightrank.settings import make_settings

    settings = make_settings(gather(None, assignments, options))
    found = api.compare(a, b, model=model, data=list(data), settings=settings)
    click.echo(found.model_dump_json() if as_json else found.sentence)
    return EXIT[found.verdict]
