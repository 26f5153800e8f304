"""Turns rows into examples in splits: detects the form of the data and holds examples out.

Given splits are kept. Otherwise a hash of an example's content (or of its `group` column) decides between train,
validation and test: duplicates fall into one split, and examples stay in their split when the data set grows.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from rightrank.data.files import is_text
from rightrank.data.forms import DataForm, Example, ExampleStore, Shape, example_of, has_control, shape_of, strings
from rightrank.data.rows import Row, RowsBySplit, read_rows, rows_from_memory
from rightrank.schema.errors import DataError
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import SplitName, split_name

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


Detected: TypeAlias = tuple[DataForm, tuple[str, ...], Shape | None, RowsBySplit]
SPLITS: tuple[SplitName, ...] = ("train", "selection", "test")


FORMS: tuple[tuple[DataForm, tuple[str, ...]], ...] = (  # the first form whose columns all exist is used
    ("preference", ("prompt", "chosen", "rejected")),
    ("preference", ("chosen", "rejected")),  # both begin with the prompt
    ("messages", ("messages",)),
    ("prompt_completion", ("prompt", "completion")),
    ("classification", ("text", "label")),
    ("text", ("text",)),
    ("tokens", ("input_ids", "labels")),
)


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
    rows: int = 0  # that were read
    repeated: int = 0  # held-out rows left out because another row is equal
    not_evaluated: int = 0  # held-out rows beyond the number that is evaluated
    shape: str | None = None  # how rows of another shape got the form's columns, for people
    renamed: Mapping[str, str] = field(default_factory=dict)  # columns that have another name in the file → that name
    equal_pairs: int = 0  # rows left out because `chosen` and `rejected` are the same


def load_data(
    source: Path | Any, settings: SelectSettings, folder: Path | None = None, begun_items: int | None = None
) -> DataSplits:
    """Read `source` (a path, an in-memory `datasets` object or an iterable of mappings) and split it.

    `begun_items` is the number of held-out examples with which a run began that now evaluates more: the fingerprint stays that
    of the run, and so does the test split.

    Reading streams: the texts of training examples go to an unnamed temporary file in `folder`.

    Raises:
        DataError: no known columns, a row that breaks its form, one class only, or too few examples for a split.
    """
    rows = read_rows(source) if isinstance(source, Path) else rows_from_memory(source)
    name = str(source) if isinstance(source, Path) else "the data"
    if settings.validation:
        rows = _with_validation(rows, Path(settings.validation), name)
    form, columns, shape, rows = _detect_form(rows, name, settings.columns)
    given = None not in rows
    builder = SplitBuilder(form, settings, folder)
    for split, example in _placed(rows, (form, columns), settings, builder):
        builder.add(split, example)
    examples: dict[SplitName, Sequence[Example]] = {
        "train": builder.train,
        "selection": builder.held_out["selection"].examples(),
        "test": builder.held_out["test"].examples(),
    }
    begun = {split: found[:begun_items] if split in HELD_OUT else found for split, found in examples.items()}
    examples["test"] = begun["test"]
    _check_sizes(examples, settings, name, None if given else builder.rows)
    evaluated = [example for split in HELD_OUT for example in examples[split]]
    return DataSplits(
        form,
        examples,
        given,
        builder.duplicates_across(),
        fingerprint_of(builder, begun),
        _classes(builder.labels, examples, name) if form == "classification" else None,
        builder.unreadable,
        builder.control_characters + sum(has_control(example.content) for example in evaluated),
        rows=builder.rows,
        repeated=builder.rows_held_out - builder.distinct_held_out,
        not_evaluated=builder.distinct_held_out - len(evaluated),
        shape=None if shape is None else shape.name,
        renamed={} if shape is None else dict(shape.renamed),
        equal_pairs=builder.equal_pairs,
    )


def _with_validation(rows: RowsBySplit, file: Path, name: str) -> RowsBySplit:
    """`rows` with the rows of `file` as the validation split; what was not split yet is the train split."""
    if "selection" in rows:
        raise DataError(f"{name}: has a validation split, and validation names {file}; give one of them")
    found = read_rows(file)
    chosen = found["selection"] if "selection" in found else chain.from_iterable(found.values())
    others: RowsBySplit = {"train" if split is None else split: read for split, read in rows.items()}
    return {**others, "selection": chosen}


def _detect_form(rows: RowsBySplit, name: str, named: Sequence[str]) -> Detected:
    """The form of the first row with its columns, how rows get them, and all rows with these columns."""
    first: Row | None = None
    begun: RowsBySplit = {}
    for split, found in rows.items():
        row = next(found, None) if first is None else None
        begun[split] = found if row is None else chain([row], found)
        first = first or row
    if first is None:
        raise DataError(f"{name}: no rows; give at least one row of text")
    known = {column for _, columns in FORMS for column in columns} | {"group"}
    shape = shape_of(first, named, known)
    changed = first if shape is None else shape(first)
    if shape is not None:
        begun = {split: map(shape, found) for split, found in begun.items()}
    for form, columns in FORMS:
        if all(column in changed.fields for column in columns):
            return form, columns, shape, begun
    allowed = "; or ".join(", ".join(f"`{column}`" for column in columns) for _, columns in FORMS)
    found_columns = ", ".join(f"`{column}`" for column in first.fields) or "none"
    raise DataError(
        f"{first.where}: no known columns: found {found_columns}; give {allowed}, or name yours: --columns {_named(first, known)}"
    )


def _named(first: Row, known: Set[str]) -> str:
    """How `--columns` may name the columns of a row: two of text as prompt and completion, the only one as text."""
    texts = [column for column, value in first.fields.items() if isinstance(value, str)]
    if not texts or known & first.fields.keys():
        return "prompt=question,completion=answer"
    return f"prompt={texts[0]},completion={texts[1]}" if len(texts) > 1 else f"text={texts[0]}"


def _placed(
    rows: RowsBySplit, columns_of: tuple[DataForm, tuple[str, ...]], settings: SelectSettings, builder: SplitBuilder
) -> Iterator[tuple[SplitName, Example]]:
    """Yield every readable example with its split."""
    form, columns = columns_of
    given = None not in rows
    for split in (None, *SPLITS):
        for row in rows.get(split, ()):
            if not all(map(is_text, strings([row.fields.get(name) for name in columns]))):
                builder.unreadable += 1  # a lone surrogate can't be encoded as UTF-8
                continue
            example = example_of(row, form, columns)
            if form == "preference" and example.content["chosen"] == example.content["rejected"]:
                builder.equal_pairs += 1  # no adapter can tell them apart
                continue
            if split is None:
                yield _made_split(row, example, settings), example
            else:
                yield (_taken_from_train(rows, example, settings) if given and split == "train" else split), example


def _made_split(row: Row, example: Example, settings: SelectSettings) -> SplitName:
    group = row.fields.get("group")
    share = _unit_interval(_split_key(example) if group is None else f"group:{group}")
    if share < settings.test_fraction:
        return "test"
    return "selection" if share < settings.test_fraction + settings.validation_fraction else "train"


def _split_key(example: Example) -> str:
    """What decides the split of an example without a group: its content, or the prompt that several pairs may share."""
    prompt = example.content["prompt"] if "chosen" in example.content else None
    return f"prompt:{json.dumps(prompt, sort_keys=True)}" if prompt else example.item_id


def _taken_from_train(rows: RowsBySplit, example: Example, settings: SelectSettings) -> SplitName:
    """The split of a row from a given train split: train, or a held-out split that was not given, by hash."""
    if "test" not in rows and _unit_interval(f"test:{_split_key(example)}") < settings.test_fraction:
        return "test"
    if "selection" not in rows and _unit_interval(f"selection:{_split_key(example)}") < settings.validation_fraction:
        return "selection"
    return "train"


def _check_sizes(
    examples: Mapping[SplitName, Sequence[Example]], settings: SelectSettings, name: str, rows: int | None
) -> None:
    """Refuse a split with too few examples; `rows` is the number of rows that the splits were made from, if they were made."""
    least_test = 2 if settings.test_fraction or examples["test"] else 0
    needed: dict[SplitName, int] = {"train": settings.items_per_step, "selection": 2, "test": least_test}
    for split, least in needed.items():
        if len(examples[split]) < least:
            larger = "" if split == "train" else f", or a larger {split_name(split)}_fraction"
            origin = "" if rows is None else f", from {rows:,} rows"
            remedy = (
                f"give a {split_name(split)} split of {least} or more"
                if rows is None
                else f"give more rows that differ{larger}"
            )
            raise DataError(
                f"{name}: {len(examples[split])} distinct examples for the {split_name(split)} split, at least {least} needed{origin}; {remedy}"
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


def _unit_interval(key: str) -> float:
    return int(hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:13], 16) / 16**13
