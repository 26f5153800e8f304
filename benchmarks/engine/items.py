"""Memory against the number of training items: texts are read row by row, and texts and tokens are on disk.

    python -m benchmarks.engine.items MODEL DATA [--items 10000,100000,1000000] [--out items.json]

A JSONL file of as many rows is written: DATA's rows over and over, each with its number in front. It is read, split and
encoded as `select` does, with MODEL's tokenizer, a plan of 200 batches is drawn, and the batches are put together. Each
count runs in a process of its own. `anonymous` is what the process itself holds (RssAnon, seen every 50 ms) above what
it held before the first row; pages of a mapped file are the system's to drop and are not in it.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks.engine.common import machine
from rightrank.data.splits import load_data
from rightrank.models.base_models import BaseIdentity, LoadedModel
from rightrank.schema.settings import SelectSettings
from rightrank.train.batches import batch_plan, collate
from rightrank.train.tokens import encode

STEPS, BATCH = 200, 8


def write_rows(count: int, data: Path, path: Path) -> None:
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines() if line.strip()]
    with path.open("w", encoding="utf-8") as file:
        for number, row in enumerate(islice(cycle(rows), count)):
            file.write(json.dumps(row | {"prompt": f"{number} {row['prompt']}"}) + "\n")


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


@contextmanager
def watched() -> Iterator[list[int]]:
    """Within the block, the list holds the highest anonymous bytes seen."""
    highest, done = [anonymous_bytes()], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            highest[0] = max(highest[0], anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield highest
    finally:
        done.set()
        watcher.join()
        highest[0] = max(highest[0], anonymous_bytes())


def measure(count: int, model: Path, data: Path, folder: Path) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{count}.jsonl"
    write_rows(count, data, path)
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    tokenizer("once, so that what it makes on first use is there", return_offsets_mapping=True)
    # encoding asks for the tokenizer alone
    loaded = LoadedModel(
        None, tokenizer, str(model), "", torch.device("cpu"), BaseIdentity(name=str(model), config={}, weights={})
    )
    settings = SelectSettings(ranks=(1, 16), seq_len=128, batch_size=BATCH)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the rows above held goes back now, not while others are counted
    before, begun = anonymous_bytes(), time.process_time()
    with watched() as highest:
        splits = load_data(path, settings, folder)
        read = time.process_time()
        train = encode(splits, loaded, settings, folder).splits["train"]
        encoded = time.process_time()
        plan = batch_plan(len(train), BATCH, STEPS, seed=0)
        asked_for = sum(collate(train, indices, 0, torch.device("cpu")).tokens for indices in plan)
    result = {
        "items": count,
        "text_bytes": path.stat().st_size,
        "train_items": len(train),
        "tokens_on_disk": int(train.lengths.sum()),
        "tokens_asked_for": asked_for,
        "anonymous_bytes": highest[0] - before,
        "bytes_an_item": round((highest[0] - before) / count, 1),
        "read_seconds": read - begun,
        "encode_seconds": encoded - read,
    }
    path.unlink()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--items", type=lambda text: list(map(int, text.split(","))), default=[10**4, 10**5, 10**6])
    parser.add_argument("--work", type=Path, default=Path("bench-work"))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if len(arguments.items) == 1:
        print(json.dumps(measure(arguments.items[0], arguments.model, arguments.data, arguments.work)))
        return
    command = [sys.executable, "-m", "benchmarks.engine.items", str(arguments.model), str(arguments.data)]
    command += ["--work", str(arguments.work), "--items"]
    result: dict[str, Any] = {"machine": machine(), "runs": []}
    for count in arguments.items:
        run = subprocess.run([*command, str(count)], check=True, capture_output=True, text=True)
        result["runs"].append(json.loads(run.stdout.splitlines()[-1]))
        print(json.dumps(result["runs"][-1]), flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
