"""A local MLflow file store: mlruns/EXPERIMENT/RUN with params, metrics and tags as small files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rightrank.errors import ResultsError
from rightrank.io.importers.example_series import split_examples
from rightrank.io.reading import UnreadableError, read_text
from rightrank.io.rows import Row

MAX_DEPTH = 3


def recognizes(source: Path) -> bool:
    return source.is_dir() and bool(_run_folders(source))


def rows(source: Path) -> list[Row]:
    """One row for each step at which a run logged metrics, and for each item that it scored alone.

    Raises:
        ResultsError: no run has a metric, or a metric's file has a line that can't be read.
    """
    found: list[Row] = []
    for run in _run_folders(source):
        parameters = {path.name: _text(path) for path in sorted((run / "params").iterdir()) if path.is_file()}
        steps, items = split_examples(_by_step(run / "metrics"))
        for step, metrics in steps.items():
            fields = {"params": parameters, "metrics": metrics, "step": step, "trial": run.name}
            found.append(Row(fields, f"{run}: step {step}"))
        for item in items:
            fields = {"params": parameters, "metrics": item.values, "trial": run.name, **item.place}
            found.append(Row(fields, f"{run}: item {item.number}"))
    if not found:
        raise ResultsError(f"{source}: no run of the store has a metric; log one, such as eval_loss")
    return found


def _run_folders(source: Path) -> list[Path]:
    patterns = ("/".join(["*"] * depth + ["meta.yaml"]) for depth in range(MAX_DEPTH))
    folders = (path.parent for pattern in patterns for path in source.glob(pattern))
    return sorted(folder for folder in folders if (folder / "params").is_dir() and (folder / "metrics").is_dir())


def _by_step(folder: Path) -> dict[int, dict[str, Any]]:
    """Step → metric → value. A file's lines are `timestamp value step`; a metric's name may hold slashes."""
    steps: dict[int, dict[str, Any]] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        for number, line in enumerate(_text(path).splitlines(), start=1):
            parts = line.split()
            if len(parts) < 3 or not re.fullmatch(r"\d{1,18}", parts[2], re.ASCII):
                raise ResultsError(f"{path}:{number}: got {line!r}; MLflow writes `timestamp value step`")
            steps.setdefault(int(parts[2]), {})[name] = parts[1]
    return steps


def _text(path: Path) -> str:
    try:
        return read_text(path)
    except UnreadableError as error:
        raise ResultsError(f"{path}: can't read it ({error}); restore the file, or leave its run out") from None
