"""Test that examples on disk equal the added ones and take little memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from rightrank.data.forms import Example
from rightrank.data.splits import ExampleStore, load_data
from tests.tiny import build_small_settings


def generate_examples(count: int) -> Iterator[Example]:
    for number in range(count):
        messages = [
            {"role": "user", "content": f"é {number} {'x' * (number % 90)}"},
            {"role": "assistant", "content": "\u2028"},
        ]
        yield Example(f"{number * 0x9E3779B97F4A7C15 % 2**64:016x}", {"messages": messages}, f"d.jsonl:{number}")


def test_examples_are_stored_in_order_and_by_index(tmp_path: Path) -> None:
    examples = list(generate_examples(600))  # more than two batches of 256
    store = ExampleStore(examples, tmp_path / "work")
    assert list(store) == examples
    assert [store[number] for number in (599, 0, -1)] == [examples[599], examples[0], examples[599]]
    assert store[10:13] == examples[10:13]
    assert list((tmp_path / "work").iterdir()) == []
    with pytest.raises(IndexError):
        store[600]


def test_memory_does_not_grow_with_the_length_of_texts(tmp_path: Path) -> None:
    settings = build_small_settings(max_eval_examples=20)

    def measure_peak_bytes(letters: int) -> int:
        rows = ({"text": f"row {number} {'y' * letters}"} for number in range(4000))
        tracemalloc.start()
        splits = load_data(rows, settings, tmp_path)
        peak_bytes = tracemalloc.get_traced_memory()[1]  # the peak during loading
        tracemalloc.stop()
        assert len(splits.examples["train"]) > 2000
        return peak_bytes

    short, long = measure_peak_bytes(10), measure_peak_bytes(2000)
    assert long - short < 3 * 2**20  # The texts take 8 MB; only held-out examples and one batch are in memory.
