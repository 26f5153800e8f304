"""Atomic writes: to a temporary file beside the target, which then replaces it."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import yaml
from safetensors import SafetensorError

from rightrank.schema.errors import RunError, RunFolderError, SettingsError

_DISK_ERRORS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE,
}  # fmt: skip
_NOT_ALLOWED = {errno.EROFS, errno.EACCES, errno.EPERM}  # more room does not help
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF}  # from network file systems that can't flush a folder
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.\d+\.rightrank-(?P<kind>tmp|old)")  # as no other program names its own


@contextmanager
def replacing(path: Path, flush: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which replaces `path` when the block succeeds.

    With `flush=False` the replacement is atomic but may be lost in a power failure, as is fine for a progress file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _neighbour(path, "tmp")
    try:
        yield temporary
        if flush:
            flush_to_disk(temporary)
        _rename(temporary, path)
        if flush:
            flush_to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, which replaces `path` when the block succeeds.

    Replacing takes two renames. If the process is killed between them, `sweep_leftovers` restores the old folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = _neighbour(path, "tmp"), _neighbour(path, "old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for inside in temporary.rglob("*"):
            flush_to_disk(inside)
        flush_to_disk(temporary)
        if path.exists():
            _rename(path, old)
        _rename(temporary, path)
        flush_to_disk(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path` that is removed after the block, or by `sweep_leftovers` where the process is killed."""
    temporary = _neighbour(path, "tmp")
    temporary.mkdir()
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_absent(out: Path) -> None:
    """Require that `out` does not exist.

    Raises:
        RunFolderError: `out` exists.
    """
    if out.exists() or out.is_symlink():
        raise RunFolderError(f"{out}: exists already; give a folder that does not exist yet, or remove it first")


@contextmanager
def creating(out: Path) -> Iterator[None]:
    """A block that makes `out`.

    Raises:
        RunFolderError: `out` exists, or can't be written.
    """
    require_absent(out)
    try:
        yield
    except OSError as error:
        raise RunFolderError(f"{out}: can't write there ({error.strerror or error}); give a writable folder") from None


def write_text(path: Path, text: str, flush: bool = True) -> None:
    with replacing(path, flush) as temporary:
        temporary.write_text(text, encoding="utf-8")


def is_leftover(path: Path) -> bool:
    """Whether a file or folder has the name of one that a killed process left half written."""
    return _LEFTOVER.fullmatch(path.name) is not None


def sweep_leftovers(folder: Path) -> None:
    """Remove what a killed process left half written under `folder`, and restore a folder that it had moved aside.

    The caller must hold the folder's lock: the half-written files of a running process look the same.
    """
    for path in sorted(folder.rglob(".*")):
        leftover = _LEFTOVER.fullmatch(path.name)
        if leftover is None:
            continue
        whole = path.with_name(leftover["name"])
        if leftover["kind"] == "old" and not whole.exists():
            path.rename(whole)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def _neighbour(path: Path, kind: str) -> Path:
    number = secrets.randbelow(10**12)  # process ids are not unique across machines that share a disk
    return path.with_name(f".{path.name}.{number}.rightrank-{kind}")


def _rename(source: Path, target: Path) -> None:
    """Rename, replacing a file.

    NFS repeats a rename whose reply was lost, and the repetition finds no source. If the target then is the former
    source, the rename has succeeded.
    """
    before = source.stat()
    try:
        source.replace(target)
    except FileNotFoundError:
        if source.exists() or not target.exists() or not os.path.samestat(before, target.stat()):
            raise


@contextmanager
def report_disk_errors(folder: Path) -> Iterator[None]:
    """Report a full or failing disk as a `RunError` of one line; what was written before stays.

    Raises:
        RunError: in place of the system's error.
    """
    advice = "make room and run the same command again to resume"
    permission = (
        "give a folder that you may write to, or change its permissions and run the same command again to resume"
    )
    try:
        yield
    except SafetensorError as error:
        if not re.search("IoError|I/O error", str(error)):
            raise
        raise RunError(f"{folder}: can't write there ({error}); {advice}") from None
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise RunError(
            f"{folder}: can't write there ({error.strerror}); {permission if error.errno in _NOT_ALLOWED else advice}"
        ) from None


MAX_TEXT_BYTES = 64 * 2**20  # of a file that is read at once


class UnreadableError(ValueError):
    """A file or text can't be read; the message completes `FILE: can't read it (...)`."""

    def __init__(self, reason: str, line: int = 1) -> None:
        super().__init__(reason)
        self.line = line


def path_kind(path: Path) -> Literal["file", "folder", "other", "missing"]:
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
    kind = path_kind(path)
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
        UnreadableError: as `read_text` and `parse_json`, or a value other than an object.
    """
    text = read_text(path, max_bytes)
    value = parse_json(text)
    if "\\ud" in text.lower() and not is_text(json.dumps(value, ensure_ascii=False)):
        raise UnreadableError("a lone surrogate, which is not text")
    if not isinstance(value, dict):
        raise UnreadableError(f"a {type(value).__name__}, not one JSON object")
    return value


MAX_FILE_BYTES = 100 * 2**10


def read_config(path: Path) -> dict[str, Any]:
    """The settings in a YAML file; `-` in names is read as `_`.

    Raises:
        SettingsError: no such file, not YAML of plain values, or not a mapping.
    """
    try:
        text = read_text(path, MAX_FILE_BYTES)
    except UnreadableError as error:
        raise SettingsError(f"{path}: can't read it ({error}); give a YAML file of settings") from None
    try:
        values = yaml.load(text, _PlainLoader)
    except RecursionError:
        raise SettingsError(f"{path}: nested too deeply; give `name: value` lines") from None
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise SettingsError(f"{path}: not YAML of plain values ({reason}); give `name: value` lines") from None
    if not isinstance(values, dict):
        raise SettingsError(f"{path}: got a {type(values).__name__}; give `name: value` lines")
    return {str(name).replace("-", "_"): value for name, value in values.items()}
