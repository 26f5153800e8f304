"""Collects a stream of examples: training examples on disk, and as many held-out ones as are evaluated."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from rightrank.io.example_store import Example, ExampleStore
from rightrank.io.examples import DataForm, has_control
from rightrank.records import SplitName
from rightrank.settings import SelectSettings

HELD_OUT: tuple[SplitName, ...] = ("selection", "test")


class SplitBuilder:
    def __init__(self, form: DataForm, settings: SelectSettings, folder: Path | None) -> None:
        self.train = ExampleStore(folder)
        self.held_out: dict[SplitName, _SmallestHashes] = {
            split: _SmallestHashes(settings.eval_items) for split in HELD_OUT
        }
        self.labels: set[str] = set()  # classification: of the training examples
        self.unreadable = 0
        self.equal_pairs = 0
        self.control_characters = 0  # in training examples
        self._is_classification = form == "classification"

    def add(self, split: SplitName, example: Example) -> None:
        if split != "train":
            self.held_out[split].add(example)
            return
        self.train.append(example)
        self.control_characters += has_control(example.content)
        if self._is_classification:
            self.labels.add(str(example.content["label"]))

    @property
    def rows(self) -> int:
        """All rows, those that are in no split included."""
        return len(self.train) + self.rows_held_out + self.unreadable + self.equal_pairs

    @property
    def rows_held_out(self) -> int:
        return sum(len(held.ids) for held in self.held_out.values())

    @property
    def distinct_held_out(self) -> int:
        return sum(len(np.unique(np.frombuffer(held.ids, np.uint64))) for held in self.held_out.values())

    def duplicates_across(self) -> int:
        """The number of distinct validation examples that are in train, and of test examples that are in either."""
        train, validation, test = (
            np.unique(np.frombuffer(ids, np.uint64))
            for ids in (self.train.ids, self.held_out["selection"].ids, self.held_out["test"].ids)
        )
        return len(np.intersect1d(train, validation)) + len(np.intersect1d(np.union1d(train, validation), test))


class _SmallestHashes:
    """Keeps the `limit` distinct examples with the smallest hashes, so that few change when the data set grows."""

    def __init__(self, limit: int) -> None:
        self.ids = array("Q")  # of all examples that were added
        self._limit = limit
        self._kept: dict[str, Example] = {}

    def add(self, example: Example) -> None:
        self.ids.append(int(example.item_id, 16))
        self._kept[example.item_id] = example
        if len(self._kept) > 2 * self._limit + 1000:
            self._kept = {kept.item_id: kept for kept in self.examples()}

    def examples(self) -> list[Example]:
        return [self._kept[item_id] for item_id in sorted(self._kept)[: self._limit]]


def fingerprint_of(builder: SplitBuilder, examples: Mapping[SplitName, Sequence[Example]]) -> str:
    digest = hashlib.sha256(b"train:")
    for number in builder.train.ids:
        digest.update(f"{number:016x}".encode())
    for split in HELD_OUT:
        digest.update(f"{split}:".encode())
        for example in examples[split]:
            digest.update(example.item_id.encode())
    return digest.hexdigest()
