"""The command line of studies that train one task at a time: rows of a task replace its stored ones; `--table` prints what is stored."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine

Row = dict[str, Any]


def run_study(
    description: str | None,
    tasks: Collection[str],
    rows_of: Callable[[argparse.Namespace], Iterable[Row]],
    table: Callable[[Sequence[Row]], str],
    default_out: Path,
) -> None:
    """`rows_of` takes `task`, `model`, `data` and `work`; every row names its `task`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", choices=tasks)
    parser.add_argument("model", nargs="?", help="folder or GGUF file of the base")
    parser.add_argument("data", nargs="?", type=Path)
    parser.add_argument("--work", type=Path, help="folder of finished trainings")
    parser.add_argument("--out", type=Path, default=default_out, help="the file of results")
    parser.add_argument("--table", action="store_true", help="print what is stored and train nothing")
    options = parser.parse_args()
    stored = json.loads(options.out.read_text()) if options.out.exists() else {"machine": machine(), "rows": []}
    if not options.table:
        torch.set_num_threads(1)
        new = list(rows_of(options))
        stored["rows"] = [row for row in stored["rows"] if row["task"] != options.task] + new
        options.out.write_text(json.dumps(stored, separators=(",", ":")) + "\n")
    print(table(stored["rows"]))
