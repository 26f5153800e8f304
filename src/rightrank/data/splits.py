"""Turns rows into examples in splits: detects the form of the data and holds examples out.

Given splits are kept. Otherwise a hash decides between train, validation and test: of what rows that belong together share (a column,
or the prompt), else of an example's content. Duplicates fall into one split, and examples stay in their split when the data set grows.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from array import array
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow

from rightrank.data.files import is_text
from rightrank.data.forms import DataForm, Example, Shape, example_of, json_value, shape_of
from rightrank.data.rows import Row, RowsBySplit, held_out_fields, read_rows
from rightrank.data.token_store import Store
from rightrank.schema.errors import DataError
from rightrank.schema.events import DataSummary
from rightrank.schema.settings import MAX_EVAL_ITEMS, OF_ANY_NUMBER, SelectSettings
from rightrank.schema.trials import SplitName, split_name

MAX_SHOWN_CLASSES = 8
MANY_GROUPS = 1000  # of which no split is too small
FIRST_ROWS = 256  # by which a prompt is taken for a question, or for one of a few instructions
ROWS_OF_AN_INSTRUCTION = 16  # a prompt that so many of them share on average is one
SAMPLE_STREAM = int.from_bytes(b"rightrank")  # of `sample_indices` alone, whatever the seed
_NUMBER = re.compile(r"-?\d+", re.ASCII)
HELD_OUT: tuple[SplitName, ...] = ("selection", "test")
SPLITS: tuple[SplitName, ...] = ("train", *HELD_OUT)
FORMS: tuple[tuple[DataForm, tuple[str, ...]], ...] = (  # the first form whose columns all exist is used
    ("preference", ("prompt", "chosen", "rejected")),
    ("preference", ("chosen", "rejected")),  # both begin with the prompt
    ("messages", ("messages",)),
    ("prompt_completion", ("prompt", "completion")),
    ("classification", ("text", "label")),
    ("text", ("text",)),
)


def sample_indices(population: int, count: int, seed: int = 0) -> list[int]:
    """Return `count` of the numbers below `population` in random order, without replacement; all of them where there are fewer.

    The sample depends on the arguments alone, whatever states global generators have. It has a stream of its own: one that a shuffle of the
    rows with the same seed had used would undo the shuffle.
    """
    generator = np.random.default_rng((SAMPLE_STREAM, seed))
    return list(map(int, generator.choice(population, min(count, population), replace=False)))


class ExampleStore(Store[Example]):
    """Examples in the order in which they came."""

    schema = pyarrow.schema(
        {
            "number": pyarrow.uint64(),
            "group": pyarrow.uint64(),
            "alike": pyarrow.uint64(),
            "content": pyarrow.large_string(),
            "where": pyarrow.large_binary(),
        }
    )

    def row(self, entry: Example) -> Mapping[str, Any]:
        content = _written(entry)
        where = os.fsencode(entry.where)
        numbers = {"number": int(entry.item_id, 16), "group": entry.group, "alike": _alike(content)}
        return {**numbers, "content": content, "where": where}

    def entry(self, row: Mapping[str, Any]) -> Example:
        content = json.loads(row["content"])
        return Example(f"{row['number']:016x}", content, os.fsdecode(row["where"]), row["group"])

    def numbers(self, column: str = "number") -> Iterator[npt.NDArray[np.uint64]]:
        """A column of numbers, of some of the examples at a time: the identities, the groups, or what is alike."""
        return (batch[column].to_numpy() for batch in self.batches())


@dataclass(frozen=True, slots=True)
class DataSplits:
    """Examples by split, and what was found while reading."""

    summary: DataSummary  # its `splits` are empty: they count tokens
    examples: Mapping[SplitName, Sequence[Example]]
    fingerprint: str

    @property
    def form(self) -> DataForm:
        assert self.summary.form != "own"
        return self.summary.form

    def without(self, item_ids: Container[str]) -> DataSplits:
        """The splits of `load_all` without these examples."""
        kept = [example for example in self.examples["selection"] if example.item_id not in item_ids]
        return replace(self, examples=dict.fromkeys(self.examples, kept))


def load_data(
    source: Path | Any,
    settings: SelectSettings,
    folder: Path | None = None,
    begun_items: int | None = None,
    classes: Sequence[str] | None = None,
) -> DataSplits:
    """Read `source` (a path, an in-memory `datasets` object or an iterable of mappings) and split it.

    `begun_items` is the number of held-out examples with which a run began that now evaluates more: the fingerprint stays that
    of the run, and so does the test split. `classes` are those of a classifier that exists; data need not have all of them.

    Reading streams: the texts of training examples go to an unnamed temporary file in `folder`.

    Raises:
        DataError: no known columns, a row that breaks its form, one class only, or too few examples for a split.
    """
    rows = read_rows(source)
    name = str(source) if isinstance(source, Path) else "the data"
    if settings.validation:
        rows = _with_validation(rows, Path(settings.validation), name)
    form, columns, shape, rows = _detect_form(rows, name, settings.columns)
    by_prompt, rows = _by_prompt(rows)
    read = _Reading(form, columns, settings, by_prompt)
    stored = ExampleStore(read.training(rows), folder)
    examples: dict[SplitName, Sequence[Example]] = {"train": stored}
    limit = settings.held_out_items(len(stored))
    examples |= {split: held.examples()[:limit] for split, held in read.held_out.items()}
    begun = {split: kept[:begun_items] if split in HELD_OUT else kept for split, kept in examples.items()}
    examples["test"] = begun["test"]
    is_given = None not in rows
    held_out = sum(len(held.ids) for held in read.held_out.values())
    count = len(stored) + held_out + read.unreadable + read.equal_pairs
    read.require_groups(name)
    _check_sizes(examples, settings, name, None if is_given else count, read.groups)
    evaluated = [example for split in HELD_OUT for example in examples[split]]
    grouped = {split: group_numbers(examples[split]) for split in HELD_OUT}
    validation, test = (np.unique(np.frombuffer(read.held_out[split].ids, np.uint64)) for split in HELD_OUT)
    groups = np.unique(np.array([example.group for example in evaluated], np.uint64))
    distinct = len(validation) + len(test)
    both = np.union1d(validation, test)
    leaked = both[_are_in(both, stored.numbers())]  # into train
    known = set(leaked.tolist())
    near = [_alike(_written(example)) for example in evaluated if int(example.item_id, 16) not in known]
    alike = np.unique(np.array(near, np.uint64))
    summary = DataSummary(
        form=form,
        splits={},
        splits_given=is_given,
        # distinct validation examples that are in train, and test examples that are in either
        duplicates_across_splits=int(
            np.isin(validation, leaked).sum() + np.isin(test, np.union1d(validation, leaked)).sum()
        ),
        near_duplicates_across_splits=int(_are_in(alike, stored.numbers("alike")).sum()),
        classes=_classes(read.labels, examples, name, classes) if form == "classification" else None,
        unreadable=read.unreadable,
        rows=count,
        repeated=held_out - distinct,
        not_evaluated=distinct - len(evaluated),
        shape=None if shape is None else shape.name,
        renamed={} if shape is None else dict(shape.renamed),
        equal_pairs=read.equal_pairs,
        grouped_by=read.grouped_by if any(grouped.values()) else None,
        groups_across_splits=int(_are_in(groups, stored.numbers("group")).sum()) if any(grouped.values()) else 0,
    )
    return DataSplits(summary, examples, _fingerprint(stored, begun))


def load_all(
    source: Path, settings: SelectSettings, classes: Sequence[str] | None = None
) -> tuple[DataSplits, SelectSettings]:
    """Every row as a held-out example, the same in each split, and settings that evaluate all of them.

    Of given splits they are the test rows, or the validation rows where there are none.

    Raises:
        DataError: rows that can't be used, or fewer than two.
    """
    listed = held_out_fields(source)
    if len(listed) < 2:
        raise DataError(f"{source}: {len(listed)} rows; 2 or more are needed to tell a difference from noise")
    settings = settings.model_copy(update={"eval_items": len(listed), "ranks": (1,)})
    rows = {"train": listed, "validation": listed, "test": listed}
    splits = load_data(rows, settings.model_copy(update=OF_ANY_NUMBER), classes=classes)
    return splits, settings


class _Reading:
    """The rows as they are read: training examples in turn, held-out ones with the smallest hashes, and counts."""

    def __init__(self, form: DataForm, columns: tuple[str, ...], settings: SelectSettings, by_prompt: bool) -> None:
        self.held_out: dict[SplitName, _SmallestHashes] = {
            split: _SmallestHashes(settings.eval_items or MAX_EVAL_ITEMS) for split in HELD_OUT
        }
        self.labels: Counter[str] = Counter()  # classification: of the training examples
        self.unreadable = 0
        self.equal_pairs = 0
        self.grouped_by = settings.group or ("prompt" if by_prompt else "group")
        self._form, self._columns, self._settings, self._by_prompt = form, columns, settings, by_prompt
        self._first_of: dict[int, str] = {}  # group → its first example, until there are many and one has two examples
        self._is_shared = False  # a group by several examples

    def training(self, rows: RowsBySplit) -> Iterator[Example]:
        """Yield the training examples; keep what is held out."""
        for split in (None, *SPLITS):
            for row in rows.get(split, ()):
                if not all(map(is_text, _strings([row.fields.get(name) for name in self._columns]))):
                    self.unreadable += 1  # a lone surrogate can't be encoded as UTF-8
                    continue
                example = example_of(row, self._form, self._columns)
                if self._form == "preference" and example.content["chosen"] == example.content["rejected"]:
                    self.equal_pairs += 1  # no adapter can tell them apart
                    continue
                example = replace(example, group=self._group_of(row, example))
                place = _split_of(split, example, rows, self._settings)
                if place != "train":
                    self.held_out[place].add(example)
                    continue
                if self._form == "classification":
                    self.labels[str(example.content["label"])] += 1
                yield example

    def _group_of(self, row: Row, example: Example) -> int:
        """A hash of the row's value in the column of groups, else of the prompt, else of the example alone."""
        column = self._settings.group
        value = row.fields.get(column or "group")
        is_missing = value is None or (isinstance(value, str) and not value)
        is_missing |= isinstance(value, float) and math.isnan(value)
        if is_missing and column:
            raise DataError(
                f"{row.where}: no value in a column {column!r}, which columns names for `group`; there are {', '.join(row.fields)}: name one that "
                "every row has, or leave it out"
            )
        prompt = _prompt_of(example.content) if self._by_prompt and is_missing else None
        if is_missing:
            key = (
                example.item_id
                if prompt is None
                else f"prompt:{json.dumps(prompt, sort_keys=True, default=json_value)}"
            )
        else:
            key = f"group:{value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=json_value)}"
            self.grouped_by = column or "group"
        group = int(hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:16], 16)
        if len(self._first_of) < MANY_GROUPS or (column and not self._is_shared):
            first = self._first_of.setdefault(group, example.item_id)
            self._is_shared |= first != example.item_id
        return group

    @property
    def groups(self) -> int:
        """The number of groups; 0 where there are many, or none of several examples."""
        return len(self._first_of) if self._is_shared and len(self._first_of) < MANY_GROUPS else 0

    def require_groups(self, name: str) -> None:
        """Refuse a column that groups nothing: one of a single value, or one whose value no two rows share."""
        column = self._settings.group
        if column and (len(self._first_of) == 1 or (self._first_of and not self._is_shared)):
            what = "all rows share" if self._is_shared else "no two rows share"
            raise DataError(
                f"{name}: {what} a value of {column!r}, which columns names for `group`; name a column with several values, each of several "
                "rows, or leave it out: rows are then taken as independent"
            )


