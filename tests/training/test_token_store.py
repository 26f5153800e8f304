"""Encoded examples on disk equal the encoded ones, and use memory only while they are read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pytest

from rightrank.data.token_store import EncodedExample, TokenStore
from rightrank.training.batches import batch_by_length


def some_items(count: int, longest: int = 40) -> Iterator[EncodedExample]:
    generator = np.random.default_rng(0)
    for number in range(count):
        ids = generator.integers(0, 2**31 - 1, generator.integers(1, longest)).tolist()
        labels = [-100, *ids[1:]] if number % 3 else [number % 5]
        yield EncodedExample(f"item-{number}#é", ids, labels)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return TokenStore(some_items(3000), tmp_path_factory.mktemp("store"))


def test_examples_are_read_as_they_were_written(store: TokenStore) -> None:
    items = list(some_items(3000))
    assert len(store) == len(items)
    assert list(store) == items
    assert store[-1] == items[-1]
    assert store[5:9] == items[5:9]
    assert store.lengths.tolist() == [item.length for item in items]
    with pytest.raises(IndexError):
        store[3000]


def test_the_longest_sequence_of_a_pair_is_that_of_its_longer_half(tmp_path: Path) -> None:
    items = [EncodedExample("pair", [1] * 7, [1] * 7, 2), EncodedExample("one", [1] * 3, [1] * 3)]
    assert TokenStore(items, tmp_path).longest_sequences.tolist() == [5, 3]


def test_nothing_is_left_in_the_folder_and_nothing_held(tmp_path: Path) -> None:
    original_bytes = pyarrow.total_allocated_bytes()
    stored = TokenStore(some_items(2000, longest=400), tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert pyarrow.total_allocated_bytes() - original_bytes < 100 * 2**10  # of the 3 MB that the tokens take
    assert len(stored) == 2000


def test_an_empty_split_is_empty(tmp_path: Path) -> None:
    stored = TokenStore([], tmp_path)
    assert len(stored) == 0
    assert list(stored) == []


def test_batches_are_of_like_length(store: TokenStore) -> None:
    items = list(some_items(3000))
    order = sorted(range(3000), key=lambda index: items[index].length)
    assert batch_by_length(store, 16) == [order[start : start + 16] for start in range(0, 3000, 16)]
