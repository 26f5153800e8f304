"""The spectra of an adapter as figures, and what `inspect`, `resize` and `allocate` print."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import median

from rightrank.report.answer import labelled
from rightrank.report.figure import Axis, Figure, Series, axis_from_zero, log_ticks
from rightrank.report.tables import candidate_table, table_lines
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


def inspection_text(inspection: Inspection) -> str:
    """The modules, or those that use the most and the least of their rank, and the summary."""
    summary, modules = inspection.summary, inspection.modules
    by_use = sorted(modules, key=lambda module: (module.effective_rank or module.stable_rank) / module.rank)
    half = MAX_ROWS // 2
    shown = {module.name for module in (modules if len(modules) <= MAX_ROWS else by_use[:half] + by_use[-half:])}
    heading = ["module", "shape", "rank", "90%", "95%", "99%", "eff.", "stable", "noise", "‖ΔW‖₂", "flags"]
    rows = [_module_row(module) for module in modules if module.name in shown]
    lines = table_lines([heading, *rows], left=(0, 10))
    if len(shown) < len(modules):
        lines.append(f"{len(shown)} of {len(modules)} modules, the most and the least concentrated; --json has all")
    energy = ", ".join(f"{float(part):.0%}: {_or_dash(rank)}" for part, rank in summary.energy_rank.items())
    names = {"untrained (B = 0)": summary.untrained, "dead": summary.dead, "modules_to_save": summary.modules_to_save}
    facts = [
        ("modules", f"{summary.modules}, {summary.parameters:,} parameters"),
        ("base", summary.base_model or ""),
        ("rank by energy", f"{energy} (largest of all modules)"),
        *((name, ", ".join(found)) for name, found in names.items()),
        ("unchanged tensors", str(summary.unchanged or "")),
        ("changed, not a matrix", ", ".join(summary.not_matrices)),
        *(("note", note) for note in summary.notes),
    ]
    return "\n".join([*lines, *labelled([fact for fact in facts if fact[1]], 23), "", summary.sentence])


def _module_row(module: ModuleSpectrum) -> list[str]:
    return [
        module.name,
        f"{module.shape[0]}×{module.shape[1]}",
        str(module.rank),
        *(_or_dash(module.energy_rank[part]) for part in ("0.9", "0.95", "0.99")),
        _or_dash(module.effective_rank),
        f"{module.stable_rank:.1f}",
        str(module.noise_rank),
        f"{module.spectral_norm:.3g}",
        ", ".join(module.flags),
    ]


def resized_text(resized: Resized) -> str:
    """What was written, and the error of the truncation."""
    rank = f"rank {resized.rank}" if resized.rank is not None else "ranks by module"
    worst = max(resized.modules, key=lambda module: module.relative_delta_error)
    lines = [
        f"{resized.out}: {rank} (by {resized.chosen_by})",
        f"parameters {resized.parameters_before:,} → {resized.parameters_after:,}, "
        f"file {resized.bytes_before:,} → {resized.bytes_after:,} bytes",
        f"error of ΔW {resized.relative_delta_error:.3g} of its norm; worst {worst.relative_delta_error:.3g} "
        f"({worst.name}, rank {worst.from_rank} → {worst.rank})",
    ]
    if resized.answer is not None:
        lines += [*table_lines(candidate_table(resized.answer, "held-out")), resized.answer.sentence]
        lines += resized.answer.notes
    return "\n".join([*lines, *(f"note: {note}" for note in resized.notes)])


def allocation_text(allocation: Allocation) -> str:
    """The answer and the comparisons behind it."""
    rows = [["pattern", "seed", "parameters", "held-out"]]
    for trial in allocation.trials:
        rows.append([trial.pattern, str(trial.seed), f"{trial.parameters:,}", f"{trial.value:.4f}"])
    compared = [
        f"pattern against {one.against}: {one.difference:+.4f} [{one.low:+.4f}, {one.high:+.4f}]"
        for one in allocation.verdicts
    ]
    return "\n".join([allocation.sentence, *table_lines(rows, left=(0,)), *compared])


def _or_dash(value: float | None) -> str:
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.1f}"
