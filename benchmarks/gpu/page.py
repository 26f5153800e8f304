"""The tables of README.md, made from a result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.machine import machine_text

MARK = "<!-- made by benchmarks.gpu -->"


def write_page(result: dict[str, Any], page: Path) -> None:
    """Everything below the mark of the page anew."""
    above = page.read_text(encoding="utf-8").partition(MARK)[0]
    page.write_text(f"{above}{MARK}\n\n{tables(result)}", encoding="utf-8")


def tables(result: dict[str, Any]) -> str:
    """A table a part, a row a case, a column a figure."""
    blocks = [f"{result['gpu'] or 'CPU (a rehearsal)'}; {machine_text(result['machine'])}.\n"]
    for name, part in result["parts"].items():
        blocks.append(f"## {name}\n\n{part['state']} in {part['seconds']:.0f} s{_after(part['reason'])}\n")
        if part["rows"]:
            columns = list(part["rows"][0])
            lines = [
                columns,
                ["---"] * len(columns),
                *([_cell(row.get(key)) for key in columns] for row in part["rows"]),
            ]
            blocks.append("\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")
    return "\n".join(blocks)


def _after(reason: str | None) -> str:
    return f": {reason}" if reason else ""


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return "; ".join(_cell(inner) for inner in value)
    return "–" if value is None else str(value).replace("|", "\\|")
