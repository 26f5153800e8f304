"""Many random configurations of every architecture, each checked once; and the table of architectures that the stored rows give.

    python -m tests.train.architecture_table [--seeds 0:20] [--architectures NAME;NAME] [--minutes 60] [--out FILE]
    python -m tests.train.architecture_table --page      # the table of docs/reference/architectures.md from the stored rows

Ends with status 1 where a configuration is unequal or crashes.
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

from tests.train.architecture_cases import ARCHITECTURES
from tests.train.architecture_checks import check

RESULTS = Path(__file__).parent / "architectures.jsonl"
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "architectures.md"
MARK = "<!-- made by tests.train.architecture_table -->"
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


def main(words: list[str] | None = None) -> int:
    given = _parse(words)
    if given.page:
        write_page()
        return 0
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # untyped in transformers
    begun, bad = time.monotonic(), 0
    done = {(row["architecture"], row["seed"]) for row in kept(given.out)}
    for seed in range(*given.seeds):
        for name in given.architectures:
            if (name, seed) in done or time.monotonic() - begun > 60 * given.minutes:
                continue
            with tempfile.TemporaryDirectory() as folder:
                row = check(name, seed, Path(folder))
            keep(asdict(row), given.out)
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
