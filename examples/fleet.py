"""One rank for many adapters of a server: the smallest to which all of them can be truncated without losing more than the margin.

python examples/fleet.py tasks/first tasks/second --model model --data data.jsonl --out common --margin 0.05

A server such as vLLM reserves a slot of `--max-lora-rank` for every adapter, so the largest rank counts.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rightrank import SelectSettings, inspect, resize


def truncate_fleet(
    adapters: Sequence[Path],
    out: Path,
    model: str,
    data: Sequence[Path],
    margin: float | None = None,
    settings: SelectSettings | None = None,
) -> int:
    """Write every adapter at the smallest common rank to a folder of its name in `out`, and return that rank.

    Each adapter is measured on its own held-out rows, against itself. All hold at the common rank, each with 95% confidence; the claim
    that all do is wrong only where one of them is, so it needs no correction.

    Args:
        adapters: two adapter folders or more, of one base and of different names.
        out: the folder to write, which must not exist.
        model: the base of all adapters.
        data: held-out rows: one file for all adapters, or one for each.
        margin: how much an adapter may lose; None for the metric's default.
        settings: how models and rows are read.
    """
    names = [adapter.name for adapter in adapters]
    if len(set(names)) < max(2, len(names)):
        raise ValueError(f"adapter folders {', '.join(names)}: give two or more with different names")
    if len(data) not in (1, len(adapters)):
        raise ValueError(f"{len(data)} data files for {len(adapters)} adapters: give one for all, or one for each")
    if out.exists():
        raise ValueError(f"{out} exists: give a new folder")
    files = list(data) * len(adapters) if len(data) == 1 else list(data)

    enough: dict[str, int] = {}
    full: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        for adapter, file in zip(adapters, files, strict=True):
            enough[adapter.name] = full[adapter.name] = max(module.rank for module in inspect(adapter).modules)
            if full[adapter.name] > 1:  # below rank 1 there is nothing to measure
                candidate = Path(folder) / adapter.name
                resized = resize(adapter, candidate, data=file, base=model, margin=margin, settings=settings)
                assert resized.answer is not None  # with data there is an answer
                enough[adapter.name] = resized.answer.rank
            print(f"{adapter.name}: rank {enough[adapter.name]} is enough of {full[adapter.name]}")
    common = max(enough.values())
    for adapter, file in zip(adapters, files, strict=True):
        if full[adapter.name] <= common:
            shutil.copytree(adapter, out / adapter.name)  # the server pads it
        else:
            out.mkdir(exist_ok=True)
            ranks = (common, full[adapter.name])
            resize(adapter, out / adapter.name, data=file, base=model, margin=margin, ranks=ranks, settings=settings)
    return common


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs="+", type=Path)
    parser.add_argument("--model", required=True, help="the base of all adapters")
    parser.add_argument(
        "--data", action="append", type=Path, required=True, help="held-out rows, once or for each adapter"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--margin", type=float)
    options = parser.parse_args()
    rank = truncate_fleet(options.adapters, options.out, options.model, options.data, options.margin)
    print(f"All {len(options.adapters)} adapters hold at rank {rank}: {options.out}")


if __name__ == "__main__":
    main()
