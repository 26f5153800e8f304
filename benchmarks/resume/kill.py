"""`kill -9` at random moments of a small selection, resumed: does it end the same, and is anything trained twice?

    python -m benchmarks.resume.kill --kills 10 --seed 0

Each round starts a selection, kills it with SIGKILL after a random share of its usual duration, resumes it to its
end, and compares decision and values with an undisturbed run. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.tiny import save_tiny_llama, write_completions

from benchmarks.machine import machine

ARGUMENTS = [
    "--ranks", "1,2,4", "--learning-rates", "3e-3,1e-2", "--max-steps", "60", "--batch-size", "4", "--seq-len", "32",
    "--eval-items", "12", "--set", "checkpoint_seconds=0.1", "--set", "samples=0", "--device", "cpu", "--quiet",
]  # fmt: skip


def start(model: Path, data: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "rightrank", "select", str(model), str(data), "--out", str(out), *ARGUMENTS]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)


def summary(out: Path) -> dict[str, Any]:
    """Decision, values by trial, and how often each trial finished."""
    lines = [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]
    finished = [line for line in lines if line["type"] == "trial_finished"]
    decision = json.loads((out / "decision.json").read_text())
    for run in decision["next_runs"]:
        run.pop("seconds")  # from measured times, which no two runs share
    return {
        "decision": decision,
        "values": {line["trial_id"]: line["value"] for line in finished},
        "twice": len(finished) - len({line["trial_id"] for line in finished}),
    }


def finished_count(out: Path) -> int:
    journal = out / "journal.jsonl"
    return journal.read_text().count('"trial_finished"') if journal.exists() else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model, data = save_tiny_llama(root / "model"), write_completions(root / "data.jsonl")
        begun = time.monotonic()
        if start(model, data, root / "whole").wait() != 0:
            raise SystemExit("the undisturbed run failed")
        duration = time.monotonic() - begun
        whole = summary(root / "whole")
        rounds: list[dict[str, Any]] = []
        for number in range(options.kills):
            out = root / f"run{number}"
            process = start(model, data, out)
            after = generator.uniform(0.2, 1.0) * duration
            time.sleep(after)
            killed = process.poll() is None
            process.kill()
            process.wait()
            before = finished_count(out)
            status = start(model, data, out).wait()
            ended = summary(out)
            rounds.append(
                {
                    "killed_after_seconds": round(after, 2),
                    "killed": killed,
                    "finished_before": before,
                    "status": status,
                    "same_decision": ended["decision"] == whole["decision"],
                    "same_values": ended["values"] == whole["values"],
                    "trained_twice": ended["twice"],
                }
            )
    result = {
        "machine": machine(),
        "seed": options.seed,
        "kills": sum(entry["killed"] for entry in rounds),
        "ended_the_same": sum(entry["same_decision"] and entry["same_values"] for entry in rounds),
        "trials_trained_twice": sum(entry["trained_twice"] for entry in rounds),
        "rounds": rounds,
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
