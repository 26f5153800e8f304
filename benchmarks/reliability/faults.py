"""Faults put into a small selection, and whether it still ends in the right decision with no trial lost.

    python -m benchmarks.reliability.faults --times 10 --out benchmarks/reliability/faults.json

Every fault is tried at random places from one seed, and every run is then taken to its end and compared with an
undisturbed one: decision, trials, adapter. `kill -9` has its own program (`benchmarks/resume/kill.py`). Needs root for
the small disk; without it that fault is left out and said.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from benchmarks.results import store
from benchmarks.resume.kill import Case, end_of, lines_of, outcome, started_again


class Faults:
    """Each method breaks a run at a random place and gives what was lost by then: trials whose record was hit."""

    def __init__(self, case: Case, whole: Path, seconds: float, generator: random.Random) -> None:
        self._case, self._whole, self._seconds, self._random = case, whole, seconds, generator

    def cut_journal(self, out: Path) -> set[str]:
        """The journal of a finished run ends at a random byte, as after a crash of the machine."""
        journal = self._copy(out)
        text = journal.read_bytes()
        before = set(lines_of(out, "trial_finished"))
        start = text.index(b"\n") + 1
        journal.write_bytes(text[: self._random.randrange(start, len(text))])
        return before - set(lines_of(out, "trial_finished"))

    def flipped_bit_in_journal(self, out: Path) -> set[str]:
        """One bit of a random line after the first; found, told, repaired."""
        journal = self._copy(out)
        lines = journal.read_bytes().splitlines(keepends=True)
        number = self._random.randrange(1, len(lines))
        line = bytearray(lines[number])
        line[self._random.randrange(len(line) - 1)] ^= 1 << self._random.randrange(8)
        journal.write_bytes(b"".join([*lines[:number], bytes(line), *lines[number + 1 :]]))
        if end_of(self._case.start(out)) != 2:
            raise RuntimeError("a flipped bit was not found")
        self._require_told(f"journal.jsonl:{number + 1}: damaged")
        command = [sys.executable, "-m", "rightrank", "repair", str(out)]
        subprocess.run(command, check=True, capture_output=True)
        record = json.loads(lines[number])
        return {record["trial_id"]} if record["type"] == "trial_finished" else set()

    def flipped_bit_in_checkpoint(self, out: Path) -> set[str]:
        """Killed in a training, and one bit of its checkpoint's tensors flipped."""
        self._kill_in("training", out)
        for path in (out / "checkpoints").glob("*.safetensors"):
            content = bytearray(path.read_bytes())
            content[self._random.randrange(len(content) // 2, len(content))] ^= 1 << self._random.randrange(8)
            path.write_bytes(bytes(content))
        return set()

    def sigterm(self, out: Path) -> set[str]:
        """Asked to end at a random moment after the first trial began; exit 143 unless it had ended."""
        child = self._case.start(out, "training", self._random.randint(1, self._case.usual["training"][0]))
        self._case.moments.wait(child, 10 * self._seconds + 60)
        subprocess.run(["kill", "-TERM", str(child)], check=False)
        if end_of(child) not in (143, 0):
            raise RuntimeError(f"SIGTERM: {self._case.log()[-300:]}")
        return set()

    def full_disk(self, out: Path) -> set[str]:
        """A disk of a random size that the run does not fit on; then there is room."""
        whole = sum(path.stat().st_size for path in self._whole.rglob("*") if path.is_file())
        size = self._random.randrange(8 * 1024, whole)
        out.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(out)]
        subprocess.run(mount, check=True)
        status = end_of(self._case.start(out))
        if status not in (0, 1) or (status == 1 and "resume" not in self._case.log()):
            raise RuntimeError(f"full disk: exit {status}, {self._case.log()[-300:]}")
        subprocess.run(["mount", "-o", f"remount,size={4 * whole}", str(out)], check=True)
        return set()

    def leftovers(self, out: Path) -> set[str]:
        """Killed while files are written, again and again."""
        for _ in range(2):
            self._kill_in("views", out)
        return set()

    def second_process(self, out: Path) -> set[str]:
        """Another process wants the folder while one works in it: refused with exit 2, the first is not disturbed."""
        first = self._case.start(out, "training", 2)
        self._case.moments.wait(first, 10 * self._seconds + 60)
        if end_of(self._case.start(out)) != 2:
            raise RuntimeError("the second process was let in")
        self._require_told("another process is using this folder")
        if end_of(first) != 0:
            raise RuntimeError(f"the first process failed: {self._case.log()[-300:]}")
        return set()

    def _copy(self, out: Path) -> Path:
        shutil.copytree(self._whole, out)
        return out / "journal.jsonl"

    def _kill_in(self, phase: str, out: Path) -> None:
        entries, each = self._case.usual[phase]
        child = self._case.start(out, phase, self._random.randint(1, entries))
        self._case.moments.wait(child, 10 * self._seconds + 60)
        time.sleep(self._random.uniform(0, each))
        subprocess.run(["kill", f"-{signal.SIGKILL.value}", str(child)], check=False)
        end_of(child)

    def _require_told(self, words: str) -> None:
        if words not in self._case.log():
            raise RuntimeError(f"{words!r} was not said: {self._case.log()[-300:]}")


def add(
    row: dict[str, Any], fault: Callable[[Path], set[str]], case: Case, expected: dict[str, Any], out: Path
) -> None:
    """Try a fault once more, and add it to its row of the table."""
    hit = fault(out)
    before = lines_of(out, "trial_finished")
    status = end_of(case.start(out))
    ended = outcome(out) if status == 0 else {}
    same = all(ended.get(name) == expected[name] for name in ("decision", "trials", "adapter"))
    kept = lines_of(out, "trial_finished")
    good = status == 0 and same and not ended["left_over"] and started_again(out) <= hit
    row["tried"] += 1
    row["right"] += good
    row["trials_lost"] += sum(kept.get(trial) != line for trial, line in before.items())
    if not good:
        row["wrong"].append(f"exit {status}: {case.log()[-300:]}")
    subprocess.run(["umount", str(out)], check=False, capture_output=True)
    shutil.rmtree(out)


def measure(times: int, seed: int, root: Path, out: Path | None) -> dict[str, Any]:
    """All faults in turn until each was tried `times` times; `out` holds the sums so far after each round."""
    case = Case(root)
    case.warm_up(root / "warm")
    begun = time.monotonic()
    if end_of(case.start(root / "whole")) != 0:
        raise SystemExit(f"the undisturbed run failed: {case.log()}")
    seconds = time.monotonic() - begun
    case.usual = case.moments.usual()
    faults = Faults(case, root / "whole", seconds, random.Random(seed))
    expected = outcome(root / "whole")
    rows: dict[str, dict[str, Any]] = {}
    kinds = (
        faults.cut_journal,
        faults.flipped_bit_in_journal,
        faults.flipped_bit_in_checkpoint,
        faults.sigterm,
        faults.full_disk,
        faults.second_process,
        faults.leftovers,
    )
    for _ in range(times):
        for fault in kinds:
            row = rows.setdefault(fault.__name__, {"tried": 0, "right": 0, "trials_lost": 0, "wrong": []})
            add(row, fault, case, expected, root / "run")
            result = {"machine": machine(), "seed": seed, "faults": rows}
            store(result, out)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="written after each fault")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(options.times, options.seed, Path(folder), options.out), indent=1))


if __name__ == "__main__":
    main()
