"""Time and memory against size: `python -m benchmarks.load.measure`; writes `measured.json`.

    python -m benchmarks.load.measure --only rows --sizes 20000,200000    # some of it, joined to what is stored

Each case is a process of its own. Seconds are of the processor, so that other work on the machine counts for little; memory is the process's peak.

status, report   a journal of made-up trials, 8 ranks × 5 learning rates × seeds, and what the command takes and writes
ended            `status` of a run that has its answer
trainings        `select_rank_with` over a function that returns at once, with every other part as it is
arms             one pass of a tiny model with this many arms, 8 steps each
rows             `select` with two trainings of 4 steps on a file of rows: reading, splitting, encoding
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.report.runs import made_up_run
from tests.tiny import save_tiny_llama, write_completions

from benchmarks.machine import machine
from rightrank.decision.records import decide_run
from rightrank.runs.journal import seal
from rightrank.schema.events import DecisionRecorded

HERE = Path(__file__).parent
SIZES: Mapping[str, tuple[int, ...]] = {
    "status": (40, 400, 2_000, 10_000),
    "ended": (40, 400, 2_000, 10_000),
    "report": (40, 400, 2_000, 10_000),
    "trainings": (20, 100, 500),
    "arms": (2, 20, 200),
    "rows": (50_000, 500_000, 5_000_000),
}
TIMES = 7
RANKS, RATES = (1, 2, 4, 8, 16, 32, 64, 128), tuple(1e-4 * 1.3**n for n in range(5))


def journal(folder: Path, trials: int, *, decided: bool = False) -> Path:
    """A run folder with a journal of about this many trials, and no other file."""
    records = made_up_run(RANKS, RATES, range(trials // (len(RANKS) * len(RATES))))
    answer = [DecisionRecorded(decision=decide_run(records), adapter_trial_id=None)] if decided else []
    with (folder / "journal.jsonl").open("wb") as file:
        for record in (records.started, *records.outcomes, *records.tests, *answer):
            file.write(seal(record.model_dump_json().encode()) + b"\n")
    return folder


def time_of_status(folder: Path, size: int) -> dict[str, Any]:
    made = journal(folder, size)
    return _command("status", made) | {"journal_kib": (made / "journal.jsonl").stat().st_size >> 10}


def time_of_status_at_the_end(folder: Path, size: int) -> dict[str, Any]:
    return _command("status", journal(folder, size, decided=True))


def time_of_report(folder: Path, size: int) -> dict[str, Any]:
    made = journal(folder, size)
    return _command("report", made) | {"report_kib": (made / "report.html").stat().st_size >> 10}


def _command(name: str, run: Path) -> dict[str, Any]:
    """What a command takes with its start: seconds of the processor, the least of `TIMES`, since other work adds to them, and memory.

    Its modules are compiled before, as those of an installed package are.
    """
    compiled = {"PYTHONPYCACHEPREFIX": str(run / "compiled"), "PYTHONDONTWRITEBYTECODE": ""}
    spent = [0.0]
    for _ in range(TIMES):  # the first one compiles
        command = [sys.executable, "-m", "rightrank", name, str(run), "--json"]
        subprocess.run(command, stdout=subprocess.DEVNULL, env=os.environ | compiled, check=True)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(used.ru_utime + used.ru_stime)
    seconds = [after - before for before, after in pairwise(spent)]
    return {"seconds": round(min(seconds), 2), "mib": used.ru_maxrss >> 10}


def trainings(folder: Path, size: int) -> dict[str, Any]:
    from rightrank import select_rank_with

    rates = [1e-4 * 1.01**n for n in range(size // 4)]
    given: dict[str, Any] = {"ranks": (1, 2, 4, 8), "learning_rates": rates, "strategy": "grid", "metric": "loss"}
    found = _timed(lambda: select_rank_with(_at_once, folder / "run", **given))
    return found | {"ms_a_training": round(1000 * found["seconds"] / size, 1)}


def _at_once(task: Any) -> dict[str, float]:
    return {"loss": 2 + 1 / float(task.rank) + abs(float(task.learning_rate) - 1e-3)}


def arms(folder: Path, size: int) -> dict[str, Any]:
    from rightrank import select_rank

    data = folder / "data.jsonl"
    write_completions(data, 300)
    rates = [1e-3 * 1.01**n for n in range(size // 2)]
    given: dict[str, Any] = {"ranks": (1, 2), "learning_rates": rates, "strategy": "grid", "adapters_per_pass": size}
    given |= {"max_steps": 8, "batch_size": 4, "seq_len": 32, "eval_items": 12, "device": "cpu"}
    given |= {"eval_points": 1, "test_fraction": 0}
    model = str(save_tiny_llama(folder / "model"))
    found = _timed(lambda: select_rank(model, data, folder / "run", **given))
    return found | {"ms_an_arm": round(1000 * found["seconds"] / size, 1)}


def rows(folder: Path, size: int) -> dict[str, Any]:
    from rightrank import select_rank

    data = folder / "data.jsonl"
    with data.open("w", encoding="utf-8") as file:
        for n in range(size):
            file.write(f'{{"prompt": "what is {n} and {n % 97}", "completion": "it is {n * 7 % 1009}"}}\n')
    given: dict[str, Any] = {"ranks": (1, 2), "learning_rates": (1e-2,), "strategy": "grid", "max_steps": 4}
    given |= {"batch_size": 4, "seq_len": 32, "eval_items": 12, "eval_points": 1, "device": "cpu"}
    model = str(save_tiny_llama(folder / "model"))
    found = _timed(lambda: select_rank(model, data, folder / "run", **given))
    return found | {"data_mib": data.stat().st_size >> 20, "us_a_row": round(1e6 * found["seconds"] / size, 1)}


def _timed(act: Callable[[], object]) -> dict[str, Any]:
    """Seconds of the processor, and the process's peak of memory, before the act and in it."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    act()
    after = resource.getrusage(resource.RUSAGE_SELF)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": round(seconds, 2), "mib": after.ru_maxrss >> 10, "mib_before": before.ru_maxrss >> 10}


CASES: Mapping[str, Callable[[Path, int], dict[str, Any]]] = {
    "status": time_of_status, "ended": time_of_status_at_the_end, "report": time_of_report, "trainings": trainings, "arms": arms, "rows": rows,
}  # fmt: skip


def measured(case: str, size: int) -> dict[str, Any]:
    """One case in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.load.measure", "--only", case, "--one", str(size)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"size": size, "failed": done.stderr.strip().splitlines()[-1][:200]}
    return {"size": size, **json.loads(done.stdout.splitlines()[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CASES)
    parser.add_argument("--sizes", help="with commas between; those of the table by default")
    parser.add_argument("--one", type=int, help="measure one size in this process and print it")
    options = parser.parse_args()
    if options.one:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(CASES[options.only](Path(folder), options.one)))
        return
    store = HERE / "measured.json"
    stored = json.loads(store.read_text(encoding="utf-8")) if store.exists() else {}
    for case in [options.only] if options.only else CASES:
        sizes = [int(size) for size in options.sizes.split(",")] if options.sizes else SIZES[case]
        for size in sizes:
            stored.setdefault(case, {})[str(size)] = found = measured(case, size)
            print(case, json.dumps(found), flush=True)
            store.write_text(json.dumps({**stored, "machine": machine()}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
