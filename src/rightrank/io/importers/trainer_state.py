"""Output folders of transformers' `Trainer`: trainer_state.json with an adapter_config.json nearby."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rightrank.errors import ResultsError
from rightrank.io.importers.path_settings import read_object, settings_from_path
from rightrank.io.rows import Row

FILE = "trainer_state.json"
MAX_DEPTH = 4


def recognizes(source: Path) -> bool:
    return source.is_dir() and bool(_states(source))


def rows(source: Path) -> list[Row]:
    """One row for each evaluation of each training.

    Raises:
        ResultsError: no evaluations, or a state that is not JSON.
    """
    found: list[Row] = []
    for path in _last_states(_states(source)):
        found.extend(_rows_of(path, source))
    if not found:
        raise ResultsError(f"{source}: the {FILE} files hold no evaluation (eval_loss); train with eval_strategy set")
    return found


def _states(source: Path) -> list[Path]:
    patterns = ("/".join(["*"] * depth + [FILE]) for depth in range(MAX_DEPTH))
    return sorted(path for pattern in patterns for path in source.glob(pattern))


def _last_states(paths: list[Path]) -> list[Path]:
    """The last checkpoint of each training, which holds the whole history."""
    last: dict[Path, tuple[int, Path]] = {}
    for path in paths:
        training = path.parent.parent if path.parent.name.startswith("checkpoint-") else path.parent
        step = read_object(path).get("global_step")
        place = (step if isinstance(step, int) else 0, path)
        last[training] = max(last.get(training, place), place)
    return [path for _, path in last.values()]


def _rows_of(path: Path, source: Path) -> list[Row]:
    state = read_object(path)
    history = _history(state)
    settings = settings_from_path(path.parent, source)
    rates = [entry["learning_rate"] for entry in history if isinstance(entry.get("learning_rate"), int | float)]
    if rates and "lr" not in settings:
        settings["lr"] = max(rates)  # the highest that was logged
    losses = {entry["step"]: entry["loss"] for entry in history if "loss" in entry}
    training = path.parent.parent if path.parent.name.startswith("checkpoint-") else path.parent
    found: list[Row] = []
    for entry in history:
        held_out: dict[str, Any] = {name: value for name, value in entry.items() if name.startswith("eval_")}
        if held_out:
            before = [loss for step, loss in losses.items() if step <= entry["step"]]
            trained = {"train_loss": before[-1]} if before else {}
            fields = {**settings, **trained, "trial": training.name, "step": entry["step"], **held_out}
            found.append(Row(fields, f"{path}: step {entry['step']}"))
    return found


def _history(state: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of the log that have a step."""
    log = state.get("log_history")
    entries = [entry for entry in log if isinstance(entry, dict)] if isinstance(log, list) else []
    return [entry for entry in entries if isinstance(entry.get("step"), int)]
