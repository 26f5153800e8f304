"""`kill -9` at random moments of a small selection, resumed: does it end the same, is anything lost or trained twice?

    python -m benchmarks.resume.kill --kills 200 --seed 0 > benchmarks/resume/kill.json

Each round starts a selection in a process of its own, kills it with SIGKILL, resumes it to its end, and compares it
with an undisturbed run. The moments take turns: anywhere in the run's time; and inside a step, an evaluation, an
append to the journal, a checkpoint, or the writing of reports, adapters and figures, each at a random one of them and
a random while after it began. Processes are forked from one that has torch loaded: a run then takes seconds, all its
own. Prints one JSON object. What a power cut does to a disk's own cache, no kill can show.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.tiny import save_tiny_llama, write_completions

import rightrank.executors.local
import rightrank.preparation
import rightrank.selection  # noqa: F401 - what every forked run has loaded
from benchmarks.machine import machine
from benchmarks.resume.moments import PHASES, Moments, watch_phases

ARGUMENTS = [
    "--strategy", "grid", "--ranks", "1,4", "--learning-rates", "1e-2", "--max-steps", "40", "--batch-size", "4",
    "--seq-len", "32", "--eval-items", "12", "--set", "checkpoint_seconds=0.05", "--set", "samples=0", "--device", "cpu",
    "--quiet",
]  # fmt: skip
ANYWHERE = "anywhere"


class Case:
    """One model, one data file, and runs of one selection over them."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._model, self._data = save_tiny_llama(root / "model"), write_completions(root / "data.jsonl")
        self.moments = Moments()
        self.usual: dict[str, tuple[int, float]] = {}  # of the undisturbed run: entries and mean seconds by phase

    def start(self, out: Path, phase: str | None = None, entry: int = 0) -> int:
        """Process id; `moments.wait()` then returns at that entry into that phase."""
        self.moments.ask(phase, entry)
        child = os.fork()
        if child == 0:
            self._run(out)
        return child

    def _run(self, out: Path) -> None:
        """In the child: the command, and never back into the parent's code."""
        from rightrank.cli import main

        log = os.open(self._root / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        status = 70
        try:
            watch_phases(self.moments)
            main(["select", str(self._model), str(self._data), "--out", str(out), *ARGUMENTS])
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 70
        finally:
            os._exit(status)

    def log(self) -> str:
        return (self._root / "log").read_text()


def end_of(child: int) -> int:
    """The exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def lines_of(out: Path, kind: str) -> dict[str, bytes]:
    """Whole journal lines of a kind by trial; a torn last line is none."""
    journal = out / "journal.jsonl"
    whole = journal.read_bytes() if journal.exists() else b""
    found: dict[str, bytes] = {}
    for line in whole[: whole.rfind(b"\n") + 1].splitlines():
        record = json.loads(line)
        if record["type"] == kind:
            found[record["trial_id"]] = line
    return found


def outcome(out: Path) -> dict[str, Any]:
    """All that must not depend on a kill."""
    journal = [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]
    finished = [line for line in journal if line["type"] == "trial_finished"]
    names = ("trial_id", "value", "item_losses", "train_losses", "points")
    adapter = hashlib.sha256((out / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()
    return {
        "decision": (out / "decision.json").read_text(),
        "trials": {line["trial_id"]: [line[name] for name in names] for line in finished},
        "finished": Counter(line["trial_id"] for line in finished),
        "adapter": adapter,
        "report": (out / "report.html").read_text().rstrip().endswith("</html>"),
        "left_over": sorted(path.name for path in out.rglob(".*.tmp"))
        + sorted(path.name for path in out.rglob(".*.old")),
    }


def one_round(
    case: Case, whole: dict[str, Any], seconds: float, target: str, generator: random.Random, out: Path
) -> dict[str, Any]:
    """Start, kill, resume, compare."""
    if target == ANYWHERE:
        child = case.start(out)
        time.sleep(generator.uniform(0, seconds))
    else:
        entries, each = case.usual[target]
        child = case.start(out, target, generator.randint(1, entries))
        case.moments.wait(10 * seconds + 60)
        time.sleep(generator.uniform(0, each))
    os.kill(child, signal.SIGKILL)
    status = end_of(child)
    killed_in = case.moments.phase()
    before = lines_of(out, "trial_finished")
    resumed = end_of(case.start(out))
    if resumed:
        return {"target": target, "killed": status == -9, "in": killed_in, "resumed": resumed, "log": case.log()[-300:]}
    after, ended = lines_of(out, "trial_finished"), outcome(out)
    again = started_again(out, before)
    return {
        "target": target,
        "killed": status == -9,
        "in": killed_in,
        "finished_before": len(before),
        "torn_line": (out / "journal.jsonl.torn-1").exists(),
        "resumed": resumed,
        "same_decision": ended["decision"] == whole["decision"],
        "same_trials": ended["trials"] == whole["trials"],
        "same_adapter": ended["adapter"] == whole["adapter"],
        "lost": sum(after.get(trial) != line for trial, line in before.items()),
        "trained_twice": len(again) + sum(count - 1 for count in ended["finished"].values()),
        "tidy": ended["report"] and not ended["left_over"],
    }


def started_again(out: Path, before: dict[str, bytes]) -> set[str]:
    """Trials that had finished and were begun once more."""
    seen: set[str] = set()
    again: set[str] = set()
    for line in (out / "journal.jsonl").read_bytes().splitlines():
        record = json.loads(line)
        if record["type"] == "trial_finished" and record["trial_id"] in before:
            seen.add(record["trial_id"])
        if record["type"] == "trial_started" and record["trial_id"] in seen:
            again.add(record["trial_id"])
    return again


def is_right(entry: dict[str, Any]) -> bool:
    return bool(
        entry["resumed"] == 0
        and entry["same_decision"]
        and entry["same_trials"]
        and entry["same_adapter"]
        and entry["tidy"]
        and not entry["lost"]
        and not entry["trained_twice"]
    )


def measure(kills: int, seed: int, root: Path, minutes: float = 60.0) -> dict[str, Any]:
    """All rounds and their sums; as many rounds as fit where `minutes` are over before."""
    generator = random.Random(seed)
    case = Case(root)
    begun = time.monotonic()
    if end_of(case.start(root / "whole")) != 0:
        raise SystemExit(f"the undisturbed run failed: {case.log()}")
    seconds = time.monotonic() - begun
    case.usual = case.moments.usual()
    whole = outcome(root / "whole")
    targets = [ANYWHERE, *PHASES]
    rounds: list[dict[str, Any]] = []
    while sum(entry["killed"] for entry in rounds) < kills and time.monotonic() - begun < 60 * minutes:
        target = targets[len(rounds) % len(targets)]
        out = root / "run"
        rounds.append(one_round(case, whole, seconds, target, generator, out))
        print(len(rounds), rounds[-1], file=sys.stderr, flush=True)
        shutil.rmtree(out)
    killed = [entry for entry in rounds if entry["killed"]]
    return {
        "machine": machine(),
        "seed": seed,
        "undisturbed_seconds": round(seconds, 2),
        "undisturbed_phases": {name: entries for name, (entries, _) in case.usual.items()},
        "kills": len(killed),
        "killed_in": dict(Counter(entry["in"] for entry in killed)),
        "ended_right": sum(is_right(entry) for entry in killed),
        "right_by_phase": dict(Counter(entry["in"] for entry in killed if is_right(entry))),
        "trials_lost": sum(entry.get("lost", 0) for entry in killed),
        "trials_trained_twice": sum(entry.get("trained_twice", 0) for entry in killed),
        "torn_lines": sum(entry.get("torn_line", False) for entry in killed),
        "too_late": len(rounds) - len(killed),
        "not_right": [entry for entry in killed if not is_right(entry)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(options.kills, options.seed, Path(folder), options.minutes), indent=1))


if __name__ == "__main__":
    main()
