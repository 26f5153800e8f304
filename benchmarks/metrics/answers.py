"""What answers cost: batched with a cache, one at a time, one at a time without a cache, and beside one held-out loss.

`python -m benchmarks.metrics.answers` with the demo's model. All in one process, each way in turn, the best of the repeats.
The texts must be the same whichever way they were written; how many are is part of the result.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine
from rightrank.data.splits import load_data
from rightrank.demo import prepare_docstrings, prepare_model_folder
from rightrank.models.base_models import load_base
from rightrank.schema.settings import SelectSettings
from rightrank.train.generation import answers, prompts
from rightrank.train.runtime import Runtime
from rightrank.train.tokens import encode

RESULTS = Path(__file__).parent / "answers.json"


def bench_of(model: Path, data: Path, settings: SelectSettings, cache: Path) -> Runtime:
    """The workbench, with everything in place to write."""
    splits = load_data(data, settings)
    loaded = load_base(str(model), settings, splits.summary.classes)
    return Runtime(loaded, encode(splits, loaded, settings), settings, 1, cache)


def one_at_a_time(runtime: Runtime, cached: bool) -> list[str]:
    """transformers' `generate` on one prompt after the other."""
    tokenizer: Any = runtime.loaded.tokenizer
    written = []
    with torch.no_grad():
        for prompt in prompts(runtime, "selection"):
            given = tokenizer(prompt.text, return_tensors="pt")
            output = runtime.model.generate(
                **given,
                do_sample=False,
                max_new_tokens=runtime.settings.max_new_tokens,
                use_cache=cached,
                pad_token_id=tokenizer.pad_token_id,
            )
            written.append(tokenizer.decode(output[0, given["input_ids"].shape[1] :], skip_special_tokens=True))
    return written


def compare(runtime: Runtime, repeats: int) -> dict[str, Any]:
    """Seconds of each way, their ratios to the batched one, and how many texts are the same."""
    ways: dict[str, Callable[[], Sequence[str]]] = {
        "batched, cached": lambda: [answer.completion for answer in answers(runtime, "selection")],
        "one at a time, cached": lambda: one_at_a_time(runtime, True),
        "one at a time, no cache": lambda: one_at_a_time(runtime, False),
        "held-out loss": lambda: [str(runtime.evaluate("selection").loss)],
    }
    seconds = dict.fromkeys(ways, float("inf"))
    texts: dict[str, Sequence[str]] = {}
    for _ in range(repeats):
        for name, way in ways.items():
            begun = time.perf_counter()
            texts[name] = way()
            seconds[name] = min(seconds[name], time.perf_counter() - begun)
    ours = texts["batched, cached"]
    return {
        "items": len(ours),
        "max_new_tokens": runtime.settings.max_new_tokens,
        "batch": runtime.settings.eval_batch_size,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "times the batched": {name: round(value / seconds["batched, cached"], 2) for name, value in seconds.items()},
        "same texts": {name: sum(a == b for a, b in zip(texts[name], ours, strict=True)) for name in list(ways)[1:3]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=16)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--store", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = prepare_model_folder(folder / "model", print)
        data = prepare_docstrings(folder / "docstrings.jsonl")
        settings = SelectSettings(
            eval_items=asked.items,
            max_new_tokens=asked.new,
            seq_len=160,
            device="cpu",
            cache_prefix=False,
        )
        found = {"machine": machine(), **compare(bench_of(model, data, settings, folder / "cache"), asked.repeats)}
    text = json.dumps(found, indent=1)
    print(text)
    if asked.store:
        RESULTS.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
