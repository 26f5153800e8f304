"""Write the tables of README.md from a result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.machine import format_machine

MARK = "<!-- made by benchmarks.gpu -->"


def write_page(result: dict[str, Any], page: Path) -> None:
    """Replace everything below the mark in the page."""
    above = page.read_text(encoding="utf-8").partition(MARK)[0]
    page.write_text(f"{above}{MARK}\n\n{format_tables(result)}", encoding="utf-8")


def format_tables(result: dict[str, Any]) -> str:
    """Format a table for each part, with a row for each case and a column for each figure."""
    blocks = [f"{result['gpu'] or 'CPU (a rehearsal)'}; {format_machine(result['machine'])}.\n"]
    for name, part_result in result["parts"].items():
        blocks.append(
            f"## {name}\n\n{part_result['state']} in {part_result['seconds']:.0f} s{_format_reason(part_result['reason'])}\n"
        )
        if part_result["rows"]:
            columns = list(part_result["rows"][0])
            lines = [
                columns,
                ["---"] * len(columns),
                *([_format_cell(row.get(key)) for key in columns] for row in part_result["rows"]),
            ]
            blocks.append("\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")
    return "\n".join(blocks)


def _format_reason(reason: str | None) -> str:
    return f": {reason}" if reason else ""


def _format_cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_format_cell(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return "; ".join(_format_cell(inner) for inner in value)
    return "–" if value is None else str(value).replace("|", "\\|")
