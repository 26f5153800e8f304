"""From rows to items in splits: which form the data has, and which items are held out.

Splits that are given are kept. Otherwise each item goes to train, selection or test by a hash of its
content (of its `group`, where there is such a column): duplicates fall on one side, and a data set that
grows moves nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from rightrank.errors import DataError
from rightrank.io.reading import is_text
from rightrank.io.rows import Row, RowsBySplit, read_rows, rows_from_memory
from rightrank.records import SplitName
from rightrank.settings import SelectSettings

DataForm: TypeAlias = Literal["text", "prompt_completion", "messages", "classification"]
SPLITS: tuple[SplitName, ...] = ("train", "selection", "test")

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")

COLUMNS: dict[DataForm, tuple[str, ...]] = {  # the first form whose columns are there is taken
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "classification": ("text", "label"),
    "text": ("text",),
}


@dataclass(frozen=True, slots=True)
class Item:
    """One example: the columns of its form, and an identity that is a hash of them."""

    item_id: str
    content: Mapping[str, Any]
    where: str


@dataclass(frozen=True, slots=True)
class DataSplits:
    """Items by split, and what was noticed on the way."""

    form: DataForm
    items: Mapping[SplitName, list[Item]]
    splits_given: bool
    duplicates_across_splits: int
    fingerprint: str
    classes: list[str] | None  # of a classification, sorted
    unreadable: int = 0  # rows left out: they hold half characters, which no tokenizer takes
    control_characters: int = 0  # items that hold them; they are kept


def load_data(source: Path | Any, settings: SelectSettings) -> DataSplits:
    """Read `source` (a path, an in-memory `datasets` object or an iterable of mappings) and split it.

    Raises:
        DataError: no known columns, a row that breaks its form, one class only, or too few items for a split.
    """
    rows = read_rows(source) if isinstance(source, Path) else rows_from_memory(source)
    name = str(source) if isinstance(source, Path) else "the data"
    form = _detect_form(rows, name)
    rows, unreadable = _readable(rows, form)
    given = None not in rows
    items = _given_splits(rows, form, settings) if given else _made_splits(rows[None], form, settings)
    across = _duplicates_across(items)
    held_out: dict[SplitName, list[Item]] = {
        "train": items["train"],
        "selection": _held_out(items["selection"], settings.eval_items),
        "test": _held_out(items["test"], settings.eval_items),
    }
    _check_sizes(held_out, settings, name, given)
    classes = _classes(held_out, name) if form == "classification" else None
    digest = hashlib.sha256()
    for split in SPLITS:
        digest.update(f"{split}:".encode())
        for item in held_out[split]:
            digest.update(item.item_id.encode())
    control = sum(any(map(_CONTROL.search, _strings(item.content))) for split in SPLITS for item in held_out[split])
    return DataSplits(form, held_out, given, across, digest.hexdigest(), classes, unreadable, control)


def _detect_form(rows: RowsBySplit, name: str) -> DataForm:
    first = next((row for split in rows.values() for row in split), None)
    if first is None:
        raise DataError(f"{name}: no rows; give one row of text or more")
    for form, columns in COLUMNS.items():
        if all(column in first.fields for column in columns):
            return form
    known = "; or ".join(", ".join(f"`{column}`" for column in columns) for columns in COLUMNS.values())
    found = ", ".join(f"`{column}`" for column in first.fields) or "none"
    raise DataError(f"{first.where}: no known columns: found {found}; give {known}")


def _readable(rows: RowsBySplit, form: DataForm) -> tuple[RowsBySplit, int]:
    """The rows whose text is text, and how many are not: half of a surrogate pair has no place in UTF-8."""
    kept = {
        split: [row for row in found if all(map(is_text, _strings([row.fields.get(name) for name in COLUMNS[form]])))]
        for split, found in rows.items()
    }
    return kept, sum(len(found) - len(kept[split]) for split, found in rows.items())


def _strings(value: Any) -> Iterator[str]:
    """Every string in a cell or an item."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)


def _made_splits(rows: list[Row], form: DataForm, settings: SelectSettings) -> dict[SplitName, list[Item]]:
    items: dict[SplitName, list[Item]] = {split: [] for split in SPLITS}
    for row in rows:
        item = _item(row, form)
        group = row.fields.get("group")
        key = item.item_id if group is None else f"group:{group}"
        share = _unit_interval(key)
        if share < settings.test_fraction:
            items["test"].append(item)
        elif share < settings.test_fraction + settings.selection_fraction:
            items["selection"].append(item)
        else:
            items["train"].append(item)
    return items


def _given_splits(rows: RowsBySplit, form: DataForm, settings: SelectSettings) -> dict[SplitName, list[Item]]:
    """The splits as given; the held-out ones that are missing are taken from train, by hash."""
    items: dict[SplitName, list[Item]] = {split: [_item(row, form) for row in rows.get(split, [])] for split in SPLITS}
    fractions: dict[SplitName, float] = {"test": settings.test_fraction, "selection": settings.selection_fraction}
    for split, fraction in fractions.items():
        if split not in rows:
            salt = f"{split}:"
            taken = [item for item in items["train"] if _unit_interval(salt + item.item_id) < fraction]
            items["train"] = [item for item in items["train"] if _unit_interval(salt + item.item_id) >= fraction]
            items[split] = taken
    return items


def _held_out(items: list[Item], limit: int) -> list[Item]:
    """At most `limit` distinct items: those of the smallest hashes, so that growth moves few of them."""
    distinct = {item.item_id: item for item in items}
    return [distinct[item_id] for item_id in sorted(distinct)[:limit]]


def _duplicates_across(items: Mapping[SplitName, list[Item]]) -> int:
    train = {item.item_id for item in items["train"]}
    selection = {item.item_id for item in items["selection"]}
    test = {item.item_id for item in items["test"]}
    return len(train & selection) + len((train | selection) & test)


def _check_sizes(items: Mapping[SplitName, list[Item]], settings: SelectSettings, name: str, given: bool) -> None:
    needed: dict[SplitName, int] = {"train": settings.items_per_step, "selection": 2, "test": 2}
    for split, least in needed.items():
        if len(items[split]) < least:
            remedy = f"give a {split} split of {least} or more" if given else "give more rows or larger fractions"
            raise DataError(
                f"{name}: {len(items[split])} distinct items for the {split} split, at least {least} needed; {remedy}"
            )


def _classes(items: Mapping[SplitName, list[Item]], name: str) -> list[str]:
    found = {str(item.content["label"]) for item in items["train"]}
    if len(found) < 2:
        raise DataError(
            f"{name}: one class only ({next(iter(found))!r}); a classification needs two labels or more in train"
        )
    for split in ("selection", "test"):
        for item in items[split]:
            if str(item.content["label"]) not in found:
                raise DataError(
                    f"{item.where}: label {item.content['label']!r} of the {split} split does not occur in train"
                )
    return sorted(found)


def _item(row: Row, form: DataForm) -> Item:
    content = {column: row.fields.get(column) for column in COLUMNS[form]}
    for column, value in content.items():
        _CHECKS[column](value, f"{row.where}: `{column}`")
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=True, default=str)
    return Item(hashlib.sha256(canonical.encode()).hexdigest()[:16], content, row.where)


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
