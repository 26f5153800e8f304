"""From a row to an example: its columns checked, and a hash of them as its identity."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, TypeAlias

from rightrank.errors import DataError
from rightrank.io.example_store import Example
from rightrank.io.preference import pair_of
from rightrank.io.rows import Row

DataForm: TypeAlias = Literal["text", "prompt_completion", "messages", "classification", "tokens", "preference"]
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def strings(value: Any) -> Iterator[str]:
    """All strings in a cell or example, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from strings(inner)


def has_control(content: Mapping[str, Any]) -> bool:
    return any(map(_CONTROL.search, strings(content)))


def example_of(row: Row, form: DataForm, columns: tuple[str, ...]) -> Example:
    content = {column: row.fields.get(column) for column in columns}
    if "label" in content:
        content["label"] = _plain_label(content["label"])
    for column, value in content.items():
        _CHECKS[column](value, f"{row.where}: `{column}`")
    if form == "preference":
        content = pair_of(content, row.where)
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=True, default=str)
    return Example(hashlib.sha256(canonical.encode()).hexdigest()[:16], content, row.where)


def _check_text(value: Any, where: str) -> None:
    if not isinstance(value, str):
        raise DataError(f"{where}: got {_kind(value)}; give a string")


def _check_prompt(value: Any, where: str) -> None:
    if isinstance(value, list):
        _check_messages(value, where)
    else:
        _check_text(value, where)


def _plain_label(value: Any) -> Any:
    """A truth value as its name, and a whole number that was stored as a float as an integer."""
    if isinstance(value, bool):
        return str(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _check_label(value: Any, where: str) -> None:
    if not isinstance(value, int | str) or value == "":
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
    if value is None or value == "":
        return "nothing" if value is None else "an empty string"
    name = type(value).__name__
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _check_tokens(value: Any, where: str) -> None:
    if not isinstance(value, list) or not all(type(token) is int for token in value):
        raise DataError(f"{where}: got {_kind(value)}; give a list of integers")


_CHECKS: dict[str, Callable[[Any, str], None]] = {
    "input_ids": _check_tokens,
    "labels": _check_tokens,
    "text": _check_text,
    "prompt": _check_prompt,
    "completion": _check_prompt,
    "label": _check_label,
    "messages": _check_messages,
    "chosen": _check_prompt,
    "rejected": _check_prompt,
}
