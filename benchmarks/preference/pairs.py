"""Preference pairs that cost nothing and have a truth: a word's own gloss in WordNet against the gloss of another word.

    python -m benchmarks.preference.pairs glosses.jsonl --out gloss_pairs.jsonl

The rejected gloss begins with the same word and is of like length, so that its style says nothing. `glosses.jsonl` is that of
`benchmarks.selection.texts`.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

ROWS, SEED = 720, 0
MAX_WORD, MIN_GLOSS, MAX_GLOSS = 24, 12, 48  # characters

Row = dict[str, str]


def pairs(rows: Sequence[Row]) -> Iterator[Row]:
    """Every short row with its gloss, and the gloss of nearest length that begins alike and is of another word."""
    short = [row for row in rows if len(row["prompt"]) <= MAX_WORD and MIN_GLOSS <= len(row["completion"]) <= MAX_GLOSS]
    alike: dict[str, list[Row]] = defaultdict(list)
    for row in short:
        alike[row["completion"].split()[0]].append(row)
    for row in short:
        gloss = row["completion"]
        others = [other["completion"] for other in alike[gloss.split()[0]] if other["prompt"] != row["prompt"]]
        if others:
            foreign = min(others, key=lambda other: (abs(len(other) - len(gloss)), other))
            yield {"prompt": row["prompt"], "chosen": gloss, "rejected": foreign}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("glosses", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.glosses.read_text(encoding="utf-8").splitlines()]
    found = [row for row in pairs(rows) if row["chosen"] != row["rejected"]]
    chosen = random.Random(SEED).sample(found, ROWS)
    options.out.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")


if __name__ == "__main__":
    main()
