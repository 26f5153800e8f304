"""Ray Tune's result folders: params.json beside result.json (one JSON object per report) or progress.csv."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rightrank.data.files import UnreadableError, parse_json, read_json_object, read_text
from rightrank.data.rows import Row, read_rows
from rightrank.schema.errors import DataError, ResultsError

# Parts of a folder's name such as r16, r=16, rank_16, lora-r-16; lr1e-4, lr=0.0003; seed3.
_NAMED = {
    "rank": re.compile(r"(?:^|[^a-z])(?:lora[-_=]?)?(?:rank|r)[-_=]?(\d+)(?![\d.])", re.IGNORECASE),
    "lr": re.compile(r"(?:^|[^a-z])(?:lr|learning[-_]?rate)[-_=]?(\d+(?:\.\d+)?(?:e-?\d+)?)", re.IGNORECASE),
    "seed": re.compile(r"(?:^|[^a-z])seed[-_=]?(\d+)", re.IGNORECASE),
}


def settings_from_path(folder: Path, root: Path) -> dict[str, Any]:
    """`rank`, `lr` and `seed` where known: from the nearest adapter_config.json up to `root`, then from names.

    Raises:
        ResultsError: an adapter_config.json that isn't JSON.
    """
    settings: dict[str, Any] = {}
    for place in _upward(folder, root):
        for name, pattern in _NAMED.items():
            found = pattern.search(place.name)
            if found and name not in settings:
                settings[name] = found.group(1)
    rank = _adapter_rank(folder, root)
    return settings if rank is None else settings | {"rank": rank}


def _adapter_rank(folder: Path, root: Path) -> int | None:
    """`r` of the adapter in the folder or in a folder inside it (a checkpoint), else of those above up to `root`.

    None if adapters in one place have different ranks.
    """
    for place in _upward(folder, root):
        paths = [place / "adapter_config.json", *sorted(place.glob("*/adapter_config.json"))]
        ranks = [read_object(path).get("r") for path in paths if path.is_file()]
        if ranks:
            return ranks[0] if isinstance(ranks[0], int) and ranks.count(ranks[0]) == len(ranks) else None
    return None


def _upward(folder: Path, root: Path) -> list[Path]:
    """The folder and its parents up to and including `root`."""
    places = [folder]
    while places[-1] != root and root in places[-1].parents:
        places.append(places[-1].parent)
    return places


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ResultsError: not a JSON object.
    """
    try:
        return read_json_object(path)
    except UnreadableError as error:
        raise ResultsError(f"{path}: not JSON ({error}); restore the file, or leave its folder out") from None


MAX_DEPTH = 3
MAX_BYTES = 2**28  # of one trial's reports
# Fields that Ray adds to every report.
_HOUSEKEEPING = {"pid", "hostname", "node_ip", "date", "timestamp", "trial_id", "done", "config"}


def recognizes(source: Path) -> bool:
    return source.is_dir() and bool(_trials(source))


def rows(source: Path) -> list[Row]:
    """One row per report, with the trial's parameters.

    Raises:
        ResultsError: a report that is not JSON, or no reports.
    """
    found: list[Row] = []
    for trial in _trials(source):
        parameters = read_object(trial / "params.json")
        for report, where in _reports(trial):
            values = {name: value for name, value in report.items() if name not in _HOUSEKEEPING}
            found.append(Row({"config": parameters, **values, "trial": trial.name}, where))
    if not found:
        raise ResultsError(f"{source}: the trials reported nothing (empty result.json files)")
    return found


def _trials(source: Path) -> list[Path]:
    patterns = ("/".join(["*"] * depth + ["params.json"]) for depth in range(MAX_DEPTH))
    return sorted(
        path.parent
        for pattern in patterns
        for path in source.glob(pattern)
        if (path.parent / "result.json").exists() or (path.parent / "progress.csv").exists()
    )


def _reports(trial: Path) -> list[tuple[dict[str, Any], str]]:
    path = trial / "result.json"
    if not path.exists() or path.stat().st_size == 0:
        return _table_reports(trial / "progress.csv")
    found = []
    for number, line in enumerate(_text(path).splitlines(), start=1):
        try:
            report = parse_json(line)
        except UnreadableError:
            raise ResultsError(f"{path}:{number}: not JSON; remove the line if the trial was interrupted") from None
        if isinstance(report, dict):
            found.append((report, f"{path}:{number}"))
    return found


def _text(path: Path) -> str:
    try:
        return read_text(path, MAX_BYTES)
    except UnreadableError as error:
        raise ResultsError(f"{path}: can't read it ({error}); restore the file, or leave its trial out") from None


def _table_reports(path: Path) -> list[tuple[dict[str, Any], str]]:
    if not path.exists() or path.stat().st_size == 0:
        return []
    try:
        return [(dict(row.fields), row.where) for rows in read_rows(path).values() for row in rows]
    except DataError as error:
        raise ResultsError(str(error)) from None


FILE = "trainer_state.json"
MAX_DEPTH_TRAINER_STATE = 4


def recognizes_of_trainer_state(source: Path) -> bool:
    return source.is_dir() and bool(_states(source))


def rows_of_trainer_state(source: Path) -> list[Row]:
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
    patterns = ("/".join(["*"] * depth + [FILE]) for depth in range(MAX_DEPTH_TRAINER_STATE))
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
