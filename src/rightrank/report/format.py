"""Format numbers, units, tables and curves as text, the same way in every view."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from math import floor, log2, log10
from typing import TypeAlias

CONTROL_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
# Invisible characters that can disguise text: DEL, C1 controls, bidirectional marks, separators, surrogates.
HIDDEN = {
    0x7F: 0x2421,
    **dict.fromkeys(
        [*range(0x80, 0xA0), *range(0x200B, 0x2010), *range(0x2028, 0x202F), *range(0x2060, 0x2070)], 0xFFFD
    ),
    **dict.fromkeys([*range(0xD800, 0xE000), 0xFEFF, 0xFFFE, 0xFFFF], 0xFFFD),
}


def make_visible(text: str) -> str:
    """Replace control and invisible characters with symbols, so that data cannot change how a page reads."""
    return text.translate(CONTROL_PICTURES | HIDDEN)


def format_metric_label(metric: str, higher_is_better: bool | None) -> str:
    """Return the label of an axis with held-out values, with the better direction if it is available."""
    label = "held-out loss, nats" if metric == "loss" else f"held-out {make_visible(metric)}"
    better = "" if higher_is_better is None else f" ({'higher' if higher_is_better else 'lower'} is better)"
    return label + better


def format_quantity(count: float, noun: str) -> str:
    """Format a count with its noun: `1 seed`, `3 seeds`, `4.3 trainings`."""
    text = f"{count:,.0f}" if float(count).is_integer() else f"{count:,.1f}"
    return f"{text} {noun}" + ("" if count == 1 else "s")


def format_duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def format_bytes(count: float) -> str:
    """Format bytes in a binary unit: `1.50 GiB`."""
    sign, count = ("-" if count < 0 else ""), abs(count)
    for unit, spec in (("B", ".0f"), ("KiB", ".1f"), ("MiB", ".1f"), ("GiB", ".2f")):
        if count < 1024:
            return f"{sign}{count:{spec}} {unit}"
        count /= 1024
    return f"{sign}{count:.2f} TiB"


def format_training_settings(
    rank: int,
    lora_alpha: float,
    target_modules: str | Sequence[str],
    *,
    use_rslora: bool = False,
    learning_rate: float | None,
    batch_size: int | None,
    gradient_accumulation_steps: int | None,
    steps: int | None,
) -> str:
    """Format the settings of a training in the names of PEFT and transformers. None: unknown, and left out."""
    values = {
        "r": rank,
        "lora_alpha": int(lora_alpha) if float(lora_alpha).is_integer() else lora_alpha,
        "use_rslora": use_rslora,
        "learning_rate": learning_rate,
        "target_modules": target_modules,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "max_steps": steps,
    }
    return ", ".join(f"{name}={value!r}" for name, value in values.items() if value)


MAX_CURVE_WIDTH, CURVE_LINES = 72, 12  # characters, and lines with the label and the ranks
Points: TypeAlias = Sequence[tuple[int, float]]  # rank and value, by ascending rank


def draw_terminal_curve(
    points: Points, width: int, truncated: Points = (), *, label: str, num_lines: int = CURVE_LINES
) -> list[str]:
    """Draw values against the logarithm of the rank in `num_lines` lines: the label, the drawing and the ranks.

    Args:
        points: trained adapters (●).
        width: the characters of a line.
        truncated: adapters truncated from a higher rank (○; ◉ where both share a cell).
        label: the name of the values, with the better direction.

    Returns:
        The lines; none if there are fewer than two ranks, or too few lines for a drawing.
    """
    ranks = sorted({rank for rank, _ in (*points, *truncated)})
    num_rows = num_lines - 2
    if len(ranks) < 2 or num_rows < 3:
        return []
    values = [value for _, value in (*points, *truncated)]
    low, span = min(values), (max(values) - min(values)) or abs(values[0]) or 1.0
    tick_distance = 3 if num_rows > 6 and num_rows % 3 == 1 else num_rows - 1
    tick_values = {row: low + span * (1 - row / (num_rows - 1)) for row in range(0, num_rows, tick_distance)}
    # Use two digits of the distance between ticks, so that all texts differ, and trailing zeros, so that they line up.
    digits = max(4, 2 + floor(log10(max(map(abs, tick_values.values())))) - floor(log10(span / (len(tick_values) - 1))))
    ticks = {row: f"{value:#.{digits}g}".rstrip(".") for row, value in tick_values.items()}
    margin = max(map(len, ticks.values()))
    columns = max(len(ranks), min(width, MAX_CURVE_WIDTH) - margin - 1 - len(str(ranks[-1])))
    column = {rank: round((columns - 1) * log2(rank / ranks[0]) / log2(ranks[-1] / ranks[0])) for rank in ranks}
    truncated_cells, trained_cells = (
        {(round((num_rows - 1) * (1 - (value - low) / span)), column[rank]) for rank, value in adapters}
        for adapters in (truncated, points)
    )
    both = truncated_cells & trained_cells
    cells = dict.fromkeys(truncated_cells, "○") | dict.fromkeys(trained_cells, "●") | dict.fromkeys(both, "◉")
    rows = ["".join(cells.get((row, x), " ") for x in range(columns)) for row in range(num_rows)]
    legend = f"{label}; ● trained, ○ truncated{', ◉ both' if both else ''}" if truncated else label
    name = "rank" if margin > len("rank") else ""
    return [
        legend if len(legend) <= width else label[:width],
        *(
            f"{ticks.get(row, ''):>{margin}}{'┤' if row in ticks else '│'}{text}".rstrip()
            for row, text in enumerate(rows)
        ),
        f"{name:>{margin}} {_format_rank_labels({column[rank]: str(rank) for rank in ranks})}",
    ]


def _format_rank_labels(names: Mapping[int, str]) -> str:
    """Write each label at its column; a label that would touch the one before it is left out."""
    line = ""
    for column, name in names.items():
        if not line or column > len(line):
            line = line.ljust(column) + name
    return line


def format_labelled_rows(rows: Iterable[tuple[str, str | None]], width: int) -> list[str]:
    """Format rows as `label: text` lines whose texts start at column `width`; rows without a text are skipped."""
    return [f"{f'{label}:' if label else '':<{width - 1}} {text}" for label, text in rows if text]


def get_metric_unit(metric: str) -> str:
    """Return the unit in which differences of the metric are reported."""
    return "nats" if metric == "loss" else make_visible(metric)


def format_bound_label(confidence: float | None) -> str:
    """Return `95% bound`, or `bound` without a confidence level: one seed, or one number a rank."""
    return "bound" if confidence is None else f"{confidence:.0%} bound"


def format_interval_label(confidence: float | None) -> str:
    """Return `90% interval` for two bounds of 95% each, or `interval` without a confidence level."""
    return "interval" if confidence is None else f"{2 * confidence - 1:.0%} interval"


def format_table(rows: Sequence[Sequence[str]], left_columns: Collection[int] = ()) -> list[str]:
    """Format rows as lines with aligned columns. Columns in `left_columns` are aligned to the left, all others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if column in left_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


ENOUGH = {True: "yes", False: "no", None: "undecided"}  # by `is_shown_enough` or `RankEvidence.non_inferior`
