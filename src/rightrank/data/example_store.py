"""Examples on disk and in samples: the store of the training examples, and the samples of the held-out ones."""

from __future__ import annotations

import hashlib
import json
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow

from rightrank.data.forms import Example, to_json_value
from rightrank.data.token_store import Store

_ESCAPED_SPACE = re.compile(r"\\(?:[nrtf]|u00(?:0b|1[c-f]))")  # white space as JSON writes it


class ExampleStore(Store[Example]):
    """Examples in the order in which they were read."""

    schema = pyarrow.schema(
        {
            "number": pyarrow.uint64(),
            "group": pyarrow.uint64(),
            "near_hash": pyarrow.uint64(),
            "content": pyarrow.large_string(),
            "origin": pyarrow.large_binary(),
        }
    )

    def row(self, entry: Example) -> Mapping[str, Any]:
        origin = os.fsencode(entry.origin)
        numbers = {
            "number": int(entry.example_id, 16),
            "group": entry.group,
            "near_hash": hash_normalized_text(entry),
        }
        return {**numbers, "content": _serialize_content(entry), "origin": origin}

    def entry(self, row: Mapping[str, Any]) -> Example:
        content = json.loads(row["content"])
        return Example(f"{row['number']:016x}", content, os.fsdecode(row["origin"]), row["group"])

    def numbers(self, column: str = "number") -> Iterator[npt.NDArray[np.uint64]]:
        """Yield a numeric column in batches: identities (`number`), groups (`group`) or hashes of the normalized text (`near_hash`)."""
        return (batch[column].to_numpy() for batch in self.batches())


class HashSample:
    """The `limit` distinct examples with the smallest hashes, so that few examples change when the data set grows."""

    def __init__(self, limit: int) -> None:
        self.ids = array("Q")  # of all examples that were added
        self._limit = limit
        self._examples_by_id: dict[str, Example] = {}

    def add(self, example: Example) -> None:
        self.ids.append(int(example.example_id, 16))
        self._examples_by_id[example.example_id] = example
        if len(self._examples_by_id) > 2 * self._limit + 1000:
            self._examples_by_id = {example.example_id: example for example in self.select_examples()}

    def select_examples(self) -> list[Example]:
        return [self._examples_by_id[example_id] for example_id in sorted(self._examples_by_id)[: self._limit]]


def find_members(numbers: npt.NDArray[np.uint64], chunks: Iterable[npt.NDArray[np.uint64]]) -> npt.NDArray[np.bool_]:
    """Return for each of `numbers`, which are sorted, whether any chunk contains it. The chunks are never joined in memory."""
    is_member = np.zeros(len(numbers), np.bool_)
    for chunk in chunks if len(numbers) else ():
        positions = np.searchsorted(numbers[:-1], chunk)
        is_member[positions[numbers[positions] == chunk]] = True
    return is_member


def compute_fingerprint(train: ExampleStore, held_out: Mapping[str, Sequence[Example]]) -> str:
    """Return a hash of the examples of every split, in their order."""
    digest = hashlib.sha256(b"train:")
    for numbers in train.numbers():
        digest.update("".join(f"{number:016x}" for number in numbers.tolist()).encode())
    for split, examples in held_out.items():
        digest.update(f"{split}:".encode())
        for example in examples:
            digest.update(example.example_id.encode())
    return digest.hexdigest()


def _serialize_content(example: Example) -> str:
    return json.dumps(dict(example.content), ensure_ascii=False, default=to_json_value)


def hash_normalized_text(example: Example) -> int:
    """Return a hash that is equal for examples that differ only in white space and case."""
    text = "".join(_ESCAPED_SPACE.sub(" ", _serialize_content(example)).casefold().split())
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())
