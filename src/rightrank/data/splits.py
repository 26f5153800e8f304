"""Build examples from rows and divide them into splits.

Splits that the data names are kept. Otherwise a hash decides between train, validation and test. It is computed from the value that
rows of one group share (a column, or the prompt), or else from the example's content. Duplicates therefore fall into one split, and
examples stay in their split when the data set grows.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow

from rightrank.data.files import is_encodable
from rightrank.data.forms import (
    DataForm,
    Example,
    Layout,
    build_example,
    detect_form,
    is_empty,
    to_json_value,
)
from rightrank.data.rows import MAX_DETECTION_ROWS, Row, RowsBySplit, are_instructions, read_rows
from rightrank.data.token_store import Store
from rightrank.schema.errors import DataError
from rightrank.schema.events import DataSummary
from rightrank.schema.settings import DEFAULT_MAX_EVAL_EXAMPLES, NO_SPLIT_OVERRIDES, SelectSettings
from rightrank.schema.trials import SplitName

MAX_SHOWN_CLASSES = 8
_ESCAPED_SPACE = re.compile(r"\\(?:[nrtf]|u00(?:0b|1[c-f]))")  # white space as JSON writes it
_NUMBER = re.compile(r"-?\d+", re.ASCII)
HELD_OUT: tuple[SplitName, ...] = ("validation", "test")
SPLITS: tuple[SplitName, ...] = ("train", *HELD_OUT)


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
            "near_hash": _hash_normalized_text(entry),
        }
        return {**numbers, "content": _serialize_content(entry), "origin": origin}

    def entry(self, row: Mapping[str, Any]) -> Example:
        content = json.loads(row["content"])
        return Example(f"{row['number']:016x}", content, os.fsdecode(row["origin"]), row["group"])

    def numbers(self, column: str = "number") -> Iterator[npt.NDArray[np.uint64]]:
        """Yield a numeric column in batches: identities (`number`), groups (`group`) or hashes of the normalized text (`near_hash`)."""
        return (batch[column].to_numpy() for batch in self.batches())


class _HashSample:
    """The `limit` distinct examples with the smallest hashes, so that few examples change when the data set grows."""

    def __init__(self, limit: int) -> None:
        self.ids, self.groups = array("Q"), array("Q")  # of all examples that were added
        self._limit = limit
        self._examples_by_id: dict[str, Example] = {}

    def add(self, example: Example) -> None:
        self.ids.append(int(example.example_id, 16))
        self.groups.append(example.group)
        self._examples_by_id[example.example_id] = example
        if len(self._examples_by_id) > 2 * self._limit + 1000:
            self._examples_by_id = {example.example_id: example for example in self.select_examples()}

    def select_examples(self) -> list[Example]:
        return [self._examples_by_id[example_id] for example_id in sorted(self._examples_by_id)[: self._limit]]


def _find_members(numbers: npt.NDArray[np.uint64], chunks: Iterable[npt.NDArray[np.uint64]]) -> npt.NDArray[np.bool_]:
    """Return for each of `numbers`, which are sorted, whether any chunk contains it. The chunks are never joined in memory."""
    is_member = np.zeros(len(numbers), np.bool_)
    for chunk in chunks if len(numbers) else ():
        positions = np.searchsorted(numbers[:-1], chunk)
        is_member[positions[numbers[positions] == chunk]] = True
    return is_member


def _compute_fingerprint(train: ExampleStore, held_out: Mapping[str, Sequence[Example]]) -> str:
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


def _hash_normalized_text(example: Example) -> int:
    """Return a hash that is equal for examples that differ only in white space and case."""
    text = "".join(_ESCAPED_SPACE.sub(" ", _serialize_content(example)).casefold().split())
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())


@dataclass(frozen=True, slots=True)
class DataSplits:
    summary: DataSummary  # `splits` is filled later, when tokens are counted
    examples: Mapping[SplitName, Sequence[Example]]
    fingerprint: str

    @property
    def form(self) -> DataForm:
        return cast(DataForm, self.summary.form)

    def exclude_training_examples(self, trained: Iterable[Example], source: Path) -> DataSplits:
        """Return the splits of `load_held_out` without examples that adapters were trained on, whatever their white space and case.

        Raises:
            DataError: Fewer than two examples are left.
        """
        trained_hashes, held_out = set(map(_hash_normalized_text, trained)), self.examples["validation"]
        unseen = [example for example in held_out if _hash_normalized_text(example) not in trained_hashes]
        if len(unseen) < 2:
            raise DataError(
                f"{source}: {len(held_out) - len(unseen)} of {len(held_out)} distinct rows are among the training examples of the "
                "adapters; give rows that none of them was trained on"
            )
        return replace(self, examples=dict.fromkeys(self.examples, unseen))


def load_data(
    source: Path | Any,
    settings: SelectSettings,
    folder: Path | None = None,
    classes: Sequence[str] | None = None,
) -> DataSplits:
    """Read `source` (a path, an in-memory `datasets` object or an iterable of mappings) and split it.

    The texts of training examples are streamed to an unnamed temporary file in `folder`.

    Args:
        classes: the labels of an existing classifier. The data need not contain all of them.

    Raises:
        DataError: unknown columns, a row that does not fit its form, a single class, or too few examples for a split.
    """
    rows = read_rows(source, settings.data_config)
    name = str(source) if isinstance(source, Path) else "the data"
    if settings.validation:
        rows = _add_validation(rows, Path(settings.validation), name)
    layout, rows = detect_form(rows, name, settings.columns)
    by_prompt, rows = detect_prompt_groups(rows)
    reader = _ExampleReader(layout, settings, by_prompt)
    train_examples = ExampleStore(reader.read_training_examples(rows), folder)
    examples: dict[SplitName, Sequence[Example]] = {"train": train_examples}
    limit = settings.compute_max_eval_examples(len(train_examples))
    examples |= {split: sample.select_examples()[:limit] for split, sample in reader.held_out.items()}
    held_out = sum(len(sample.ids) for sample in reader.held_out.values())
    count = len(train_examples) + held_out + reader.unreadable + reader.equal_pairs
    _require_sizes(reader, examples, settings, name, count)
    evaluated = [example for split in HELD_OUT for example in examples[split]]
    grouped = {split: number_groups(examples[split]) for split in HELD_OUT}
    validation, test = (np.unique(np.frombuffer(reader.held_out[split].ids, np.uint64)) for split in HELD_OUT)
    groups = np.unique(np.array([example.group for example in evaluated], np.uint64))
    distinct = len(validation) + len(test)
    held_out_ids = np.union1d(validation, test)
    leaked = held_out_ids[_find_members(held_out_ids, train_examples.numbers())]  # that are also in train
    leaked_ids = set(leaked.tolist())
    near_hashes = [
        _hash_normalized_text(example) for example in evaluated if int(example.example_id, 16) not in leaked_ids
    ]
    distinct_hashes = np.unique(np.array(near_hashes, np.uint64))
    summary = DataSummary(
        form=layout.form,
        splits={},
        splits_given=None not in rows,
        # distinct validation examples that are in train, and test examples that are in either
        duplicates_across_splits=int(
            np.isin(validation, leaked).sum() + np.isin(test, np.union1d(validation, leaked)).sum()
        ),
        near_duplicates_across_splits=int(_find_members(distinct_hashes, train_examples.numbers("near_hash")).sum()),
        classes=_list_classes(reader.labels, examples, name, classes) if layout.form == "classification" else None,
        unreadable=reader.unreadable,
        rows=count,
        repeated=held_out - distinct,
        not_evaluated=distinct - len(evaluated),
        shape=layout.shape.name or None,
        unused_columns=list(layout.unused_columns),
        equal_pairs=reader.equal_pairs,
        grouped_by=reader.grouped_by if any(grouped.values()) else None,
        groups_across_splits=int(_find_members(groups, train_examples.numbers("group")).sum())
        if any(grouped.values())
        else 0,
    )
    return DataSplits(
        summary, examples, _compute_fingerprint(train_examples, {split: examples[split] for split in HELD_OUT})
    )


def load_held_out(source: Path, settings: SelectSettings, classes: Sequence[str] | None = None) -> DataSplits:
    """Load every row as a held-out example, the same ones in each split.

    If the data has splits, the test rows are used, or the validation rows if there is no test split.

    Raises:
        DataError: rows that cannot be used, or fewer than two.
    """
    by_split = read_rows(source, settings.data_config)
    held_out = next((by_split[split] for split in ("test", "validation") if split in by_split), None)
    rows = [row.fields for row in (chain.from_iterable(by_split.values()) if held_out is None else held_out)]
    if len(rows) < 2:
        raise DataError(f"{source}: {len(rows)} rows; give 2 or more, which are needed to tell a difference from noise")
    rows_by_split = {"train": rows, "validation": rows, "test": rows}
    all_rows = settings.model_copy(update=NO_SPLIT_OVERRIDES | {"max_eval_examples": len(rows)})
    return load_data(rows_by_split, all_rows, classes=classes)


class _ExampleReader:
    """A single pass over the rows. It yields training examples, and samples and counts the held-out ones."""

    def __init__(self, layout: Layout, settings: SelectSettings, by_prompt: bool) -> None:
        self.held_out: dict[SplitName, _HashSample] = {
            split: _HashSample(settings.max_eval_examples or DEFAULT_MAX_EVAL_EXAMPLES) for split in HELD_OUT
        }
        self.labels: Counter[str] = Counter()  # classification: counts of the training examples' labels
        self.unreadable, self.equal_pairs = 0, 0
        self.grouped_by = settings.group or ("prompt" if by_prompt else "group")
        self._layout, self._settings, self._by_prompt = layout, settings, by_prompt

    def read_training_examples(self, rows: RowsBySplit) -> Iterator[Example]:
        """Yield the training examples. Held-out examples are added to the samples in `held_out`."""
        form, columns = self._layout.form, self._layout.columns
        for split in (None, *SPLITS):
            for row in rows.get(split, ()):
                example = build_example(row, form, columns)
                if not is_encodable(_serialize_content(example)):
                    self.unreadable += 1  # A lone surrogate cannot be encoded as UTF-8.
                    continue
                if form == "preference" and example.content["chosen"] == example.content["rejected"]:
                    self.equal_pairs += 1  # Such a pair has no preference to learn.
                    continue
                example = replace(example, group=self._compute_group(row, example))
                assigned_split = _assign_split(split, example, rows, self._settings)
                if assigned_split != "train":
                    self.held_out[assigned_split].add(example)
                    continue
                if form == "classification":
                    self.labels[str(example.content["label"])] += 1
                yield example

    def _compute_group(self, row: Row, example: Example) -> int:
        """Return a hash of the row's value in the group column, else of the prompt, else of the example."""
        column = self._settings.group
        value = row.fields.get(column or "group")
        if not (is_empty(value) or (isinstance(value, float) and math.isnan(value))):
            self.grouped_by = column or "group"
            key = f"group:{value if isinstance(value, str) else _serialize(value)}"
        elif column:
            raise DataError(
                f"{row.origin}: the row has no value in column {column!r}, which --columns names for `group`; its columns are {', '.join(row.fields)}. Name "
                "a column that every row has, or leave `group` out"
            )
        else:
            prompt = _extract_prompt(example.content) if self._by_prompt else None
            key = example.example_id if prompt is None else f"prompt:{_serialize(prompt)}"
        return int(hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:16], 16)


