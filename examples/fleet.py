"""Find one rank for many adapters of a server: the smallest to which all of them can be truncated within the margin.

python examples/fleet.py tasks/first tasks/second --model model --data data.jsonl --out common --margin 0.05

A server such as vLLM reserves a slot of `--max-lora-rank` for every adapter, so the largest rank determines the memory.
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

    Each adapter is compared with itself on its own held-out rows and is within the margin with 95% confidence. The common rank is only too
    small if it is too small for the adapter that needs the largest rank, so no correction for several comparisons is needed.

    Args:
        adapters: at least two adapter folders with the same base model and different names.
        out: the folder to write, which must not exist.
        model: the base model of all adapters.
        data: files of held-out rows, either one for all adapters or one for each.
        margin: how much quality an adapter may lose; None for the metric's default.
        settings: how models and rows are read.
    """
    names = [adapter.name for adapter in adapters]
    if len(set(names)) < max(2, len(names)):
        raise ValueError(f"got the adapter folders {', '.join(names)}; give two or more with different names")
    if len(data) not in (1, len(adapters)):
        raise ValueError(f"got {len(data)} data files for {len(adapters)} adapters; give one for all, or one for each")
    if out.exists():
        raise ValueError(f"{out} exists; give a new folder")
    files = list(data) * len(adapters) if len(data) == 1 else list(data)

    sufficient_ranks: dict[str, int] = {}
    full_ranks: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        for adapter, file in zip(adapters, files, strict=True):
            sufficient_ranks[adapter.name] = full_ranks[adapter.name] = max(
                module.rank for module in inspect(adapter).modules
            )
            if full_ranks[adapter.name] > 1:  # Rank 1 cannot be truncated.
                candidate = Path(folder) / adapter.name
                resized = resize(adapter, candidate, data=file, base=model, margin=margin, settings=settings)
                assert resized.answer is not None  # There is always an answer with data.
                sufficient_ranks[adapter.name] = resized.answer.rank
            print(f"{adapter.name}: rank {sufficient_ranks[adapter.name]} is enough of {full_ranks[adapter.name]}")
    common_rank = max(sufficient_ranks.values())
    for adapter, file in zip(adapters, files, strict=True):
        if full_ranks[adapter.name] <= common_rank:
            shutil.copytree(adapter, out / adapter.name)  # The server pads it.
        else:
            out.mkdir(exist_ok=True)
            ranks = (common_rank, full_ranks[adapter.name])
            resize(adapter, out / adapter.name, data=file, base=model, margin=margin, ranks=ranks, settings=settings)
    return common_rank


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs="+", type=Path)
    parser.add_argument("--model", required=True, help="base model of all adapters")
    parser.add_argument(
        "--data",
        action="append",
        type=Path,
        required=True,
        help="held-out rows, one file for all adapters or one for each",
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--margin", type=float)
    options = parser.parse_args()
    rank = truncate_fleet(options.adapters, options.out, options.model, options.data, options.margin)
    print(f"All {len(options.adapters)} adapters are within the margin at rank {rank}: {options.out}")


if __name__ == "__main__":
    main()
