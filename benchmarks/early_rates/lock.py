"""Lock the protocol, the rule, and each stored grid: their SHA-256 go into `lock.json`.

python -m benchmarks.early_rates.lock protocol DATA                # once, before the first training
python -m benchmarks.early_rates.lock rule                         # once, before a judged grid is read
python -m benchmarks.early_rates.lock grids OUT --commit COMMIT    # copies new files; COMMIT is what they were trained from
"""

from __future__ import annotations

import argparse
import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.learning_rate.lock import hash_file

HERE = Path(__file__).parent
LOCK, GRIDS = HERE / "lock.json", HERE / "grids"
CODE = ("README.md", "grids.py", "texts.py", "train.py", "lock.py", "../learning_rate/bases.py", "../learning_rate/train_grids.py")  # fmt: skip
RULE = ("rules.py", "judge.py", "complete.py")


def read_lock() -> dict[str, Any]:
    return json.loads(LOCK.read_text()) if LOCK.exists() else {"code": {}, "data": {}, "rule": {}, "grids": {}}


def lock_files(lock: dict[str, Any], key: str, paths: dict[str, Path]) -> None:
    if lock[key]:
        raise SystemExit(f"{LOCK.name}: {key} is locked")
    lock[key] = {name: hash_file(path) for name, path in paths.items()}


def lock_grids(lock: dict[str, Any], out: Path, commit: str) -> None:
    """Copy each new file and record its hash; a locked file stays as it is."""
    GRIDS.mkdir(exist_ok=True)
    for path in sorted(out.glob("*.npz")):
        if path.name not in lock["grids"] and ".part" not in path.name:
            shutil.copy(path, GRIDS / path.name)
            time = datetime.now(UTC).isoformat(timespec="minutes")
            lock["grids"][path.name] = {"sha256": hash_file(path), "locked": time, "trained_from": commit}
            print(path.name, lock["grids"][path.name]["sha256"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subject", choices=("protocol", "rule", "grids"))
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--commit", default="")
    options = parser.parse_args()
    lock = read_lock()
    if options.subject == "protocol":
        lock_files(lock, "code", {name: HERE / name for name in CODE})
        lock_files(lock, "data", {path.name: path for path in sorted(options.folder.glob("*.jsonl"))})
    elif options.subject == "rule":
        lock_files(lock, "rule", {name: HERE / name for name in RULE})
    else:
        lock_grids(lock, options.folder, options.commit)
    LOCK.write_text(json.dumps(lock, indent=1) + "\n")


if __name__ == "__main__":
    main()
