"""Kill a small selection with `kill -9` at random moments, resume it, and compare the result.

A run is started in its own process and killed with SIGKILL, up to five times. It is then resumed to its end and
compared with an undisturbed run. The moments alternate: any time of the run; or a random time within a random step,
evaluation, append to the journal, checkpoint, or writing of reports, adapters and figures. Processes are forked from
one that has loaded torch and drawn a report, so that a run takes seconds. The test does not cover power cuts, which
also lose the cache of a disk.
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

from tests.runs.phases import PHASES, PhaseRecorder, watch_phases
from tests.tiny import save_tiny_llama, write_completions

ARGUMENTS = [
    "--strategy", "grid", "--ranks", "1,4", "--learning-rates", "1e-2", "--max-steps", "24", "--batch-size", "4",
    "--seq-len", "32", "--max-eval-examples", "12", "--set", "checkpoint_seconds=0.05",
    "--set", "num_evaluations=2", "--device", "cpu",
    "--quiet",
]  # fmt: skip
ANYWHERE = "anywhere"
KILLS_A_RUN = 5


class Case:
    """A model, a data file, and runs of one selection on them."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._model, self._data = save_tiny_llama(root / "model"), write_completions(root / "data.jsonl")
        self.recorder = PhaseRecorder()
        self.usual: dict[str, tuple[int, float]] = {}  # entries and mean seconds by phase, in the undisturbed run

    def warm_up(self, out: Path) -> None:
        """Run once in this process, so that fonts, templates and modules are loaded for every fork."""
        from rightrank.api.selecting import select_rank
        from rightrank.schema.settings import SelectSettings

        settings = SelectSettings(ranks=[1, 2], learning_rates=[1e-2], max_steps=2, seq_len=32, device="cpu")
        select_rank(str(self._model), self._data, out, settings=settings)

    def start(self, out: Path, phase: str | None = None, entry: int = 0) -> int:
        """Start the run and return its process id; `recorder.wait()` then returns at that entry into that phase."""
        self.recorder.request(phase, entry)
        child = os.fork()
        if child == 0:
            self._run(out)
        return child

    def _run(self, out: Path) -> None:
        """Run the command in the child process, and never return to the parent's code."""
        from rightrank.cli import main

        log = os.open(self._root / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        status = 70
        try:
            watch_phases(self.recorder)
            main(["select", str(self._model), str(self._data), "--out", str(out), *ARGUMENTS])
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 70
        finally:
            os._exit(status)

    def log(self) -> str:
        return (self._root / "log").read_text()


def wait_for_end(child: int) -> int:
    """Return the exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def read_lines(out: Path, kind: str) -> dict[str, bytes]:
    """Return the complete journal lines of a kind by trial."""
    journal = out / "journal.jsonl"
    content = journal.read_bytes() if journal.exists() else b""
    lines: dict[str, bytes] = {}
    for line in content[: content.rfind(b"\n") + 1].splitlines():
        record = json.loads(line)
        if record["type"] == kind:
            lines[record["trial_id"]] = line
    return lines


def read_outcome(out: Path) -> dict[str, Any]:
    """Return everything that must not depend on a kill."""
    journal = [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]
    finished = [line for line in journal if line["type"] == "trial_finished"]
    names = ("trial_id", "value", "example_losses", "train_losses", "points")
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


def kill_once(case: Case, seconds: float, target: str, generator: random.Random, out: Path) -> dict[str, Any]:
    """Start or resume the run and kill it, unless it ended before."""
    earlier = read_lines(out, "trial_finished")
    if target == ANYWHERE:
        child = case.start(out)
        time.sleep(generator.uniform(0, seconds / 2))
    else:
        entries, each = case.usual[target]
        child = case.start(out, target, generator.randint(1, max(2, entries // 3)))
        case.recorder.wait(child, 10 * seconds + 60)
        time.sleep(generator.uniform(0, each))
    os.kill(child, signal.SIGKILL)
    status = wait_for_end(child)
    killed_in, later = case.recorder.get_phase(), read_lines(out, "trial_finished")
    return {
        "target": target,
        "status": status,
        "killed": status == -signal.SIGKILL,
        "in": killed_in,
        "finished_before": len(later),
        "lost": sum(later.get(trial) != line for trial, line in earlier.items()),
        "torn_lines": len(list(out.glob("journal.jsonl.torn-*"))),
    }


def run_until_done(
    case: Case, reference: dict[str, Any], seconds: float, targets: list[str], generator: random.Random, out: Path
) -> dict[str, Any]:
    """Kill the run at each target, resume it to the end, and compare it."""
    kills: list[dict[str, Any]] = []
    for target in targets:
        kills.append(kill_once(case, seconds, target, generator, out))
        if not kills[-1]["killed"]:
            break
    lines_before = read_lines(out, "trial_finished")
    resumed = wait_for_end(case.start(out))
    run = {"kills": [kill for kill in kills if kill["killed"]], "resumed": resumed}
    if resumed:
        return run | {"log": case.log()[-400:]}
    ended, lines_after = read_outcome(out), read_lines(out, "trial_finished")
    lost = sum(kill["lost"] for kill in kills) + sum(
        lines_after.get(trial) != line for trial, line in lines_before.items()
    )
    return run | {
        "same_decision": ended["decision"] == reference["decision"],
        "same_trials": ended["trials"] == reference["trials"],
        "same_adapter": ended["adapter"] == reference["adapter"],
        "lost": lost,
        "trained_twice": len(count_restarts(out)) + sum(count - 1 for count in ended["finished"].values()),
        "tidy": ended["report"] and not ended["left_over"],
        "torn_lines": len(list(out.glob("journal.jsonl.torn-*"))),
    }


def count_restarts(out: Path) -> set[str]:
    """Return the trials that had finished and were started again."""
    finished: set[str] = set()
    again: set[str] = set()
    for line in (out / "journal.jsonl").read_bytes().splitlines():
        record = json.loads(line)
        if record["type"] == "trial_finished":
            finished.add(record["trial_id"])
        if record["type"] == "trial_started" and record["trial_id"] in finished:
            again.add(record["trial_id"])
    return again


def is_correct(entry: dict[str, Any]) -> bool:
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
    if wait_for_end(case.start(root / "whole")) != 0:
        raise SystemExit(f"the undisturbed run failed: {case.log()}")
    seconds = time.monotonic() - begun
    case.usual = case.recorder.measure_phases()
    reference = read_outcome(root / "whole")
    turns = itertools.cycle([ANYWHERE, *PHASES])
    runs: list[dict[str, Any]] = []
    while (kills_left := kills - sum(len(run["kills"]) for run in runs)) > 0:
        targets = [next(turns) for _ in range(min(kills_left, KILLS_A_RUN))]
        runs.append(run_until_done(case, reference, seconds, targets, generator, root / "run"))
        shutil.rmtree(root / "run")
    return summarize(seed, seconds, case, runs)


def summarize(seed: int, seconds: float, case: Case, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the result to store."""
    right = [run for run in runs if is_correct(run)]
    return {
        "seed": seed,
        "undisturbed_seconds": round(seconds, 2),
        "undisturbed_entries": {name: entries for name, (entries, _) in case.usual.items()},
        "runs": len(runs),
        "runs_ended_right": len(right),
        "kills": sum(len(run["kills"]) for run in runs),
        "kills_in_runs_that_ended_right": sum(len(run["kills"]) for run in right),
        "kills_by_phase": count_phases(runs),
        "ended_right_by_phase": count_phases(right),
        "trials_lost": sum(run.get("lost", 0) for run in runs),
        "trials_trained_twice": sum(run.get("trained_twice", 0) for run in runs),
        "torn_lines": sum(run.get("torn_lines", 0) for run in runs),
        "not_right": [run for run in runs if not is_correct(run)],
    }


def count_phases(runs: list[dict[str, Any]]) -> dict[str, int]:
    """Count in which phase the process was killed."""
    return dict(sorted(Counter(kill["in"] for run in runs for kill in run["kills"]).items()))