def _serialize(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=to_json_value)


def _add_validation(rows: RowsBySplit, file: Path, name: str) -> RowsBySplit:
    """Return `rows` with the rows of `file` as the validation split. Rows without a split become the train split."""
    if "validation" in rows:
        raise DataError(f"{name}: has a validation split, and validation names {file} too; give one of them")
    rows_by_split = read_rows(file)
    validation_rows = (
        rows_by_split["validation"] if "validation" in rows_by_split else chain.from_iterable(rows_by_split.values())
    )
    other_splits: RowsBySplit = {"train" if split is None else split: read for split, read in rows.items()}
    return {**other_splits, "validation": validation_rows}


def _assign_split(
    stated_split: SplitName | None, example: Example, rows: RowsBySplit, settings: SelectSettings
) -> SplitName:
    """Return the split of an example.

    A split that the data states is kept. Held-out splits that are missing are filled by hash, from rows without a split or from train.
    """
    if stated_split not in (None, "train"):
        return stated_split
    hash_fraction = (example.group >> 12) / 16**13
    fractions: dict[SplitName, float] = {"test": settings.test_fraction, "validation": settings.validation_fraction}
    for split, fraction in fractions.items():
        if split in rows:
            continue
        if hash_fraction < fraction:
            return split
        hash_fraction -= fraction
    return "train"


