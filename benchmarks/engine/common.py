"""What the engine's benchmarks share: the machine's facts, and a bench over a model and a data file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine as plain_machine
from rightrank.engine.bench import Bench
from rightrank.engine.encode import EncodedData, encode
from rightrank.io.data import load_data
from rightrank.io.models import load_model
from rightrank.records import SplitName
from rightrank.settings import make_settings

DEFAULTS: dict[str, Any] = {
    "ranks": (1, 16),
    "batch_size": 8,
    "seq_len": 128,
    "eval_items": 96,
    "eval_points": 1,
    "samples": 0,
}


def machine() -> dict[str, Any]:
    """The machine's facts, with the threads and the device that a timing depends on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {**plain_machine(), "threads": torch.get_num_threads(), "cuda": device}


def make_bench(model: str, data: Path, steps: int, cache: Path, **changes: Any) -> Bench:
    settings = make_settings(DEFAULTS | changes)
    splits = load_data(data, settings)
    loaded = load_model(model, settings.dtype, settings.device, splits.classes)
    return Bench(loaded, encode(splits, loaded, settings), settings, steps, cache)


def one_pass(bench: Bench, cache: Path) -> Bench:
    """The bench with exactly as many training items as its steps take, so that everyone sees each once."""
    needed = bench.steps * bench.settings.items_per_step
    splits = dict(bench.data.splits) | {"train": bench.data.splits["train"][:needed]}
    short = EncodedData(splits, bench.data.texts, bench.data.summary)
    return Bench(bench.loaded, short, bench.settings, bench.steps, cache)


def trainer_rows(bench: Bench, split: SplitName) -> list[dict[str, list[int]]]:
    """A split's items as Trainer takes them."""
    return [{"input_ids": list(item.input_ids), "labels": list(item.labels)} for item in bench.items(split)]
