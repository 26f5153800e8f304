"""Atomic writes: to a temporary file beside the target, which then replaces it."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from rightrank.errors import RunError, RunFolderError

_DISK_ERRORS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE,
}  # fmt: skip
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF}  # from network file systems that can't flush a folder
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.\d+\.(?P<kind>tmp|old)")


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


def require_absent(out: Path) -> None:
    """Require that `out` does not exist.

    Raises:
        RunFolderError: `out` exists.
    """
    if out.exists() or out.is_symlink():
        raise RunFolderError(f"{out}: exists already; give a folder that does not exist yet, or remove it first")


def write_text(path: Path, text: str, flush: bool = True) -> None:
    with replacing(path, flush) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sweep_leftovers(folder: Path) -> None:
    """Remove what a killed process left half written under `folder`, and restore a folder that it had moved aside.

    The caller must hold the folder's lock: the half-written files of a running process look the same.
    """
    for path in sorted(folder.rglob(".*")):
        found = _LEFTOVER.fullmatch(path.name)
        if found is None:
            continue
        whole = path.with_name(found["name"])
        if found["kind"] == "old" and not whole.exists():
            path.rename(whole)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def preallocate(path: Path, size: int) -> None:
    """Create a file of `size` bytes with its disk space allocated.

    Writing to a mapped file on a full disk would kill the process.

    Raises:
        OSError: the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:  # macOS
            file.truncate(size)


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
    return path.with_name(f".{path.name}.{number}.{kind}")


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
    try:
        yield
    except SafetensorError as error:
        if "IoError" not in str(error):
            raise
        raise RunError(f"{folder}: can't write there ({error}); {advice}") from None
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise RunError(f"{folder}: can't write there ({error.strerror}); {advice}") from None


def cache_folder() -> Path:
    """The user's cache folder of `rightrank`, where the packages of Hugging Face would have it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rightrank"