def _require_sizes(
    reader: _ExampleReader,
    examples: Mapping[SplitName, Sequence[Example]],
    settings: SelectSettings,
    name: str,
    rows: int,
) -> None:
    """Raise if a split has too few examples, or if the column of groups has the same value in all rows, or a different one in each."""
    min_test_size = 2 if settings.test_fraction or examples["test"] else 0
    min_sizes: dict[SplitName, int] = {"train": settings.examples_per_step, "validation": 2, "test": min_test_size}
    short_split = next((split for split, min_size in min_sizes.items() if len(examples[split]) < min_size), None)
    if short_split is None and not settings.group:
        return
    train, samples = cast(ExampleStore, examples["train"]), reader.held_out.values()
    distinct = len(np.unique(np.concatenate([*train.numbers(), *(np.array(sample.ids) for sample in samples)])))
    groups = len(np.unique(np.concatenate([*train.numbers("group"), *(np.array(sample.groups) for sample in samples)])))
    if settings.group and distinct and groups in (1, distinct):
        fault = "all rows share" if groups < distinct else "no two rows share"
        raise DataError(
            f"{name}: {fault} a value of {settings.group!r}, which --columns names for `group`; name a column in which several "
            "rows share each value, or leave it out: rows are then treated as independent"
        )
    if short_split is not None:
        group_count = f" in {groups:,} groups" if groups < distinct else ""
        smaller_batch = ", a smaller --batch-size" if short_split == "train" else ""
        raise DataError(
            f"{name}: {len(examples[short_split])} distinct examples for the {short_split} split, at least {min_sizes[short_split]} needed, from "
            f"{rows:,} rows{group_count}; give more rows that differ{' and belong to other groups' if group_count else ''}{smaller_batch}, or "
            "another fraction for the split"
        )


