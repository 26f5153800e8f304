"""The terminal output of `inspect`, `resize` and `allocate`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import median
from typing import TypeAlias

from rich.console import Console
from rich.table import Table

from rightrank.report.adapters import candidate_table
from rightrank.report.figure import Axis, Figure, Series, axis_from_zero, log_ticks
from rightrank.schema.decision import AdapterAnswer
from rightrank.schema.errors import SettingsError
from rightrank.schema.results import Allocation, Inspection, ModuleSpectrum, Resized

MAX_TICKS = 12  # of the singular values, each of which is then a tick


def spectrum_figure(inspection: Inspection) -> Figure | None:
    """The median of the singular values over the modules, in descending order, with the smallest and the largest."""
    spectra = [module.singular_values for module in inspection.modules if any(v > 0 for v in module.singular_values)]
    if not spectra:
        return None
    count = max(len(spectrum) for spectrum in spectra)
    columns = [[s[k] for s in spectra if k < len(s) and s[k] > 0] for k in range(count)]
    known = [(k + 1, values) for k, values in enumerate(columns) if values]
    x = tuple(k for k, _ in known)
    low, high = 0.9 * min(min(values) for _, values in known), 1.1 * max(max(values) for _, values in known)
    return Figure(
        name="spectrum",
        title=f"Singular values of the adapter, {len(spectra)} modules",
        alt=f"Singular values of s·B·A over {len(spectra)} modules, median from "
        f"{median(known[0][1]):.3g} for the first to {median(known[-1][1]):.3g} for number {x[-1]}. {inspection.summary.sentence}",
        x=Axis("singular value, largest first", ticks=x if len(x) <= MAX_TICKS else ()),
        y=Axis("size", "log10", log_ticks(low, high), (low, high)),
        series=(
            Series("median module", x, tuple(median(values) for _, values in known)),
            Series("largest and smallest", x, tuple(max(values) for _, values in known), kind="line", tone="faint"),
            Series("largest and smallest", x, tuple(min(values) for _, values in known), kind="line", tone="faint"),
        ),
        columns=("number", "median", "smallest", "largest", "modules"),
        rows=tuple((k, median(values), min(values), max(values), len(values)) for k, values in known),
    )


def layer_figure(modules: Sequence[ModuleSpectrum]) -> Figure:
    """The effective rank by layer, a series for each kind of module; where too little is known of it, the stable rank.

    Raises:
        SettingsError: no module is in a numbered layer.
    """
    places = [(*split_name(module.name), module.effective_rank or module.stable_rank) for module in modules]
    points = sorted((int(layer), name, value) for layer, name, value in places if layer.isdigit())
    if not points:
        raise SettingsError("--plot: no module is in a numbered layer; leave it out, and see the table")
    names = list(dict.fromkeys(name for _, name, _ in points))
    series = [
        Series(
            name,
            tuple(layer for layer, kind, _ in points if kind == name),
            tuple(value for _, kind, value in points if kind == name),
            tone=place,
        )
        for place, name in enumerate(names)
    ]
    return Figure(
        name="effective_rank",
        title="Effective rank, by layer and module",
        alt=f"Effective rank of {len(points)} modules by layer.",
        x=Axis("layer"),
        y=axis_from_zero("effective rank", [value for *_, value in points]),
        series=tuple(series),
        columns=("layer", "module", "effective rank"),
        rows=tuple(points),
    )


def split_name(name: str) -> tuple[str, str]:
    """`(layer, module)` of a module's name: ("12", "q_proj"); ("-", name) outside layers."""
    match = re.match(r"(?:.*?\.)?(\d+)\.(.+)$", name)
    if match is None:
        return "-", name.rsplit(".", 1)[-1]
    parts = match[2].split(".")
    return match[1], parts[-1] if parts[-1] != "c_proj" else ".".join(parts[-2:])


MAX_ROWS = 20  # modules in the table; --json has all
TABLE_WIDTH = 112  # minimum, so that a narrow terminal truncates no column
ProbeRecord: TypeAlias = Inspection | Resized | Allocation


def print_record(console: Console, record: ProbeRecord, every: bool) -> None:
    """Print any record of the probe."""
    console.width = max(console.width, TABLE_WIDTH)
    if isinstance(record, Inspection):
        _print_inspection(console, record, every)
    elif isinstance(record, Resized):
        _print_resized(console, record)
    else:
        _print_allocation(console, record)


def _print_inspection(console: Console, inspection: Inspection, every: bool) -> None:
    """Print the table of modules and the summary."""
    summary, modules = inspection.summary, inspection.modules
    shown = modules if every or len(modules) <= MAX_ROWS else extremes(modules)
    console.print(_module_table(shown))
    if len(shown) < len(modules):
        console.print(
            f"{len(shown)} of {len(modules)} modules, the most and the least concentrated; --all shows all of them"
        )
    for name, value in _summary_lines(inspection):
        _print(console, f"{name + ':':<22}{value}")
    _print(console, f"\n{summary.sentence}")


