"""Check many random configurations of every architecture once each, and build the table of architectures from the stored rows.

python -m tests.training.architecture_table [--seeds 0:20] [--only NAME …]    # appends rows to the stored ones
python -m tests.training.architecture_table --page      # the table of benchmarks/architectures.md from the stored rows
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

from transformers.utils import logging

from tests.training.architecture_cases import ARCHITECTURES
from tests.training.architecture_checks import check_configuration

RESULTS = Path(__file__).parent / "architectures.jsonl"
PAGE = Path(__file__).parents[2] / "benchmarks" / "architectures.md"
MARK = "<!-- made by tests.training.architecture_table -->"
Row: TypeAlias = Mapping[str, Any]


def read_rows(path: Path) -> list[Row]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def append_row(row: Row, path: Path) -> None:
    """Append a row to the file, without empty fields and with figures of two digits."""
    figures = {name: float(f"{value:.1e}") for name, value in row["figures"].items()}
    short = {name: value for name, value in (dict(row) | {"figures": figures}).items() if value not in ("", 0, (), {})}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(short | {"seed": row["seed"]}) + "\n")


def format_tables(rows: Sequence[Row]) -> str:
    """Return the tables of architectures that train, by the fast paths that they use, and of those that are refused, by reason."""
    architectures: dict[str, list[Row]] = {}
    for row in rows:
        architectures.setdefault(row["architecture"].removesuffix(", text"), []).append(row)
    trained: dict[str, list[str]] = {}
    refused: dict[str, list[str]] = {}
    for name, group in architectures.items():
        if all(row["outcome"] == "refused" for row in group):
            refused.setdefault(_shorten_reason(group[0]["reason"]).replace(f"'{name}' is", "this is"), []).append(
                name.removesuffix(", refused")
            )
        else:
            trained.setdefault(_name_fast_paths(group), []).append(name)
    lines = [
        f"{len(rows):,} configurations of {len(architectures)} architectures; {sum(row['outcome'] == 'equal' for row in rows):,} equal, "
        f"{sum(row['outcome'] == 'refused' for row in rows):,} refused, {sum(row['outcome'] not in ('equal', 'refused') for row in rows):,} other.",
        "",
        "| architectures | equal | loss of a step, to PEFT | two in a pass, to each alone | loaded by PEFT | fast paths |",
        "|---|---|---|---|---|---|",
    ]
    for fast_paths, names in trained.items():
        group = [row for name in names for row in architectures[name]]
        equal = [row for row in group if row["outcome"] == "equal"]
        largest = [_format_largest(equal, figure) for figure in ("to PEFT", "together", "loaded")]
        listed = ", ".join(names).replace(", classes", " (classifier)")
        lines.append(f"| {listed} | {len(equal)} of {len(group)} | {' | '.join(largest)} | {fast_paths} |")
    lines += ["", "| refused | reason |", "|---|---|"]
    lines += [f"| {', '.join(names)} | {reason} |" for reason, names in refused.items()]
    return "\n".join(lines) + "\n"


def _name_fast_paths(rows: Sequence[Row]) -> str:
    """Return the fast paths that any equal configuration used."""
    fast_paths = {path for row in rows if row["outcome"] == "equal" for path in row.get("shortcuts", ())}
    return ", ".join(sorted(fast_paths)) or "none"


def _format_largest(rows: Iterable[Row], figure: str) -> str:
    figures = [row["figures"][figure] for row in rows if figure in row.get("figures", {})]
    return f"{max(figures):.0e}".replace("e-0", "e-").replace("0e+00", "0") if figures else "–"


def _shorten_reason(reason: str) -> str:
    """Return the reason without the path of the model."""
    return reason.removeprefix("…/base: ").replace("|", "\\|")


def write_page() -> None:
    """Replace everything below the mark of the page."""
    above, _, _ = PAGE.read_text(encoding="utf-8").partition(MARK)
    PAGE.write_text(f"{above}{MARK}\n\n{format_tables(read_rows(RESULTS))}", encoding="utf-8")


def main(words: list[str] | None = None) -> int:
    options = _parse(words)
    if options.page:
        write_page()
        return 0
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # untyped in transformers
    begun, bad = time.monotonic(), 0
    finished = {(row["architecture"], row["seed"]) for row in read_rows(options.out)}
    for seed in range(*options.seeds):
        for name in options.architectures:
            if (name, seed) in finished or time.monotonic() - begun > 60 * options.minutes:
                continue
            with tempfile.TemporaryDirectory() as folder:
                row = check_configuration(name, seed, Path(folder))
            append_row(asdict(row), options.out)
            if row.outcome in ("unequal", "crashed"):
                bad += 1
                print(f"{name} {seed}: {row.outcome}: {row.reason}", flush=True)
    return int(bad > 0)


def _parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=lambda text: tuple(map(int, text.split(":"))), default=(0, 20))
    parser.add_argument("--architectures", type=lambda text: text.split(";"), default=list(ARCHITECTURES))
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--page", action="store_true")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(main())
