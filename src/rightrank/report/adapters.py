"""What `inspect` and `resize` show: the effective rank by layer as a figure, and both answers as text."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rightrank.report.answer import labelled
from rightrank.report.figure import Axis, Figure, Series, axis_from_zero
from rightrank.report.tables import candidate_table, table_lines
from rightrank.schema.errors import SettingsError
from rightrank.schema.results import Inspection, ModuleSpectrum, Resized


def layer_figure(modules: Sequence[ModuleSpectrum]) -> Figure:
    """The effective rank by layer, a series for each kind of module; where too little is known of it, the stable rank.

    Raises:
        SettingsError: no module is in a numbered layer.
    """
    points: list[tuple[int, str, float]] = []
    for module in modules:
        if match := re.match(r"(?:.*?\.)?(\d+)\.(.+)$", module.name):
            parts = match[2].split(".")
            kind = ".".join(parts[-2:]) if parts[-1] == "c_proj" else parts[-1]
            points.append((int(match[1]), kind, module.effective_rank or module.stable_rank))
    points.sort()
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
    return "\n".join([*lines, *labelled(facts, 23), "", summary.sentence])


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


def _or_dash(value: float | None) -> str:
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.1f}"