def extremes(modules: Sequence[ModuleSpectrum]) -> list[ModuleSpectrum]:
    """The modules that use the least and the most of their rank, in the order of the model."""
    half = MAX_ROWS // 2
    by_use = sorted(modules, key=lambda module: (module.effective_rank or module.stable_rank) / module.rank)
    chosen = {module.name for module in by_use[:half] + by_use[-half:]}
    return [module for module in modules if module.name in chosen]


def _module_table(modules: Sequence[ModuleSpectrum]) -> Table:
    """One row per module."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("module", "shape", "rank", "90%", "95%", "99%", "eff.", "stable", "noise", "‖ΔW‖₂"):
        table.add_column(heading, justify="left" if heading == "module" else "right", no_wrap=True)
    table.add_column("flags", style="yellow", no_wrap=True)
    prefix = common_prefix([module.name for module in modules])
    for module in modules:
        table.add_row(
            module.name.removeprefix(prefix),
            f"{module.shape[0]}×{module.shape[1]}",
            str(module.rank),
            *(_or_dash(module.energy_rank[part]) for part in ("0.9", "0.95", "0.99")),
            _or_dash(module.effective_rank),
            f"{module.stable_rank:.1f}",
            str(module.noise_rank),
            f"{module.spectral_norm:.3g}",
            ", ".join(module.flags),
        )
    return table


def common_prefix(names: Sequence[str]) -> str:
    """The dotted parts that all names start with, such as `model.layers.`; empty for a single name."""
    parts = [name.split(".")[:-1] for name in names]
    shared = 0
    while len(names) > 1 and all(len(part) > shared and part[shared] == parts[0][shared] for part in parts):
        shared += 1
    return "".join(f"{part}." for part in parts[0][:shared]) if names else ""


def _summary_lines(inspection: Inspection) -> list[tuple[str, str]]:
    """`(name, value)` pairs of the summary, without empty values."""
    summary = inspection.summary
    ranks = ", ".join(str(rank) for rank in summary.ranks[:8]) + (", …" if len(summary.ranks) > 8 else "")
    energy = ", ".join(f"{float(part):.0%}: {_or_dash(rank)}" for part, rank in summary.energy_rank.items())
    lines = [
        ("modules", f"{summary.modules}, rank {ranks}, {summary.parameters:,} parameters"),
        ("scaling", summary.scaling_rule if summary.kind == "adapter" else ""),
        ("base", summary.base_model or ""),
        ("rank by energy", f"{energy} (largest of all modules)"),
        ("most concentrated", summary.most_concentrated or ""),
        ("least concentrated", summary.least_concentrated or ""),
        ("untrained (B = 0)", _few(summary.untrained)),
        ("dead", _few(summary.dead)),
        ("modules_to_save", _few(summary.modules_to_save)),
        ("unchanged tensors", str(summary.unchanged) if summary.unchanged else ""),
        ("changed, not a matrix", _few(summary.not_matrices)),
        *(("note", note) for note in summary.notes),
    ]
    return [(name, value) for name, value in lines if value]


def _print_resized(console: Console, resized: Resized) -> None:
    """Print what was written and the error of the truncation."""
    rank = f"rank {resized.rank}" if resized.rank is not None else "ranks by module"
    _print(console, f"{resized.out}: {rank} (by {resized.chosen_by})")
    _print(
        console,
        f"parameters {resized.parameters_before:,} → {resized.parameters_after:,}, "
        f"file {resized.bytes_before:,} → {resized.bytes_after:,} bytes",
    )
    worst = max(resized.modules, key=lambda module: module.relative_delta_error)
    _print(
        console,
        f"error of ΔW {resized.relative_delta_error:.3g} of its norm; worst {worst.relative_delta_error:.3g} "
        f"({worst.name}, rank {worst.from_rank} → {worst.rank})",
    )
    if resized.answer is not None:
        console.print(_candidates(resized.answer))
        for sentence in (resized.answer.sentence, *resized.answer.notes):
            _print(console, sentence)
    for note in resized.notes:
        _print(console, f"note: {note}")


def _candidates(answer: AdapterAnswer) -> Table:
    """The truncations, compared with the adapter."""
    heading, *rows = candidate_table(answer, "held-out")
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in heading:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def _print_allocation(console: Console, allocation: Allocation) -> None:
    """Print the answer and the comparisons behind it."""
    _print(console, allocation.sentence)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("pattern", "seed", "parameters", "held-out"):
        table.add_column(heading, justify="left" if heading == "pattern" else "right")
    for trial in allocation.trials:
        table.add_row(trial.pattern, str(trial.seed), f"{trial.parameters:,}", f"{trial.value:.4f}")
    console.print(table)
    for verdict in allocation.verdicts:
        console.print(
            f"pattern against {verdict.against}: {verdict.difference:+.4f} [{verdict.low:+.4f}, {verdict.high:+.4f}]",
            highlight=False,
        )


def _print(console: Console, text: str) -> None:
    """Print text as it is: paths and names may contain markup."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _or_dash(value: float | None) -> str:
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.1f}"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
