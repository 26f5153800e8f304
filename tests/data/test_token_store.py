"""Encoded examples on disk equal the encoded ones, and use memory only while they are read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pytest

from rightrank.data.token_store import EncodedExample, TokenStore


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
