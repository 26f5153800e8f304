"""Figures of an inspection: the spectrum over all modules, and one statistic by layer and module."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import median
from typing import Literal, TypeAlias, get_args

from rightrank.errors import SettingsError, did_you_mean
from rightrank.records.probe import Inspection, ModuleSpectrum
from rightrank.report.figure import Axis, Figure, HeatMap, Series, log_ticks

Statistic: TypeAlias = Literal[
    "effective_rank", "stable_rank", "noise_rank", "energy_rank_0.9", "energy_rank_0.99", "norm"
]
MAX_TICKS = 12  # of the singular values, each of which is then a tick
STATISTICS: tuple[Statistic, ...] = get_args(Statistic)
TITLES: dict[Statistic, str] = {
    "effective_rank": "effective rank",
    "stable_rank": "stable rank",
    "noise_rank": "rank above the noise",
    "energy_rank_0.9": "rank of 90% of the energy",
    "energy_rank_0.99": "rank of 99% of the energy",
    "norm": "norm of the update",
}


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


def require_statistic(name: str) -> Statistic:
    """The statistic of that name.

    Raises:
        SettingsError: an unknown name.
    """
    for statistic in STATISTICS:
        if statistic == name:
            return statistic
    hint = did_you_mean(name, STATISTICS)
    raise SettingsError(f"--figure {name!r} is not known{hint or '; allowed: ' + ', '.join(STATISTICS)}")


def spectrum_map(modules: Sequence[ModuleSpectrum], statistic: Statistic = "effective_rank") -> HeatMap:
    """Layer × module, one cell a module; modules outside numbered layers share a row of their own."""
    cells = {split_name(module.name): _value(module, statistic) for module in modules}
    layers = sorted({row for row, _ in cells}, key=lambda row: (not row.isdigit(), int(row) if row.isdigit() else 0))
    names = list(dict.fromkeys(column for _, column in cells))
    title = f"{TITLES[statistic]}, by layer and module"
    return HeatMap(
        name=statistic,
        title=title,
        alt=f"Heat map of {len(modules)} modules: {title}.",
        row_label="layer",
        column_label="module",
        row_names=tuple(layers),
        column_names=tuple(names),
        values=tuple(tuple(cells.get((layer, name)) for name in names) for layer in layers),
        notes=tuple(("",) * len(names) for _ in layers),
        best=(None,) * len(layers),
        lower_is_better=False,
    )


def split_name(name: str) -> tuple[str, str]:
    """`(layer, module)` of a module's name: ("12", "q_proj"); ("-", name) outside layers."""
    match = re.match(r"(?:.*?\.)?(\d+)\.(.+)$", name)
    if match is None:
        return "-", name.rsplit(".", 1)[-1]
    parts = match[2].split(".")
    return match[1], parts[-1] if parts[-1] != "c_proj" else ".".join(parts[-2:])


def _value(module: ModuleSpectrum, statistic: Statistic) -> float | None:
    if statistic == "norm":
        return module.frobenius_norm
    if statistic.startswith("energy_rank_"):
        return module.energy_rank[statistic.removeprefix("energy_rank_")]
    value: float | None = getattr(module, statistic)
    return value
