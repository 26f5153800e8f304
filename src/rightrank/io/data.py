"""Turns rows into examples in splits: detects the form of the data and holds examples out.

Given splits are kept. Otherwise a hash of an example's content (or of its `group` column) decides between train,
validation and test: duplicates fall into one split, and examples stay in their split when the data set grows.
"""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from rightrank.errors import DataError
from rightrank.io.example_store import Example, ExampleStore
from rightrank.io.reading import is_text
from rightrank.io.rows import Row, RowsBySplit, read_rows, rows_from_memory
from rightrank.records import SplitName
from rightrank.records.base import split_name
from rightrank.settings import SelectSettings

DataForm: TypeAlias = Literal["text", "prompt_completion", "messages", "classification"]
SPLITS: tuple[SplitName, ...] = ("train", "selection", "test")
HELD_OUT: tuple[SplitName, ...] = ("selection", "test")

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")

COLUMNS: dict[DataForm, tuple[str, ...]] = {  # the first form whose columns all exist is used
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "classification": ("text", "label"),
    "text": ("text",),
}


@dataclass(frozen=True, slots=True)
class DataSplits:
    """Examples by split, and what was found while reading."""

    form: DataForm
    examples: Mapping[SplitName, Sequence[Example]]
    splits_given: bool
    duplicates_across_splits: int
    fingerprint: str
    classes: list[str] | None  # classification: the labels, sorted
    unreadable: int = 0  # rows left out because of lone surrogates, which no tokenizer accepts
    control_characters: int = 0  # examples with control characters; they are kept


def load_data(source: Path | Any, settings: SelectSettings, folder: Path | None = None) -> DataSplits:
    """Read `source` (a path, an in-memory `datasets` object or an iterable of mappings) and split it.

    Reading streams: the texts of training examples go to an unnamed temporary file in `folder`.

    Raises:
        DataError: no known columns, a row that breaks its form, one class only, or too few examples for a split.
    """
    rows = read_rows(source) if isinstance(source, Path) else rows_from_memory(source)
    name = str(source) if isinstance(source, Path) else "the data"
    form, rows = _detect_form(rows, name)
    given = None not in rows
    builder = _SplitBuilder(form, settings, folder)
    for split, example in _placed(rows, form, settings, builder):
        builder.add(split, example)
    examples: dict[SplitName, Sequence[Example]] = {
        "train": builder.train,
        "selection": builder.held_out["selection"].examples(),
        "test": builder.held_out["test"].examples(),
    }
    _check_sizes(examples, settings, name, given)
    classes = _classes(builder.labels, examples, name) if form == "classification" else None
    control = builder.control_characters + sum(
        _has_control(example.content) for split in HELD_OUT for example in examples[split]
    )
    across = builder.duplicates_across()
    return DataSplits(
        form, examples, given, across, _fingerprint(builder, examples), classes, builder.unreadable, control
    )


class _SplitBuilder:
    """Collects a stream of examples: training examples on disk, and as many held-out ones as are evaluated."""

    def __init__(self, form: DataForm, settings: SelectSettings, folder: Path | None) -> None:
        self.train = ExampleStore(folder)
        self.held_out: dict[SplitName, _SmallestHashes] = {
            split: _SmallestHashes(settings.eval_items) for split in HELD_OUT
        }
        self.labels: set[str] = set()  # classification: of the training examples
        self.unreadable = 0
        self.control_characters = 0  # in training examples
        self._is_classification = form == "classification"

    def add(self, split: SplitName, example: Example) -> None:
        if split != "train":
            self.held_out[split].add(example)
            return
        self.train.append(example)
        self.control_characters += _has_control(example.content)
        if self._is_classification:
            self.labels.add(str(example.content["label"]))

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


def _fingerprint(builder: _SplitBuilder, examples: Mapping[SplitName, Sequence[Example]]) -> str:
    digest = hashlib.sha256(b"train:")
    for number in builder.train.ids:
        digest.update(f"{number:016x}".encode())
    for split in HELD_OUT:
        digest.update(f"{split}:".encode())
        for example in examples[split]:
            digest.update(example.item_id.encode())
    return digest.hexdigest()


def _detect_form(rows: RowsBySplit, name: str) -> tuple[DataForm, RowsBySplit]:
    """The form of the first row, and all rows including the first."""
    first: Row | None = None
    begun: RowsBySplit = {}
    for split, found in rows.items():
        row = next(found, None) if first is None else None
        begun[split] = found if row is None else chain([row], found)
        first = first or row
    if first is None:
        raise DataError(f"{name}: no rows; give at least one row of text")
    for form, columns in COLUMNS.items():
        if all(column in first.fields for column in columns):
            return form, begun
    known = "; or ".join(", ".join(f"`{column}`" for column in columns) for columns in COLUMNS.values())
    found_columns = ", ".join(f"`{column}`" for column in first.fields) or "none"
    raise DataError(f"{first.where}: no known columns: found {found_columns}; give {known}")