def _written(example: Example) -> str:
    return json.dumps(dict(example.content), ensure_ascii=False, default=json_value)


def _alike(written: str) -> int:
    """The same number for examples that differ in white space and case alone."""
    for escaped in ("\\n", "\\r", "\\t", "\\f"):
        written = written.replace(escaped, " ")
    text = "".join(written.casefold().split())
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def _by_prompt(rows: RowsBySplit) -> tuple[bool, RowsBySplit]:
    """Whether rows with the same prompt belong together, and all rows: not where the first ones share a few instructions."""
    for split, in_split in rows.items():
        if first := list(islice(in_split, FIRST_ROWS)):
            prompts = {json.dumps(_prompt_of(row.fields), sort_keys=True, default=json_value) for row in first}
            least = max(2, len(first) // ROWS_OF_AN_INSTRUCTION)
            return len(first) == 1 or len(prompts) >= least, {**rows, split: chain(first, in_split)}
    return True, rows


def _prompt_of(content: Mapping[str, Any]) -> Any:
    """The prompt, or what is said before the assistant's first turn; None where nobody asks."""
    messages = content.get("messages")
    if not isinstance(messages, list):
        return content.get("prompt") or None
    turns = [turn for turn in messages if isinstance(turn, Mapping)]
    asked = list(takewhile(lambda turn: turn.get("role") != "assistant", turns))
    return asked if any(turn.get("role") == "user" for turn in asked) else None


def group_numbers(examples: Iterable[Example]) -> list[int] | None:
    """The groups of examples, numbered as they come; None where no two examples share one, or all do."""
    places: dict[int, int] = {}
    numbers = [places.setdefault(example.group, len(places)) for example in examples]
    return numbers if 1 < len(places) < len(numbers) else None


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


def _are_in(numbers: npt.NDArray[np.uint64], parts: Iterable[npt.NDArray[np.uint64]]) -> npt.NDArray[np.bool_]:
    """Whether each of `numbers`, which are sorted, is in one of the parts; no array as long as all parts is made."""
    are_in = np.zeros(len(numbers), np.bool_)
    for part in parts if len(numbers) else ():
        places = np.searchsorted(numbers[:-1], part)
        are_in[places[numbers[places] == part]] = True
    return are_in


def _fingerprint(train: ExampleStore, examples: Mapping[SplitName, Sequence[Example]]) -> str:
    digest = hashlib.sha256(b"train:")
    for numbers in train.numbers():
        digest.update("".join(f"{number:016x}" for number in numbers.tolist()).encode())
    for split in HELD_OUT:
        digest.update(f"{split}:".encode())
        for example in examples[split]:
            digest.update(example.item_id.encode())
    return digest.hexdigest()


def _with_validation(rows: RowsBySplit, file: Path, name: str) -> RowsBySplit:
    """`rows` with the rows of `file` as the validation split; what was not split yet is the train split."""
    if "selection" in rows:
        raise DataError(f"{name}: has a validation split, and validation names {file}; give one of them")
    given = read_rows(file)
    chosen = given["selection"] if "selection" in given else chain.from_iterable(given.values())
    others: RowsBySplit = {"train" if split is None else split: read for split, read in rows.items()}
    return {**others, "selection": chosen}


def _detect_form(
    rows: RowsBySplit, name: str, named: Sequence[str]
) -> tuple[DataForm, tuple[str, ...], Shape | None, RowsBySplit]:
    """The form of the first row with its columns, how rows get them, and all rows with these columns."""
    first: Row | None = None
    begun: RowsBySplit = {}
    for split, in_split in rows.items():
        row = next(in_split, None) if first is None else None
        begun[split] = in_split if row is None else chain([row], in_split)
        first = first or row
    if first is None:
        raise DataError(f"{name}: no rows; give at least one row of text")
    known = {column for _, columns in FORMS for column in columns} | {"group"}
    shape = shape_of(first, [entry for entry in named if not entry.startswith("group=")], known)
    changed = first if shape is None else shape(first)
    if shape is not None:
        begun = {split: map(shape, in_split) for split, in_split in begun.items()}
    for form, columns in FORMS:
        if all(column in changed.fields for column in columns):
            return form, columns, shape, begun
    allowed = "; or ".join(", ".join(f"`{column}`" for column in columns) for _, columns in FORMS)
    found_columns = ", ".join(f"`{column}`" for column in first.fields) or "none"
    raise DataError(
        f"{first.where}: no known columns: found {found_columns}; give {allowed}, or name yours, such as "
        "--columns text=review,label=stars"
    )


def _split_of(given: SplitName | None, example: Example, rows: RowsBySplit, settings: SelectSettings) -> SplitName:
    """The split of an example: the given one; by hash for the held-out splits that are not given, which rows without a split or those of train fill."""
    if given not in (None, "train"):
        return given
    share = (example.group >> 12) / 16**13
    fractions: dict[SplitName, float] = {"test": settings.test_fraction, "selection": settings.validation_fraction}
    for split, fraction in fractions.items():
        if split in rows:
            continue
        if share < fraction:
            return split
        share -= fraction
    return "train"


def _check_sizes(
    examples: Mapping[SplitName, Sequence[Example]], settings: SelectSettings, name: str, rows: int | None, groups: int
) -> None:
    """Refuse a split with too few examples; `rows` and `groups` are what the splits were made from, if they were made."""
    least_test = 2 if settings.test_fraction or examples["test"] else 0
    needed: dict[SplitName, int] = {"train": settings.items_per_step, "selection": 2, "test": least_test}
    for split, least in needed.items():
        if len(examples[split]) < least:
            larger = "" if split == "train" else f", or a larger {split_name(split)}_fraction"
            few = f" in {groups:,} groups" if groups else ""
            origin = "" if rows is None else f", from {rows:,} rows{few}"
            remedy = (
                f"give a {split_name(split)} split of {least} or more"
                if rows is None
                else f"give more {'groups' if groups else 'rows that differ'}{larger}"
            )
            raise DataError(
                f"{name}: {len(examples[split])} distinct examples for the {split_name(split)} split, at least {least} needed{origin}; {remedy}"
            )


def _classes(
    labels: Mapping[str, int],
    examples: Mapping[SplitName, Sequence[Example]],
    name: str,
    given: Sequence[str] | None = None,
) -> list[str]:
    """The classes given, or the labels in train: numbers by size, names by the alphabet."""
    if given is not None:
        _require_known(examples, given)
        return list(given)
    if len(labels) < 2:
        raise DataError(f"{name}: one class only ({next(iter(labels))!r}); give two or more labels in train")
    for split in HELD_OUT:
        for example in examples[split]:
            if str(example.content["label"]) not in labels:
                raise DataError(
                    f"{example.where}: label {example.content['label']!r} of the {split_name(split)} split does not occur in train; add examples of it to train"
                )
    return sorted(labels, key=int) if all(map(_NUMBER.fullmatch, labels)) else sorted(labels)


def _require_known(examples: Mapping[SplitName, Sequence[Example]], classes: Sequence[str]) -> None:
    known = set(classes)
    for example in chain.from_iterable(examples.values()):
        if str(example.content["label"]) not in known:
            shown = ", ".join(classes[:MAX_SHOWN_CLASSES]) + (", …" if len(classes) > MAX_SHOWN_CLASSES else "")
            raise DataError(
                f"{example.where}: label {example.content['label']!r} is none of the classifier's {len(classes)} ({shown}); "
                "give its labels, or name them in classifier.json beside the adapter"
            )
