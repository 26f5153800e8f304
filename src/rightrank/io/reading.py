"""Reads untrusted small files: regular files of limited size, and JSON or YAML with any content."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any, Literal

import yaml

MAX_TEXT_BYTES = 64 * 2**20  # of a file that is read at once
# What libraries raise, beside errors of their own, for damaged or unknown files.
LIBRARY_ERRORS = (
    OSError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError, AssertionError,
)  # fmt: skip


class UnreadableError(ValueError):
    """A file or text can't be read; the message completes `FILE: can't read it (...)`."""

    def __init__(self, reason: str, line: int = 1) -> None:
        super().__init__(reason)
        self.line = line


def kind_of(path: Path) -> Literal["file", "folder", "other", "missing"]:
    """What is at `path`. Devices, pipes and sockets are `other`; an invalid name is `missing`."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return "missing"
    if stat.S_ISREG(mode):
        return "file"
    return "folder" if stat.S_ISDIR(mode) else "other"


def read_text(path: Path, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """The text of a regular UTF-8 file, with or without a byte order mark.

    Raises:
        UnreadableError: not a regular file, above `max_bytes`, not UTF-8, or not readable.
    """
    found = kind_of(path)
    if found in ("folder", "other"):
        raise UnreadableError("a folder" if found == "folder" else "not a regular file")
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise UnreadableError(f"{size / 2**20:,.1f} MiB, the limit is {max_bytes / 2**20:,.1f} MiB")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnreadableError(f"not UTF-8 text (byte {error.start}: {error.reason})") from None
    except OSError as error:
        raise UnreadableError(error.strerror or str(error)) from None


def parse_json(text: str) -> Any:
    """A JSON value.

    Raises:
        UnreadableError: not JSON, nested too deeply, or an integer of thousands of digits.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UnreadableError(f"{error.msg} at column {error.colno}", error.lineno) from None
    except RecursionError:
        raise UnreadableError("nested too deeply") from None
    except ValueError:
        raise UnreadableError("an integer of thousands of digits") from None


class _PlainLoader(yaml.SafeLoader):
    """Loads plain values only: no Python tags, and no aliases, which can expand without limit."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not read; write the value out")
        return super().compose_node(parent, index)


def parse_yaml(text: str) -> Any:
    """A YAML value without tags and aliases.

    Raises:
        UnreadableError: not YAML, tags or aliases, nested too deeply, or an invalid date or number.
    """
    try:
        return yaml.load(text, _PlainLoader)
    except RecursionError:
        raise UnreadableError("nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UnreadableError(" ".join(str(error).split())) from None


def read_json(path: Path, max_bytes: int = MAX_TEXT_BYTES) -> Any:
    """The JSON value in a file.

    Raises:
        UnreadableError: as `read_text` and `parse_json`.
    """
    text = read_text(path, max_bytes)
    value = parse_json(text)
    if "\\ud" in text.lower() and not is_text(json.dumps(value, ensure_ascii=False)):
        raise UnreadableError("a lone surrogate, which is not text")
    return value


def is_text(text: str) -> bool:
    """Whether the string can be encoded as UTF-8; one with a lone surrogate can't."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_json_object(path: Path, max_bytes: int = MAX_TEXT_BYTES) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UnreadableError: as `read_json`, or a value other than an object.
    """
    value = read_json(path, max_bytes)
    if not isinstance(value, dict):
        raise UnreadableError(f"a {type(value).__name__}, not one JSON object")
    return value
