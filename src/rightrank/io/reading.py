"""Reading small files that others made: regular files of a sane size, JSON and YAML whatever they hold."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any, Literal

import yaml

MAX_TEXT_BYTES = 64 * 2**20  # bytes of a file that is read whole
# What libraries raise, beside errors of their own, for damaged or unknown files.
LIBRARY_ERRORS = (
    OSError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError, AssertionError,
)  # fmt: skip


class UnreadableError(ValueError):
    """Why a file or a text can't be read, in words that fit behind its name."""

    def __init__(self, reason: str, line: int = 1) -> None:
        super().__init__(reason)
        self.line = line


def kind_of(path: Path) -> Literal["file", "folder", "other", "missing"]:
    """What is at `path`: devices, pipes and sockets are `other`; a name that no file can have is missing."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return "missing"
    if stat.S_ISREG(mode):
        return "file"
    return "folder" if stat.S_ISDIR(mode) else "other"


def read_text(path: Path, largest: int = MAX_TEXT_BYTES) -> str:
    """The text of a regular file, UTF-8 with or without a byte order mark.

    Raises:
        UnreadableError: no regular file, above `largest` bytes, not UTF-8, or the system refuses.
    """
    found = kind_of(path)
    if found in ("folder", "other"):
        raise UnreadableError("a folder" if found == "folder" else "no regular file")
    try:
        size = path.stat().st_size
        if size > largest:
            raise UnreadableError(f"{size / 2**20:,.1f} MiB are too much, at most {largest / 2**20:,.1f} MiB are read")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnreadableError(f"not UTF-8 text (byte {error.start}: {error.reason})") from None
    except OSError as error:
        raise UnreadableError(error.strerror or str(error)) from None


def parse_json(text: str) -> Any:
    """A JSON value.

    Raises:
        UnreadableError: not JSON, nested too deeply, or a whole number of thousands of digits.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UnreadableError(f"{error.msg} at column {error.colno}", error.lineno) from None
    except RecursionError:
        raise UnreadableError("nested too deeply") from None
    except ValueError:
        raise UnreadableError("a whole number of thousands of digits") from None


class _PlainLoader(yaml.SafeLoader):
    """YAML's plain values alone: no tags of Python's, and no aliases, whose copies of copies can be without end."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not read; write the value out")
        return super().compose_node(parent, index)


def parse_yaml(text: str) -> Any:
    """A YAML value of plain values.

    Raises:
        UnreadableError: not YAML, tags or aliases, nested too deeply, or a date or number that is none.
    """
    try:
        return yaml.load(text, _PlainLoader)
    except RecursionError:
        raise UnreadableError("nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UnreadableError(" ".join(str(error).split())) from None


def read_json(path: Path, largest: int = MAX_TEXT_BYTES) -> Any:
    """The JSON value in a file.

    Raises:
        UnreadableError: as `read_text` and `parse_json`.
    """
    text = read_text(path, largest)
    value = parse_json(text)
    if "\\ud" in text.lower() and not is_text(json.dumps(value, ensure_ascii=False)):
        raise UnreadableError("half a character (a lone surrogate), which no text holds")
    return value


def is_text(text: str) -> bool:
    """Whether UTF-8 can hold it: half of a surrogate pair is no character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_json_object(path: Path, largest: int = MAX_TEXT_BYTES) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UnreadableError: as `read_json`, or another value than an object.
    """
    value = read_json(path, largest)
    if not isinstance(value, dict):
        raise UnreadableError(f"a {type(value).__name__}, not one JSON object")
    return value
