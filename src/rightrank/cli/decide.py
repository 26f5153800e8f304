"""`decide`: a rank from finished trainings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rightrank.cli.options import comma

if TYPE_CHECKING:
    from rightrank.schema.metrics import Checkpoint


def _mapping(context: click.Context, parameter: click.Parameter, text: str | None) -> dict[str, str]:
    pairs = {}
    for value in comma(context, parameter, text) or []:
        name, equals, column = value.partition("=")
        if not equals or not column.strip():
            raise click.BadParameter(f"{value!r}: give NAME=COLUMN, such as rank=lora_r")
        pairs[name.strip()] = column.strip()
    return pairs


@click.command(
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
    help="With one seed: name the smallest rank that is enough with this probability, such as 0.9.",
)
@click.option(
    "--columns",
    callback=_mapping,
    metavar="NAME=COLUMN",
    help="Columns of other names, such as rank=lora_r,value=eval_loss.",
)
@click.option("--horizon", "horizon_steps", type=click.IntRange(min=1), help="Training length in steps to answer for.")
@click.option(
    "--checkpoint",
    type=click.Choice(["last", "best"]),
    help="Which evaluation of each training counts, where there are several; by default that of the run, else the last.",
)
@click.option("--plot", "plot_file", type=click.Path(path_type=Path), help="Write the curve to this .svg file.")
@click.option("--json", "as_json", is_flag=True, help="Print the decision as one JSON object.")
def decide(
    results: Path,
    metric: str | None,
    higher_is_better: bool | None,
    margin: float | None,
    confidence: float | None,
    columns: dict[str, str],
    horizon_steps: int | None,
    checkpoint: Checkpoint | None,
    plot_file: Path | None,
    as_json: bool,
) -> None:
    """Decide on finished trainings, whoever ran them.

    RESULTS is a CSV or JSONL file with `rank`, `value` and, if there are any, `lr`, `seed`, `std`, `item`; a run
    folder; or results of W&B, MLflow, Trainer or Optuna.
    """
    from rightrank.api import deciding as api

    decided = api.decide(
        results,
        metric=metric,
        higher_is_better=higher_is_better,
        margin=margin,
        confidence=confidence,
        columns=columns,
        horizon_steps=horizon_steps,
        checkpoint=checkpoint,
    )
    if plot_file is not None:
        from rightrank.report.figures import rank_figure
        from rightrank.report.svg import write_plot

        write_plot(rank_figure(decided.decision), plot_file)
    if as_json:
        further = {
            "understood": decided.understood,
            "adapter_sentence": decided.adapter_sentence,
            "next_command": decided.next_command,
        }
        click.echo(json.dumps(decided.decision.model_dump(mode="json") | further))
        return
    from rightrank.report.format import visible
    from rightrank.report.tables import decision_text

    click.echo(
        decision_text(
            decided.decision,
            decided.understood,
            shutil.get_terminal_size((100, 24)).columns,
            decided.next_commands,
        )
    )
    if decided.adapter_sentence is not None:
        click.echo(f"adapter: {visible(decided.adapter_sentence)}")
