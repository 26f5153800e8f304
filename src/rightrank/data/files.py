"""Read small files, and write files atomically: to a temporary path that then replaces the target."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import yaml
from safetensors import SafetensorError

from rightrank.schema.errors import RunError, RunFolderError, SettingsError

_DISK_ERRORS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE,
}  # fmt: skip
_UNSUPPORTED_SYNC_ERRORS = {
    errno.EINVAL,
    errno.ENOTSUP,
    errno.EBADF,
}  # raised by network file systems that cannot flush a folder
_LEFTOVER_NAME = re.compile(r"\.(?P<name>.+)\.\d+\.rightrank-(?P<kind>tmp|old)")  # a name that no other program uses


@contextmanager
def replace_file(path: Path, flush: bool = True) -> Iterator[Path]:
    """Yield a temporary path next to `path`, which replaces `path` if the block succeeds.

    With `flush=False` the replacement is still atomic, but a power failure may undo it. Progress files need no more.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _build_temporary_path(path, "tmp")
    try:
        yield temporary
        if flush:
            flush_to_disk(temporary)
        temporary.replace(path)
        if flush:
            flush_to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `path`, which replaces `path` if the block succeeds.

    Replacing takes two renames. If the process is killed between them, `sweep_leftovers` restores the old folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = _build_temporary_path(path, "tmp"), _build_temporary_path(path, "old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for inside in temporary.rglob("*"):
            flush_to_disk(inside)
        flush_to_disk(temporary)
        if path.exists():
            path.replace(old)
        temporary.replace(path)
        flush_to_disk(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def require_absent(out: Path) -> None:
    """Require that `out` does not exist.

    Raises:
        RunFolderError: `out` exists.
    """
    if out.exists() or out.is_symlink():
        raise RunFolderError(f"{out}: this path already exists; give a new folder, or remove it first")


@contextmanager
def create_output(out: Path) -> Iterator[None]:
    """Run a block that creates `out`.

    Raises:
        RunFolderError: `out` exists or cannot be written.
    """
    require_absent(out)
    try:
        yield
    except OSError as error:
        raise RunFolderError(f"{out}: can't write there ({error.strerror or error}); give a writable folder") from None


def write_text(path: Path, text: str, flush: bool = True) -> None:
    with replace_file(path, flush) as temporary:
        temporary.write_text(text, encoding="utf-8")


def is_leftover(path: Path) -> bool:
    """Return whether a path has the name of a temporary file or folder that a killed process left behind."""
    return _LEFTOVER_NAME.fullmatch(path.name) is not None


def sweep_leftovers(folder: Path) -> None:
    """Remove the temporary files of killed processes under `folder`, and restore a folder that one of them had moved away.

    The caller must hold the folder's lock, because the temporary files of a running process look the same.
    """
    for path in sorted(folder.rglob(".*")):
        leftover = _LEFTOVER_NAME.fullmatch(path.name)
        if leftover is None:
            continue
        original = path.with_name(leftover["name"])
        if leftover["kind"] == "old" and not original.exists():
            path.rename(original)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED_SYNC_ERRORS or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def _build_temporary_path(path: Path, kind: str) -> Path:
    number = secrets.randbelow(10**12)  # Process ids are not unique across machines that share a disk.
    return path.with_name(f".{path.name}.{number}.rightrank-{kind}")


@contextmanager
def report_disk_errors(folder: Path) -> Iterator[None]:
    """Report a full or failing disk as a `RunError` of one line. Files that were already written stay.

    Raises:
        RunError: instead of the operating system's error.
    """
    advice = "make room or give a folder that you may write to, and run the same command again to resume"
    try:
        yield
    except SafetensorError as error:
        if not re.search("IoError|I/O error", str(error)):
            raise
        raise RunError(f"{folder}: can't write there ({error}); {advice}") from None
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise RunError(f"{folder}: can't write there ({error.strerror}); {advice}") from None


MAX_TEXT_BYTES = 64 * 2**20  # of a file that is read into memory


class UnreadableError(ValueError):
    """A file or text can't be read; the message completes `FILE: can't read it (...)`."""

    def __init__(self, reason: str, line: int = 1) -> None:
        super().__init__(reason)
        self.line = line


def detect_path_kind(path: Path) -> Literal["file", "folder", "other", "missing"]:
    """Return the kind of a path. Devices, pipes and sockets are `other`; an invalid name is `missing`."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return "missing"
    if stat.S_ISREG(mode):
        return "file"
    return "folder" if stat.S_ISDIR(mode) else "other"


def read_text(path: Path, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """Return the text of a regular UTF-8 file, with or without a byte order mark.

    Raises:
        UnreadableError: not a regular file, larger than `max_bytes`, not UTF-8, or not readable.
    """
    kind = detect_path_kind(path)
    if kind in ("folder", "other"):
        raise UnreadableError("a folder" if kind == "folder" else "not a regular file")
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise UnreadableError(f"{size / 2**20:,.1f} MiB, the limit is {max_bytes / 2**20:,.1f} MiB")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnreadableError(f"not UTF-8 text (byte {error.start}: {error.reason})") from None
    except OSError as error:
        raise UnreadableError(error.strerror or str(error)) from None


_DECODER = json.JSONDecoder()


def find_repeated_name(names: Sequence[str]) -> str | None:
    """Return the first name that occurs twice, or None."""
    return next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None


def _build_row_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object from its names and values; without this, the first of two values with one name is dropped."""
    repeated = find_repeated_name([name for name, _ in pairs])
    if repeated is not None:
        raise UnreadableError(f"two columns are named {repeated!r}")
    return dict(pairs)


ROW_DECODER = json.JSONDecoder(object_pairs_hook=_build_row_object)  # of rows of data and of tables


def parse_json(text: str, decoder: json.JSONDecoder = _DECODER) -> Any:
    """Parse a JSON value.

    Raises:
        UnreadableError: not JSON, nested too deeply, or an integer with thousands of digits.
    """
    try:
        return decoder.decode(text)
    except json.JSONDecodeError as error:
        raise UnreadableError(f"{error.msg} at column {error.colno}", error.lineno) from None
    except RecursionError:
        raise UnreadableError("nested too deeply") from None
    except UnreadableError:  # of the decoder
        raise
    except ValueError:
        raise UnreadableError("an integer of thousands of digits") from None


class _PlainLoader(yaml.SafeLoader):
    """Loads plain values only: no Python tags, and no aliases, which can expand without limit."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not read; write the value out")
        return super().compose_node(parent, index)


def is_encodable(text: str) -> bool:
    """Return whether a string can be encoded as UTF-8. A string with a lone surrogate cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_json_object(path: Path, max_bytes: int = MAX_TEXT_BYTES) -> dict[str, Any]:
    """Read the JSON object in a file.

    Raises:
        UnreadableError: as for `read_text` and `parse_json`, or if the value is not an object.
    """
    text = read_text(path, max_bytes)
    value = parse_json(text)
    if "\\ud" in text.lower() and not is_encodable(json.dumps(value, ensure_ascii=False)):
        raise UnreadableError("a lone surrogate, which is not text")
    if not isinstance(value, dict):
        raise UnreadableError(f"a {type(value).__name__}, not one JSON object")
    return value


MAX_CONFIG_BYTES = 100 * 2**10


def read_config(path: Path) -> dict[str, Any]:
    """Read settings from a YAML file. A `-` in a name is read as `_`.

    Raises:
        SettingsError: no such file, not YAML with plain values, or not a mapping.
    """
    try:
        text = read_text(path, MAX_CONFIG_BYTES)
    except UnreadableError as error:
        raise SettingsError(f"{path}: can't read it ({error}); give a YAML file of settings") from None
    try:
        values = yaml.load(text, _PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise SettingsError(f"{path}: not YAML of plain values ({reason}); give `name: value` lines") from None
    if not isinstance(values, dict):
        raise SettingsError(f"{path}: got {type(values).__name__}; give `name: value` lines")
    return {str(name).replace("-", "_"): value for name, value in values.items()}
