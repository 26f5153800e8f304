"""`kill -9` at random moments of a small selection, resumed: does it end the same, is anything lost or trained twice?

A run is started in a process of its own and killed with SIGKILL; it is resumed and killed again, up to five times,
then resumed to its end and compared with an undisturbed run. The moments take turns: anywhere in the run's time; and
inside a step, an evaluation, an append to the journal, a checkpoint, or the writing of reports, adapters and figures,
each at a random one of them and a random while after it began. Processes are forked from one that has torch loaded
and has drawn a report: a run then takes seconds, all its own. What a power cut does to a
disk's own cache, no kill can show.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.runs.moments import PHASES, Moments, watch_phases
from tests.tiny import save_tiny_llama, write_completions

ARGUMENTS = [
    "--strategy", "grid", "--ranks", "1,4", "--learning-rates", "1e-2", "--max-steps", "24", "--batch-size", "4",
    "--seq-len", "32", "--eval-items", "12", "--set", "checkpoint_seconds=0.05",
    "--set", "eval_points=2", "--device", "cpu",
    "--quiet",
]  # fmt: skip
ANYWHERE = "anywhere"
KILLS_A_RUN = 5


class Case:
    """One model, one data file, and runs of one selection over them."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._model, self._data = save_tiny_llama(root / "model"), write_completions(root / "data.jsonl")
        self.moments = Moments()
        self.usual: dict[str, tuple[int, float]] = {}  # of the undisturbed run: entries and mean seconds by phase

    def warm_up(self, out: Path) -> None:
        """One whole run in this process: fonts, templates and modules are then there for every fork."""
        from rightrank.api.selecting import select_rank
        from rightrank.schema.settings import SelectSettings

        settings = SelectSettings(ranks=[1, 2], learning_rates=[1e-2], max_steps=2, seq_len=32, device="cpu")
        select_rank(str(self._model), self._data, out, settings=settings)

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
        "left_over": sorted(path.name for path in out.rglob(".*.rightrank-tmp"))
        + sorted(path.name for path in out.rglob(".*.rightrank-old")),
    }


def one_kill(case: Case, seconds: float, target: str, generator: random.Random, out: Path) -> dict[str, Any]:
    """Start or resume, and kill; the run may have ended before."""
    earlier = lines_of(out, "trial_finished")
    if target == ANYWHERE:
        child = case.start(out)
        time.sleep(generator.uniform(0, seconds / 2))
    else:
        entries, each = case.usual[target]
        child = case.start(out, target, generator.randint(1, max(2, entries // 3)))
        case.moments.wait(child, 10 * seconds + 60)
        time.sleep(generator.uniform(0, each))
    os.kill(child, signal.SIGKILL)
    status = end_of(child)
    killed_in, later = case.moments.phase(), lines_of(out, "trial_finished")
    return {
        "target": target,
        "status": status,
        "killed": status == -signal.SIGKILL,
        "in": killed_in,
        "finished_before": len(later),
        "lost": sum(later.get(trial) != line for trial, line in earlier.items()),
        "torn_lines": len(list(out.glob("journal.jsonl.torn-*"))),
    }


def one_run(
    case: Case, whole: dict[str, Any], seconds: float, targets: list[str], generator: random.Random, out: Path
) -> dict[str, Any]:
    """Kill at each target, resume to the end, compare."""
    kills: list[dict[str, Any]] = []
    for target in targets:
        kills.append(one_kill(case, seconds, target, generator, out))
        if not kills[-1]["killed"]:
            break
    before = lines_of(out, "trial_finished")
    resumed = end_of(case.start(out))
    run = {"kills": [kill for kill in kills if kill["killed"]], "resumed": resumed}
    if resumed:
        return run | {"log": case.log()[-400:]}
    ended, after = outcome(out), lines_of(out, "trial_finished")
    lost = sum(kill["lost"] for kill in kills) + sum(after.get(trial) != line for trial, line in before.items())
    return run | {
        "same_decision": ended["decision"] == whole["decision"],
        "same_trials": ended["trials"] == whole["trials"],
        "same_adapter": ended["adapter"] == whole["adapter"],
        "lost": lost,
        "trained_twice": len(started_again(out)) + sum(count - 1 for count in ended["finished"].values()),
        "tidy": ended["report"] and not ended["left_over"],
        "torn_lines": len(list(out.glob("journal.jsonl.torn-*"))),
    }


def started_again(out: Path) -> set[str]:
    """Trials that had finished and were begun once more."""
    finished: set[str] = set()
    again: set[str] = set()
    for line in (out / "journal.jsonl").read_bytes().splitlines():
        record = json.loads(line)
        if record["type"] == "trial_finished":
            finished.add(record["trial_id"])
        if record["type"] == "trial_started" and record["trial_id"] in finished:
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


def measure(kills: int, seed: int, root: Path) -> dict[str, Any]:
    """Return all runs and their sums."""
    generator = random.Random(seed)
    case = Case(root)
    case.warm_up(root / "warm")
    begun = time.monotonic()
    if end_of(case.start(root / "whole")) != 0:
        raise SystemExit(f"the undisturbed run failed: {case.log()}")
    seconds = time.monotonic() - begun
    case.usual = case.moments.usual()
    whole = outcome(root / "whole")
    turns = itertools.cycle([ANYWHERE, *PHASES])
    runs: list[dict[str, Any]] = []
    while (left := kills - sum(len(run["kills"]) for run in runs)) > 0:
        targets = [next(turns) for _ in range(min(left, KILLS_A_RUN))]
        runs.append(one_run(case, whole, seconds, targets, generator, root / "run"))
        shutil.rmtree(root / "run")
    return sums(seed, seconds, case, runs)


def sums(seed: int, seconds: float, case: Case, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What is stored."""
    right = [run for run in runs if is_right(run)]
    return {
        "seed": seed,
        "undisturbed_seconds": round(seconds, 2),
        "undisturbed_entries": {name: entries for name, (entries, _) in case.usual.items()},
        "runs": len(runs),
        "runs_ended_right": len(right),
        "kills": sum(len(run["kills"]) for run in runs),
        "kills_in_runs_that_ended_right": sum(len(run["kills"]) for run in right),
        "kills_by_phase": phases_of(runs),
        "ended_right_by_phase": phases_of(right),
        "trials_lost": sum(run.get("lost", 0) for run in runs),
        "trials_trained_twice": sum(run.get("trained_twice", 0) for run in runs),
        "torn_lines": sum(run.get("torn_lines", 0) for run in runs),
        "not_right": [run for run in runs if not is_right(run)],
    }


def phases_of(runs: list[dict[str, Any]]) -> dict[str, int]:
    """What the process was at when it was killed."""
    return dict(sorted(Counter(kill["in"] for run in runs for kill in run["kills"]).items()))
