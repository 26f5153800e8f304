"""Run all tests and the programs that read our files, store the results with versions and date, and show them on a page.

    python -m benchmarks.release [NAME …]    # all checks, or those that are named; `make release-check` runs all

A check that needs what is not here (an environment with vLLM or mlx-lm, a checkout of sd-scripts) keeps its last result.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from string import Template

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[1]
RESULTS, PAGE, MARKS = HERE / "release.json", ROOT / "docs" / "reference" / "architectures.md", "<!-- release -->"
PYTEST = "$PYTHON -m pytest -q -p no:cacheprovider"
CHECKS = {  # packages whose versions are stored, and the command; $NAME is a variable of the environment
    "all tests": (
        "torch transformers peft datasets trl lightning",
        f"{PYTEST} -n 2 --dist loadfile --no-loadscope-reorder tests",
    ),
    "architectures": (
        "torch transformers peft",
        f"{PYTEST} tests/training/test_architectures.py tests/training/test_targets.py",
    ),
    "kinds of adapters": (
        "torch transformers peft",
        f"{PYTEST} tests/adapters/test_conformance.py tests/adapters/test_round_trips.py",
    ),
    "sentence-transformers": (
        "sentence-transformers transformers",
        f"{PYTEST} tests/trainers/test_sentence_transformers.py",
    ),
    "files of mlx-lm and of trainers": (
        "transformers",
        f"{PYTEST} tests/adapters/test_mlx.py tests/adapters/test_single_files.py",
    ),
    "mlx-lm loads what `resize` writes": ("mlx-lm mlx", "$MLX_PYTHON -m benchmarks.consumers.mlx $PYTHON"),
    "lowest versions": (
        "click datasets huggingface_hub numpy pandas peft pyarrow pydantic safetensors torch transformers",
        "make lowest",
    ),
    "vLLM reads an export": ("vllm", "$VLLM_PYTHON benchmarks/consumers/check.py vllm $EXPORT"),
    "sd-scripts resizes alike": ("torch", "$PYTHON -m benchmarks.consumers.sd_scripts $SD_SCRIPTS $SD_SCRIPTS_COMMIT"),
}


LOWEST_PYTHON = ROOT / ".venv" / "lowest" / "bin" / "python"
LIST_VERSIONS = """
import sys
from importlib.metadata import distributions
versions = {found.name.replace("-", "_").lower(): found.version for found in distributions()}
print(*(f"{name} {versions[key]}" for name in sys.argv[1:] if (key := name.replace("-", "_").lower()) in versions), sep=", ")
"""


def find_versions(packages: str, python: Path) -> str:
    command = [str(python), "-c", LIST_VERSIONS, *packages.split()]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def run_check(name: str) -> dict[str, str] | None:
    """Run a check, and return its row; None if it needs a variable that is not set."""
    packages, command = CHECKS[name]
    try:
        words = Template(command).substitute(os.environ | {"PYTHON": sys.executable}).split()
    except KeyError as error:
        print(f"{name}: needs ${error.args[0]}; the last result stays")
        return None
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    ended = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    last = next((line for line in reversed((ended.stderr + ended.stdout).splitlines()) if line.strip()), "")
    print(f"{name}: {'passed' if ended.returncode == 0 else 'FAILED'}: {last}", flush=True)
    is_make = command.startswith("make ")
    python = LOWEST_PYTHON if is_make else Path(words[0])
    result = ("passed" if ended.returncode == 0 else "failed") + ("" if is_make else f": {last}")
    return {"result": result, "versions": find_versions(packages, python), "date": time.strftime("%Y-%m-%d")}


def format_table(results: dict[str, dict[str, str]]) -> str:
    lines = ["| check | result | versions | date |", "|---|---|---|---|"]
    lines += [f"| {name} | {row['result']} | {row['versions']} | {row['date']} |" for name, row in results.items()]
    return "\n".join(lines)


def main(names: list[str]) -> int:
    results: dict[str, dict[str, str]] = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows = {name: row for name in names or CHECKS if (row := run_check(name)) is not None}
    results |= rows
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    above, _, below = PAGE.read_text(encoding="utf-8").split(MARKS)
    PAGE.write_text(f"{above}{MARKS}\n\n{format_table(results)}\n\n{MARKS}{below}", encoding="utf-8")
    return int(any(not row["result"].startswith("passed") for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
