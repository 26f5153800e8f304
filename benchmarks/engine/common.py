"""Helpers of the engine's benchmarks: the machine's facts, and a runtime over a model and a data file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe_machine as plain_machine
from rightrank.bases.base_models import load_base
from rightrank.data.splits import load_data
from rightrank.data.token_store import TokenStore
from rightrank.evaluation.tokens import EncodedData, encode_splits
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import SplitName
from rightrank.training.runtime import Runtime, build_runtime

DEFAULTS: dict[str, Any] = {
    "ranks": (1, 16),
    "batch_size": 8,
    "seq_len": 128,
    "max_eval_examples": 96,
    "num_evaluations": 1,
}


def describe_machine() -> dict[str, Any]:
    """Return the machine's facts, with the threads and the device that a timing depends on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {**plain_machine(), "threads": torch.get_num_threads(), "cuda": device}


def make_runtime(model: str, data: Path, steps: int, cache: Path | None, **changes: Any) -> Runtime:
    settings = SelectSettings(**DEFAULTS | changes)
    splits = load_data(data, settings)
    loaded = load_base(model, settings, splits.summary.classes)
    return build_runtime(loaded, encode_splits(splits, loaded, settings), settings, steps, cache)


def limit_to_one_pass(runtime: Runtime, cache: Path | None) -> Runtime:
    """Return the runtime with exactly as many training examples as its steps need, so that each is used once."""
    needed = runtime.steps * runtime.settings.examples_per_step
    splits = dict(runtime.data.splits) | {"train": TokenStore(runtime.data.splits["train"][:needed], None)}
    short = EncodedData(splits, runtime.data.texts, runtime.data.summary)
    return build_runtime(runtime.loaded, short, runtime.settings, runtime.steps, cache)


def build_trainer_rows(runtime: Runtime, split: SplitName) -> list[dict[str, list[int]]]:
    """Return a split's examples in the form that Trainer reads."""
    return [{"input_ids": list(item.input_ids), "labels": list(item.labels)} for item in runtime.data.splits[split]]
