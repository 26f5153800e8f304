"""Lock the protocol, and each stored seed of a grid: their SHA-256 go into `lock.json`.

python -m benchmarks.learning_rate.lock protocol DATA                  # once, before the first training
python -m benchmarks.learning_rate.lock grids OUT --commit COMMIT      # copies new files; COMMIT is what they were trained from
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LOCK, GRIDS = HERE / "lock.json", HERE / "grids"
CODE = ("texts.py", "bases.py", "train_grids.py", "policies.py", "judge.py", "stated.py", "lock.py", "README.md")


def hash_file(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_lock() -> dict[str, Any]:
    """Return the locks of the protocol (`code`, `data`) and of the grids."""
    return json.loads(LOCK.read_text()) if LOCK.exists() else {"code": {}, "data": {}, "grids": {}}


def lock_protocol(data: Path) -> None:
    """Record the hashes of the code and of the data, before the first training."""
    lock = read_lock()
    if lock["grids"]:
        raise SystemExit("the protocol is locked: grids have been trained")
    lock["code"] = {name: hash_file(HERE / name) for name in CODE}
    lock["data"] = {path.name: hash_file(path) for path in sorted(data.glob("*.jsonl"))}
    LOCK.write_text(json.dumps(lock, indent=1) + "\n")


def lock_grids(out: Path, commit: str) -> None:
    """Copy each new file and record its hash; a locked file stays as it is."""
    lock = read_lock()
    GRIDS.mkdir(exist_ok=True)
    for path in sorted(out.glob("*_[0-9].npz")):
        if path.name not in lock["grids"]:
            shutil.copy(path, GRIDS / path.name)
            entry = {
                "sha256": hash_file(path),
                "locked": datetime.now(UTC).isoformat(timespec="minutes"),
                "trained_from": commit,
            }
            lock["grids"][path.name] = entry
            print(path.name, entry["sha256"])
    LOCK.write_text(json.dumps(lock, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subject", choices=("protocol", "grids"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--commit", default="")
    options = parser.parse_args()
    if options.subject == "protocol":
        lock_protocol(options.folder)
    else:
        lock_grids(options.folder, options.commit)


if __name__ == "__main__":
    main()
