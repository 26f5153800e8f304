"""Words and numbers for people, the same in every view."""

from __future__ import annotations

from collections.abc import Sequence

from rightrank.report.figure import Axis, visible


def metric_unit(metric: str) -> str:
    """The unit of a metric's differences."""
    return "nats" if metric == "loss" else visible(metric)


def metric_axis(metric: str, which: str, limits: tuple[float, float] | None = None) -> Axis:
    label = f"{which} loss, nats" if metric == "loss" else f"{which} {visible(metric)}"
    return Axis(label, limits=limits)


def rank_axis(ranks: Sequence[int]) -> Axis:
    return Axis("LoRA rank", "log2", tuple(sorted(set(ranks))))


def quantity(count: int, noun: str) -> str:
    """`1 seed`, `3 seeds`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def amount(value: float) -> str:
    """Three digits that matter, no exponent above one."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    """Bytes as a person reads them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
