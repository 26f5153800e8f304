"""`inspect`, `resize` and `compare` (a gate for CI): commands on adapters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rightrank.cli.options import (
    SettingsCommand,
    add_setting_options,
    announce,
    format_json,
    gather_settings,
)
from rightrank.schema.settings import SelectSettings

if TYPE_CHECKING:
    from rightrank.schema.results import Inspection, ModuleSpectrum, Resized

MAX_ROWS = 20  # modules in the table; --json has all
EXIT_STATUS = {"not_worse": 0, "worse": 3, "broken": 3, "cannot_tell": 4}


@click.command(
    "inspect",
    short_help="Show the singular spectrum of an adapter's modules.",
    epilog="Example: rightrank inspect run/adapter",
)
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def _inspect(adapter: Path, as_json: bool) -> None:
    """Show the singular spectrum of every module of a LoRA ADAPTER."""
    from rightrank.api import adapters as api

    inspection = api.inspect(adapter)
    click.echo(format_json(inspection) if as_json else _format_inspection(inspection))


@click.command(
    "resize",
    short_help="Write an adapter at another rank, with what it loses.",
    epilog="Example: rightrank resize run/adapter small --data held_out.jsonl --margin 0.005",
)
@click.argument("adapter", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--rank", type=int, help="One rank for all modules; a rank above the current one pads.")
@click.option(
    "--data", type=click.Path(path_type=Path), help="The smallest rank that is enough on held-out rows of this file."
)
@click.option(
    "--train",
    type=click.Path(path_type=Path),
    help="With --data: the training data of the adapter; these rows are not scored.",
)
@click.option(
    "--margin",
    help="With --data: the accepted loss of quality, a share of the gain over the base (default 1%) or a number in the metric's unit.",
)
@click.option("--base", help="With --data: the base model (default: the one that the adapter names).")
@click.option("--set", "assignments", multiple=True, metavar="NAME=VALUE", help="With --data: a setting of select.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def _resize(
    adapter: Path,
    out: Path,
    assignments: tuple[str, ...],
    as_json: bool,
    **rule: Any,
) -> None:
    """Write ADAPTER to OUT at another rank and report the truncation error."""
    from rightrank.api import adapters as api
    from rightrank.runs.hooks import View

    settings = SelectSettings(**gather_settings(None, assignments, {})) if assignments else None
    with View() as view:
        resized = api.resize(adapter, out, settings=settings, on_event=view.on_event, **rule)
    click.echo(format_json(resized) if as_json else _format_resize_result(resized))


@click.command(
    "compare",
    cls=SettingsCommand,
    short_help="Test whether adapter B is no worse than A.",
    epilog="Example: rightrank compare old new --model ./model --data held_out.jsonl --margin 0.01",
)
@click.argument("a")
@click.argument("b")
@click.option("--model", required=True, help="The base model of the adapters.")
@click.option("--base-b", metavar="HOW", help="B in 4bit or 8bit, or over this other base, such as a GGUF file.")
@click.option(
    "--data",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path),
    help="Held-out rows; all are read. May be repeated.",
)
@add_setting_options(SelectSettings, "margin")
@click.option("--set", "assignments", multiple=True, metavar="NAME=VALUE", help="Any other setting of select.")
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as one JSON object.")
def _compare(
    a: str,
    b: str,
    model: str,
    base_b: str | None,
    data: tuple[Path, ...],
    assignments: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> int:
    """Test whether B is no worse than A.

    A and B are adapter folders, model folders, GGUF files, or `base`. Exit status: 0 not worse, 3 worse by more than the
    margin or broken, 4 the examples cannot tell.
    """
    from rightrank.api import adapters as api
    from rightrank.runs.hooks import View

    settings = SelectSettings(**gather_settings(None, assignments, options))
    announce("loading model and data")
    with View() as view:
        comparison = api.compare(
            a, b, model=model, data=list(data), settings=settings, base_b=base_b, on_event=view.on_event
        )
    click.echo(format_json(comparison) if as_json else comparison.sentence)
    return EXIT_STATUS[comparison.verdict]


def _format_inspection(inspection: Inspection) -> str:
    from rightrank.adapters.rank_math import format_slot
    from rightrank.report.format import format_labelled_rows, format_table

    summary, modules = inspection.summary, inspection.modules
    by_use = sorted(modules, key=lambda module: module.effective_rank / module.rank)
    half = MAX_ROWS // 2
    shown = {module.name for module in (modules if len(modules) <= MAX_ROWS else by_use[:half] + by_use[-half:])}
    heading = ["module", "shape", "rank", "90%", "95%", "99%", "eff.", "stable", "noise", "‖ΔW‖₂", "flags"]
    rows = [_format_module_row(module) for module in modules if module.name in shown]
    lines = format_table([heading, *rows], left_columns=(0, 10))
    if len(shown) < len(modules):
        lines.append(f"{len(shown)} of {len(modules)} modules, the most and the least concentrated; --json has all")
    energy = ", ".join(f"{float(fraction):.0%}: {rank}" for fraction, rank in summary.energy_rank.items())
    names = {"untrained (B = 0)": summary.untrained, "modules_to_save": summary.modules_to_save}
    facts = [
        ("modules", f"{summary.modules}, {summary.parameters:,} parameters"),
        ("base", summary.base_model or ""),
        ("slot", format_slot(max(summary.ranks))),
        ("rank by energy", f"{energy} (largest of all modules)"),
        *((name, ", ".join(module_names)) for name, module_names in names.items()),
        *(("note", note) for note in summary.notes),
    ]
    return "\n".join([*lines, *format_labelled_rows(facts, 23), "", summary.sentence])


def _format_module_row(module: ModuleSpectrum) -> list[str]:
    return [
        module.name,
        f"{module.shape[0]}×{module.shape[1]}",
        str(module.rank),
        *(str(module.energy_rank[fraction]) for fraction in ("0.9", "0.95", "0.99")),
        f"{module.effective_rank:.1f}",
        f"{module.stable_rank:.1f}",
        str(module.noise_rank),
        f"{module.spectral_norm:.3g}",
        ", ".join(module.flags),
    ]


def _format_resize_result(resized: Resized) -> str:
    from rightrank.adapters.rank_math import format_rank

    lowest, highest = (limit(module.rank for module in resized.modules) for limit in (min, max))
    rank = f"ranks by module, from {lowest} to {highest}"
    if resized.rank is not None:
        rank = f"rank {format_rank(resized.rank, lowest, highest)}"
    worst = max(resized.modules, key=lambda module: module.relative_delta_error)
    lines = [
        f"{resized.out}: {rank} (by {resized.chosen_by})",
        f"parameters {resized.parameters_before:,} → {resized.parameters_after:,}, "
        f"file {resized.bytes_before:,} → {resized.bytes_after:,} bytes",
        f"error of ΔW {resized.relative_delta_error:.3g} of its norm; worst {worst.relative_delta_error:.3g} "
        f"({worst.name}, rank {worst.from_rank} → {worst.rank})",
    ]
    if resized.answer is not None:
        from rightrank.report.adapter_page import build_candidate_table
        from rightrank.report.format import format_table

        lines += [*format_table(build_candidate_table(resized.answer, "held-out")), resized.answer.sentence]
        lines += resized.answer.notes
    return "\n".join([*lines, *(f"note: {note}" for note in resized.notes)])


COMMANDS = (_compare, _inspect, _resize)
