"""Read the output folders of transformers' Trainer: the evaluations of each training, and the configuration of its adapter."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from rightrank.data.files import UnreadableError, read_json_object
from rightrank.schema.errors import ResultsError

STATE_FILE = "trainer_state.json"
CONFIG_FILE = "adapter_config.json"
STATE_SETTINGS = ("max_steps", "num_train_epochs", "train_batch_size")
_SEED = re.compile(r"seed[-_=]?(\d+)", re.IGNORECASE)
NumberedRows: TypeAlias = list[tuple[int, Mapping[str, Any]]]


def read_trainer_outputs(root: Path, states: Sequence[Path]) -> tuple[list[tuple[str, NumberedRows]], frozenset[str]]:
    """Read the evaluations of the trainings under a folder.

    The rank and the other settings of an adapter come from its `adapter_config.json`, the learning rate is the highest one in the log,
    and the seed is that in the folder's name (`seed0`). Of several checkpoints, the last one has the complete log.

    Args:
        states: the `trainer_state.json` files under `root`.

    Returns:
        For each training the beginning of its rows' origins, and its rows with their steps; and the columns that hold the
        adapter's settings.

    Raises:
        ResultsError: a file that is not JSON, a training without an adapter's configuration, or no evaluation.
    """
    last_states: dict[Path, tuple[int, Path, dict[str, Any]]] = {}
    for path in states:
        training = path.parent.parent if path.parent.name.startswith("checkpoint-") else path.parent
        state = _read_json(path)
        step = state.get("global_step")
        candidate = (step if isinstance(step, int) else 0, path, state)
        last_states[training] = max(last_states.get(training, candidate), candidate, key=lambda entry: entry[:2])
    outputs: list[tuple[str, NumberedRows]] = []
    settings: set[str] = set()
    for training, (_, path, state) in last_states.items():
        config = _read_adapter_config(path, training)
        fields = {"rank": config.pop("r", None), **config, **_find_seed(training, root)}
        fields |= {name: state[name] for name in STATE_SETTINGS if name in state}
        outputs.append((f"{path}: step ", _list_evaluations(state, fields)))
        settings |= config.keys()
    if not any(rows for _, rows in outputs):
        raise ResultsError(
            f"{root}: the {STATE_FILE} files contain no evaluation (eval_loss); train with eval_strategy set"
        )
    return outputs, frozenset(settings)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except UnreadableError as error:
        raise ResultsError(f"{path}: this is not JSON ({error}); restore the file, or remove its folder") from None


def _read_adapter_config(state: Path, training: Path) -> dict[str, Any]:
    """Read the configuration beside the state, in the folder of the training, or in one of its checkpoints."""
    folders = [state.parent, training, *sorted(training.glob("checkpoint-*"))]
    path = next((folder / CONFIG_FILE for folder in folders if (folder / CONFIG_FILE).is_file()), None)
    if path is None:
        raise ResultsError(
            f"{state}: there is no {CONFIG_FILE} in its folder, so the rank is not known; save the adapter there, or give a table "
            "with a column rank"
        )
    config = _read_json(path)
    return {name: _simplify_setting(value) for name, value in config.items()}


def _simplify_setting(value: Any) -> Any:
    """Return lists in one order, because PEFT writes sets in any, and mappings as texts."""
    if isinstance(value, list):
        return sorted(value, key=repr)
    return json.dumps(value, sort_keys=True) if isinstance(value, dict) else value


def _find_seed(training: Path, root: Path) -> dict[str, str]:
    seeds = set(_SEED.findall("/".join(training.relative_to(root).parts) or training.name))
    if len(seeds) > 1:
        raise ResultsError(
            f"{training}: its name states the seeds {', '.join(sorted(seeds))}; name the folder so that it states one (seed0)"
        )
    return {"seed": seeds.pop()} if seeds else {}


def _list_evaluations(state: Mapping[str, Any], fields: Mapping[str, Any]) -> NumberedRows:
    """List the steps of the log with a held-out value, each with its values, the last training loss before it, and `fields`."""
    log = state.get("log_history")
    entries = [entry for entry in log if isinstance(entry, dict)] if isinstance(log, list) else []
    rates = [rate for entry in entries if isinstance(rate := entry.get("learning_rate"), int | float)]
    values = {**fields, "lr": max(rates)} if rates else {**fields}
    evaluations: list[tuple[int, Mapping[str, Any]]] = []
    for entry in entries:
        values |= {"train_loss": entry["loss"]} if "loss" in entry else {}
        held_out = {name: value for name, value in entry.items() if name.startswith("eval_")}
        if held_out and isinstance(entry.get("step"), int):
            evaluations.append((entry["step"], {"step": entry["step"], **values, **held_out}))
    return evaluations
