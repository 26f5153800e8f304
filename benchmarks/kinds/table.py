"""The table of kinds and checks.

python -m benchmarks.kinds.table      # writes results.json and results.md beside this file
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from benchmarks.kinds.cases import CASES
from benchmarks.kinds.checks import CHECKS, Suite
from benchmarks.kinds.image_checks import IMAGES, row_of
from benchmarks.machine import machine

FOLDER = Path(__file__).parent


def rows() -> list[dict[str, str]]:
    found = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as name:
            suite = Suite.of(case, Path(name))
            found.append({"kind": case.name, **{check: function(suite) for check, function in CHECKS.items()}})
            print(found[-1], flush=True)
    for name in IMAGES:
        with tempfile.TemporaryDirectory() as folder:
            found.append(row_of(name, Path(folder)))
            print(found[-1], flush=True)
    return found


def as_markdown(found: list[dict[str, str]]) -> str:
    names = list(found[0])
    lines = [names, ["---"] * len(names), *([row[name] for name in names] for row in found)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    found = rows()
    (FOLDER / "results.json").write_text(json.dumps({"machine": machine(), "kinds": found}, indent=1) + "\n")
    (FOLDER / "results.md").write_text(as_markdown(found))


if __name__ == "__main__":
    main()
