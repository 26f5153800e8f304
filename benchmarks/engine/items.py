"""Memory against the number of training items: encoded items are on disk, and batches read what they ask for.

    python -m benchmarks.engine.items [--items 10000,100000,1000000] [--out items.json]

Items of 20 to 180 drawn token ids go through the store that `encode` fills, a batch plan of 200 steps is drawn, and its
batches are put together. Each count runs in a process of its own. `anonymous` is what the process itself holds (RssAnon)
above what it held before the first item; pages of a mapped file are the system's to drop and are not in it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.engine.common import machine
from rightrank.engine.batches import batch_plan, collate
from rightrank.engine.token_store import EncodedItem, TokenStore

STEPS, BATCH = 200, 8


def drawn_items(count: int) -> Iterator[EncodedItem]:
    generator = np.random.default_rng(0)
    for number in range(count):
        ids = generator.integers(0, 49152, int(generator.integers(20, 180))).tolist()
        yield EncodedItem(f"{number:016x}", ids, ids)


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def measure(count: int, folder: Path) -> dict[str, Any]:
    before, begun = anonymous_bytes(), time.process_time()
    store = TokenStore(drawn_items(count), folder)
    plan = batch_plan(len(store), BATCH, STEPS, seed=0)
    tokens = sum(collate(store, indices, 0, torch.device("cpu")).tokens for indices in plan)
    return {
        "items": count,
        "tokens_on_disk": int(store.lengths.sum()),
        "tokens_asked_for": tokens,
        "anonymous_bytes": anonymous_bytes() - before,
        "bytes_an_item": round((anonymous_bytes() - before) / count, 1),
        "seconds": time.process_time() - begun,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=lambda text: list(map(int, text.split(","))), default=[10**4, 10**5, 10**6])
    parser.add_argument("--work", type=Path, default=Path("bench-work"))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if len(arguments.items) == 1:
        print(json.dumps(measure(arguments.items[0], arguments.work)))
        return
    command = [sys.executable, "-m", "benchmarks.engine.items", "--work", str(arguments.work), "--items"]
    runs = [subprocess.run([*command, str(n)], check=True, capture_output=True, text=True) for n in arguments.items]
    result = {"machine": machine(), "runs": [json.loads(run.stdout) for run in runs]}
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
