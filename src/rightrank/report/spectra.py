"""The spectrum of an adapter as a figure: singular values of s·B·A over all its modules."""

from __future__ import annotations

from statistics import median

from rightrank.records.probe import Inspection
from rightrank.report.figure import Axis, Figure, Series


def spectrum_figure(inspection: Inspection) -> Figure | None:
    """The median module's singular values, falling, with the smallest and largest of any module."""
    spectra = [module.singular_values for module in inspection.modules if any(v > 0 for v in module.singular_values)]
    if not spectra:
        return None
    count = max(len(spectrum) for spectrum in spectra)
    columns = [[s[k] for s in spectra if k < len(s) and s[k] > 0] for k in range(count)]
    known = [(k + 1, values) for k, values in enumerate(columns) if values]
    x = tuple(k for k, _ in known)
    return Figure(
        name="spectrum",
        title=f"Singular values of the adapter, {len(spectra)} modules",
        alt=f"Singular values of s·B·A over {len(spectra)} modules, from {median(known[0][1]):.3g} in the median "
        f"for the first to {median(known[-1][1]):.3g} for number {x[-1]}. {inspection.summary.sentence}",
        x=Axis("singular value, largest first"),
        y=Axis("size", "log10"),
        series=(
            Series("median module", x, tuple(median(values) for _, values in known)),
            Series("largest and smallest", x, tuple(max(values) for _, values in known), kind="line", tone="faint"),
            Series("largest and smallest", x, tuple(min(values) for _, values in known), kind="line", tone="faint"),
        ),
        columns=("number", "median", "smallest", "largest", "modules"),
        rows=tuple((k, median(values), min(values), max(values), len(values)) for k, values in known),
    )
