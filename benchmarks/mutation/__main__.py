"""Measure whether the tests notice a change: draw changes of the code at random, run the tests that reach them, and count.

    pip install mutmut
    python -m benchmarks.mutation                             # every target at this commit; writes results.json
    python -m benchmarks.mutation decision --commit f1c95127  # one of them at another commit

`mutmut` makes the changes and runs the tests, in a copy of the commit. Changes of a text alone are not drawn, since tests should not pin sentences.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path

from benchmarks.machine import describe_machine

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
RESULTS = HERE / "results.json"
MUTMUT = [sys.executable, "-m", "mutmut"]
UNNOTICED = {0, 33}  # the exit status of `mutmut` where the tests pass, and where no test reaches the change


@dataclass(frozen=True)
class Target:
    """Code to change and tests that should notice: patterns below `src/rightrank` and `tests`, the number of changes, and a marker of tests."""

    files: tuple[str, ...]
    tests: tuple[str, ...]
    changes: int = 60
    marker: str = "not trains"


ADAPTER_TESTS = ("dense_updates", "truncation", "find_smallest", "rank_math", "inspect", "round_trips", "resize")
TARGETS = {
    "decision": Target(("decision/*.py",), ("decision",), 120),
    "search": Target(("search/*.py",), ("search",)),
    "tables": Target(("tables/*.py",), ("tables",)),
    "adapters": Target(
        tuple(f"adapters/{name}.py" for name in ("truncation", "find_smallest", "resize", "rank_math")),
        tuple(f"adapters/test_{name}.py" for name in ADAPTER_TESTS),
        marker="",
    ),
}
SETTINGS = """
[tool.mutmut]
source_paths = ["src/"]
only_mutate = {files}
pytest_add_cli_args = ["-p", "no:cacheprovider", "-p", "no:xdist", "-m", {marker}]
pytest_add_cli_args_test_selection = {tests}
also_copy = {others}
"""


def copy_commit(commit: str, folder: Path) -> None:
    """Write the files of a commit of this repository into `folder`."""
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)


def run_mutmut(folder: Path, names: list[str]) -> str:
    """Make all changes that are not made yet, and run the tests of the named ones."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)  # so that the copy is imported
    command = [*MUTMUT, "run", "--max-children", "1", *names]
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return (ended.stdout + ended.stderr)[-3000:]


def read_results(folder: Path) -> dict[str, int | None]:
    """Read the exit status of the tests under each change; None if it was not tried."""
    results: dict[str, int | None] = {}
    for file in sorted((folder / "mutants" / "src").rglob("*.meta")):
        results |= json.loads(file.read_text(encoding="utf-8"))["exit_code_by_key"]
    return results


def show_change(folder: Path, name: str) -> list[str]:
    """Return the lines that a change removes and adds."""
    shown = subprocess.run([*MUTMUT, "show", name], cwd=folder, capture_output=True, text=True, check=True).stdout
    return [line for line in shown.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]


def changes_text(lines: list[str]) -> bool:
    """Return whether a change concerns the words of a text alone: `mutmut` marks them with XX, or changes their case."""
    removed, added = ("".join(line[1:] for line in lines if line[0] == sign) for sign in "-+")
    return "XX" in added or removed.lower() == added.lower()


def measure_target(target: Target, commit: str, seed: int) -> dict[str, object]:
    """Draw changes, run the tests, and return the counts and the changes that no test noticed."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        copy_commit(commit, folder)
        settings: dict[str, object] = {
            "marker": target.marker,
            "files": [f"src/rightrank/{pattern}" for pattern in target.files],
            "tests": [f"tests/{pattern}" for pattern in target.tests],
            "others": [path.name for path in sorted(folder.iterdir()) if path.name not in ("src", "tests")],
        }
        with (folder / "pyproject.toml").open("a", encoding="utf-8") as file:
            file.write(SETTINGS.format_map({key: json.dumps(value) for key, value in settings.items()}))
        printed = run_mutmut(folder, ["no change has this name"])
        names = sorted(read_results(folder))
        if not names:
            raise SystemExit(printed)
        random.Random(seed).shuffle(names)
        drawn = list(islice((name for name in names if not changes_text(show_change(folder, name))), target.changes))
        printed = run_mutmut(folder, drawn)
        results = read_results(folder)
        if any(results[name] is None for name in drawn):
            raise SystemExit(f"the tests did not run under each change:\n{printed}")
        survivors = {name: show_change(folder, name) for name in drawn if results[name] in UNNOTICED}
    counts = {"possible": len(names), "drawn": len(drawn), "noticed": len(drawn) - len(survivors)}
    return {"commit": commit, "seed": seed, "tests": target.tests, **counts, "survivors": survivors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", choices=[[], *TARGETS], help="default: all")
    parser.add_argument("--commit", default="HEAD")
    parser.add_argument("--seed", type=int, default=83)
    parser.add_argument("--files", nargs="+", help="patterns of a commit that has other names than now")
    parser.add_argument("--tests", nargs="+")
    args = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "--short=8", args.commit], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    stored = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for name in args.targets or TARGETS:
        target = TARGETS[name]
        files, tests = tuple(args.files or target.files), tuple(args.tests or target.tests)
        row = measure_target(replace(target, files=files, tests=tests), commit, args.seed)
        print(f"{name} at {commit}, seed {args.seed}: {row['noticed']} of {row['drawn']} noticed", flush=True)
        stored |= {"machine": describe_machine(), "mutmut": version("mutmut"), f"{name} {commit} {args.seed}": row}
        RESULTS.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