def _list_classes(
    labels: Mapping[str, int],
    examples: Mapping[SplitName, Sequence[Example]],
    name: str,
    classes: Sequence[str] | None = None,
) -> list[str]:
    """Return `classes`, or else the labels in train: numbers by size, names in alphabetical order."""
    checked = chain.from_iterable(examples[split] for split in (HELD_OUT if classes is None else SPLITS))
    if classes is None:
        if len(labels) < 2:
            raise DataError(
                f"{name}: the train split has only the label {next(iter(labels))!r}; give examples of two or more labels"
            )
        classes = sorted(labels, key=int) if all(map(_NUMBER.fullmatch, labels)) else sorted(labels)
    class_names = set(classes)
    for example in checked:
        if str(example.content["label"]) not in class_names:
            shown = ", ".join(classes[:MAX_SHOWN_CLASSES]) + (", …" if len(classes) > MAX_SHOWN_CLASSES else "")
            raise DataError(
                f"{example.origin}: label {example.content['label']!r} is none of the {len(classes)} labels of the classifier or of the train "
                f"split ({shown}); add examples of it to train, or give rows with these labels"
            )
    return list(classes)


def detect_prompt_groups(rows: RowsBySplit) -> tuple[bool, RowsBySplit]:
    """Return whether rows with the same prompt form a group, and all rows.

    They do not if the first rows share a few prompts, which then are instructions rather than questions.
    """
    for split, in_split in rows.items():
        if first_rows := list(islice(in_split, MAX_DETECTION_ROWS)):
            prompts = {_serialize(_extract_prompt(row.fields)) for row in first_rows}
            return not are_instructions(len(prompts), len(first_rows)), {**rows, split: chain(first_rows, in_split)}
    return True, rows


def _extract_prompt(content: Mapping[str, Any]) -> Any:
    """Return the prompt, or the turns before the first assistant turn. Return None without a prompt or user turn."""
    messages = content.get("messages")
    if not isinstance(messages, list):
        return content.get("prompt") or None
    turns = [turn for turn in messages if isinstance(turn, Mapping)]
    prompt_turns = list(takewhile(lambda turn: turn.get("role") != "assistant", turns))
    return prompt_turns if any(turn.get("role") == "user" for turn in prompt_turns) else None


def number_groups(examples: Iterable[Example]) -> list[int] | None:
    """Assign group numbers in order of appearance. Return None if no examples share a group or all share one."""
    numbers_by_group: dict[int, int] = {}
    numbers = [numbers_by_group.setdefault(example.group, len(numbers_by_group)) for example in examples]
    return numbers if 1 < len(numbers_by_group) < len(numbers) else None
