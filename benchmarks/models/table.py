"""The kept rows, and the table of architectures that they give."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

RESULTS = Path(__file__).parent / "results.jsonl"
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "architectures.md"
MARK = "<!-- made by benchmarks.models -->"
Row: TypeAlias = Mapping[str, Any]


def kept(path: Path) -> list[Row]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def keep(row: Row, path: Path) -> None:
    """Append it, without what is empty; figures to two digits."""
    figures = {name: float(f"{value:.1e}") for name, value in row["figures"].items()}
    short = {name: value for name, value in (dict(row) | {"figures": figures}).items() if value not in ("", 0, (), {})}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(short | {"seed": row["seed"]}) + "\n")


def tables(rows: Sequence[Row]) -> str:
    """What trains, by architecture, and what is refused."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["architecture"].removesuffix(", text"), []).append(row)
    trained = {name: group for name, group in groups.items() if any(row["outcome"] != "refused" for row in group)}
    lines = [
        f"{len(rows):,} configurations of {len(groups)} architectures; {sum(row['outcome'] == 'equal' for row in rows):,} equal, "
        f"{sum(row['outcome'] == 'refused' for row in rows):,} refused, {sum(row['outcome'] not in ('equal', 'refused') for row in rows):,} other.",
        "",
        "| architecture | equal | loss of a step, to PEFT | two in a pass, to each alone | loaded by PEFT | faster ways taken |",
        "|---|---|---|---|---|---|",
    ]
    lines += [_trained(name, group) for name, group in trained.items()]
    lines += ["", "| refused | in one line |", "|---|---|"]
    lines += [f"| {name} | {_words(group[0]['reason'])} |" for name, group in groups.items() if name not in trained]
    return "\n".join(lines) + "\n"


def _trained(name: str, group: Sequence[Row]) -> str:
    equal = [row for row in group if row["outcome"] == "equal"]
    shown = [
        f"{len(equal)} of {len(group)}",
        *(_largest(equal, figure) for figure in ("to PEFT", "together", "loaded")),
    ]
    if not any("together" in row["figures"] for row in equal):
        shown[2] = _words(next((row["alone"] for row in equal if "alone" in row), "–"))
    taken = dict.fromkeys(way for row in equal for way in row.get("shortcuts", ()))
    return f"| {name} | {' | '.join(shown)} | {', '.join(sorted(taken)) or '–'} |"


def _largest(rows: Iterable[Row], figure: str) -> str:
    found = [row["figures"][figure] for row in rows if figure in row.get("figures", {})]
    return f"{max(found):.0e}".replace("e-0", "e-").replace("0e+00", "0") if found else "–"


def _words(reason: str) -> str:
    """A line without the place of the model."""
    return reason.removeprefix("…/base: ").replace("|", "\\|")


def write_page() -> None:
    """Everything below the mark of the page is made anew."""
    above, _, _ = PAGE.read_text(encoding="utf-8").partition(MARK)
    PAGE.write_text(f"{above}{MARK}\n\n{tables(kept(RESULTS))}", encoding="utf-8")
