"""Many random configurations of every architecture, each checked; the rows are kept, and what is kept is not checked again.

    python -m benchmarks.models [--seeds 0:20] [--architectures NAME;NAME] [--minutes 60] [--out benchmarks/models/results.jsonl]
    python -m benchmarks.models --page      # the table of docs/reference/architectures.md from what is kept

Ends with status 1 where a configuration is unequal or crashes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from transformers.utils import logging

from benchmarks.models.checks import check
from benchmarks.models.generator import ARCHITECTURES
from benchmarks.models.table import RESULTS, keep, kept, write_page


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
