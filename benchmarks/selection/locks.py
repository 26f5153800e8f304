"""Locks a grid: brings its file into `locked/`, where no one reads it until the rules that it judges are fixed.

    python -m benchmarks.selection.locks FOLDER/tweets.json.xz --commit COMMIT_IT_WAS_TRAINED_FROM

A grid that has a lock may be locked again only while it is partial, with more seeds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import TypedDict

from benchmarks.results import read_bytes, read_json

LOCKED = Path(__file__).parent / "locked"
LOCK = LOCKED / "lock.json"


class Lock(TypedDict):
    """What `lock.json` says of one file."""

    sha256: str
    locked: str  # the date
    trained_from: str  # a commit
    seeds: list[int]
    partial: bool


def digest(file: Path) -> str:
    """Return the SHA-256 of the JSON text, whether or not the file is compressed."""
    return hashlib.sha256(read_bytes(file)).hexdigest()


def read_lock() -> dict[str, Lock]:
    """File name → its lock; empty before the first one."""
    found: dict[str, Lock] = json.loads(LOCK.read_text()) if LOCK.exists() else {}
    return found


def files() -> list[Path]:
    return [LOCKED / name for name in read_lock()]


def lock(file: Path, commit: str) -> None:
    """Bring the file into the locked folder, with its hash, the date and the commit that it was trained from."""
    (curve,) = read_json(file)["curves"]
    known = read_lock()
    if file.name in known:
        before = known[file.name]
        assert before["partial"], f"{file.name} is locked and whole"
        assert set(curve["seeds"]) > set(before["seeds"]), f"{file.name}: no further seed"
    shutil.copy(file, LOCKED / file.name)
    known[file.name] = {
        "sha256": digest(LOCKED / file.name),
        "locked": datetime.now(UTC).date().isoformat(),
        "trained_from": commit,
        "seeds": curve["seeds"],
        "partial": curve["partial"],
    }
    LOCK.write_text(json.dumps(known, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--commit", required=True)
    options = parser.parse_args()
    lock(options.file, options.commit)


if __name__ == "__main__":
    main()
