"""Items on disk are the items that were added, and few bytes are held."""

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


def test_items_come_back_in_order_and_by_number(tmp_path: Path) -> None:
    examples = list(generate_examples(600))  # of which a file's batches hold 256 each
    store = ExampleStore(examples, tmp_path / "work")
    assert list(store) == examples
    assert [store[number] for number in (599, 0, -1)] == [examples[599], examples[0], examples[599]]
    assert store[10:13] == examples[10:13]
    assert list((tmp_path / "work").iterdir()) == []
    with pytest.raises(IndexError):
        store[600]


def test_what_is_held_of_many_rows_does_not_grow_with_their_texts(tmp_path: Path) -> None:
    settings = build_small_settings(max_eval_examples=20)

    def measure_peak_bytes(letters: int) -> int:
        rows = ({"text": f"row {number} {'y' * letters}"} for number in range(4000))
        tracemalloc.start()
        splits = load_data(rows, settings, tmp_path)
        peak_bytes = tracemalloc.get_traced_memory()[1]  # the peak on the way
        tracemalloc.stop()
        assert len(splits.examples["train"]) > 2000
        return peak_bytes

    short, long = measure_peak_bytes(10), measure_peak_bytes(2000)
    assert (
        long - short < 3 * 2**20
    )  # of the 8 MB that the texts take; some held-out ones and a batch are kept on the way
