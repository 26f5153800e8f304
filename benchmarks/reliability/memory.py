"""A selection under a limit on the process's memory, drawn at random: what fits is trained, what does not is recorded.

    python -m benchmarks.reliability.memory --times 10 --out benchmarks/reliability/memory.json

The limit is the system's own (`RLIMIT_AS`), set after everything is loaded, so memory is truly refused: wherever it is asked
for then. The largest of the four ranks needs a quarter of a gigabyte. Right means: exit 0; what finished has the values of an unlimited run, to
the last bit; what did not is recorded as `out_of_memory`; and a later command without a limit adds nothing wrong. Where not even
the base can be evaluated, one line and exit 1 are right, and the run ends as the unlimited one once there is memory.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.tiny import write_completions

from benchmarks.machine import machine
from benchmarks.reliability.checkpoints import save_llama
from benchmarks.results import store

MIB = 2**20
LEAST_MIB, MOST_MIB = 10, 400  # beside what the process has once it is loaded
RANKS = (1, 4, 64, 1024)
LIMITED = """
import resource, sys
import rightrank.runs.prepare  # loaded before the limit
from rightrank.cli import main
size = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize:")) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + int(sys.argv[1]), resource.RLIM_INFINITY))
main(sys.argv[2:])
"""


def limited(arguments: Sequence[str], memory_bytes: int) -> subprocess.CompletedProcess[str]:
    """The command in a process that gets so much memory beside what it has when all is loaded."""
    command = [sys.executable, "-c", LIMITED, str(memory_bytes), *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=3600)


def selection_of(model: Path, data: Path, out: Path, ranks: Sequence[int]) -> list[str]:
    """The command's words."""
    return [
        "select", str(model), str(data), "--out", str(out), "--strategy", "grid", "--ranks", ",".join(map(str, ranks)),
        "--learning-rates", "1e-2", "--max-steps", "2", "--batch-size", "4", "--seq-len", "32", "--eval-items", "12",
        "--set", "eval_points=2", "--device", "cpu",
    ]  # fmt: skip


def ended(out: Path) -> dict[int, dict[str, Any]]:
    """The last outcome of each rank that has one."""
    path = out / "journal.jsonl"
    lines = [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []
    return {line["rank"]: line for line in lines if line["type"] in ("trial_finished", "trial_failed")}


def trial(arguments: list[str], out: Path, whole: dict[int, Any], mib: int) -> dict[str, Any]:
    """One limit: what came of it, and what is wrong with that."""
    done = limited(arguments, mib * MIB)
    first = ended(out)
    wrong = [] if done.returncode in (0, 1) else [f"exit {done.returncode}: {done.stderr[-400:]}"]
    if "Traceback" in done.stderr:
        wrong.append(done.stderr[-600:])
    if done.returncode == 0 and set(first) != set(whole):
        wrong.append(f"outcomes of {sorted(first)}")
    again = limited(arguments, 64 * 2**30) if done.returncode else done
    last = ended(out)
    if again.returncode or set(last) != set(whole):
        wrong.append(f"afterwards exit {again.returncode}, {sorted(last)}: {again.stderr[-400:]}")
    failed = [rank for rank, line in last.items() if line["type"] == "trial_failed"]
    wrong += [f"rank {rank}: {last[rank]['error']}" for rank in failed if last[rank]["error"] != "out_of_memory"]
    same = ("value", "item_losses", "train_losses")
    differing = [r for r in last if r not in failed and [last[r][n] for n in same] != [whole[r][n] for n in same]]
    wrong += [f"rank {rank} has other values" for rank in differing]
    return {"mib": mib, "exit": done.returncode, "out_of_memory": sorted(failed), "wrong": wrong}


def measure(times: int, seed: int, root: Path, told: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """`times` limits; `told` has the result so far after each."""
    model, data = save_llama(root / "model", width=1024, layers=1), write_completions(root / "data.jsonl")
    generator, out = random.Random(seed), root / "run"
    undisturbed = limited(selection_of(model, data, root / "whole", RANKS), 64 * 2**30)
    if undisturbed.returncode:
        raise SystemExit(f"the unlimited run failed: {undisturbed.stderr}")
    whole = ended(root / "whole")
    result: dict[str, Any] = {"machine": machine(), "seed": seed, "ranks": RANKS, "tried": 0, "right": 0, "trials": []}
    for _ in range(times):
        found = trial(selection_of(model, data, out, RANKS), out, whole, generator.randint(LEAST_MIB, MOST_MIB))
        shutil.rmtree(out)
        result["tried"] += 1
        result["right"] += not found["wrong"]
        result["trials"].append(found)
        told(result)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="written after each limit")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        print(
            json.dumps(
                measure(options.times, options.seed, Path(folder), lambda so_far: store(so_far, options.out)), indent=1
            )
        )


if __name__ == "__main__":
    main()