def _placed(
    rows: RowsBySplit, form: DataForm, settings: SelectSettings, builder: _SplitBuilder
) -> Iterator[tuple[SplitName, Example]]:
    """Yield every readable example with its split."""
    given = None not in rows
    for split in (None, *SPLITS):
        for row in rows.get(split, ()):
            if not all(map(is_text, _strings([row.fields.get(name) for name in COLUMNS[form]]))):
                builder.unreadable += 1  # a lone surrogate can't be encoded as UTF-8
                continue
            example = _example(row, form)
            if split is None:
                yield _made_split(row, example, settings), example
            else:
                yield (_taken_from_train(rows, example, settings) if given and split == "train" else split), example


def _strings(value: Any) -> Iterator[str]:
    """All strings in a cell or example, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)


def _made_split(row: Row, example: Example, settings: SelectSettings) -> SplitName:
    group = row.fields.get("group")
    share = _unit_interval(example.item_id if group is None else f"group:{group}")
    if share < settings.test_fraction:
        return "test"
    return "selection" if share < settings.test_fraction + settings.validation_fraction else "train"


def _taken_from_train(rows: RowsBySplit, example: Example, settings: SelectSettings) -> SplitName:
    """The split of a row from a given train split: train, or a held-out split that was not given, by hash."""
    if "test" not in rows and _unit_interval(f"test:{example.item_id}") < settings.test_fraction:
        return "test"
    if "selection" not in rows and _unit_interval(f"selection:{example.item_id}") < settings.validation_fraction:
        return "selection"
    return "train"


def _check_sizes(
    examples: Mapping[SplitName, Sequence[Example]], settings: SelectSettings, name: str, given: bool
) -> None:
    needed: dict[SplitName, int] = {"train": settings.items_per_step, "selection": 2, "test": 2}
    for split, least in needed.items():
        if len(examples[split]) < least:
            remedy = (
                f"give a {split_name(split)} split of {least} or more"
                if given
                else "give more rows or larger fractions"
            )
            raise DataError(
                f"{name}: {len(examples[split])} distinct examples for the {split_name(split)} split, at least {least} needed; {remedy}"
            )


def _classes(found: set[str], examples: Mapping[SplitName, Sequence[Example]], name: str) -> list[str]:
    if len(found) < 2:
        raise DataError(f"{name}: one class only ({next(iter(found))!r}); give two or more labels in train")
    for split in HELD_OUT:
        for example in examples[split]:
            if str(example.content["label"]) not in found:
                raise DataError(
                    f"{example.where}: label {example.content['label']!r} of the {split_name(split)} split does not occur in train; add examples of it to train"
                )
    return sorted(found)


def _has_control(content: Mapping[str, Any]) -> bool:
    return any(map(_CONTROL.search, _strings(content)))


def _example(row: Row, form: DataForm) -> Example:
    content = {column: row.fields.get(column) for column in COLUMNS[form]}
    for column, value in content.items():
        _CHECKS[column](value, f"{row.where}: `{column}`")
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=True, default=str)
    return Example(hashlib.sha256(canonical.encode()).hexdigest()[:16], content, row.where)


def _unit_interval(key: str) -> float:
    return int(hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:13], 16) / 16**13


def _check_text(value: Any, where: str) -> None:
    if not isinstance(value, str):
        raise DataError(f"{where}: got {_kind(value)}; give a string")


def _check_prompt(value: Any, where: str) -> None:
    if isinstance(value, list):
        _check_messages(value, where)
    else:
        _check_text(value, where)


def _check_label(value: Any, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise DataError(f"{where}: got {_kind(value)}; give an integer or a name")


def _check_messages(value: Any, where: str) -> None:
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: got {_kind(value)}; give a list of {{role, content}}")
    for message in value:
        if (
            not isinstance(message, Mapping)
            or not isinstance(message.get("role"), str)
            or not isinstance(message.get("content"), str)
        ):
            raise DataError(f"{where}: a message needs a `role` and a `content`, both strings")


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}" if value != "" else "an empty string"


_CHECKS: dict[str, Callable[[Any, str], None]] = {
    "text": _check_text,
    "prompt": _check_prompt,
    "completion": _check_prompt,
    "label": _check_label,
    "messages": _check_messages,
}
