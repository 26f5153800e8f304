"""Interpret result tables and folders: the roles of columns by their names, the names of trainings, and the states of transformers' Trainer.

A folder of trainings states rank, learning rate and seed in its adapters, or in names such as `r2-seed0-lr5e-3`. Results of Optuna and
MLflow are read as data frames: `study.trials_dataframe()`, `mlflow.search_runs()`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rightrank.data.files import UnreadableError, read_json_object
from rightrank.data.rows import FILE_TYPES, Row
from rightrank.schema.errors import ResultsError, quote_value, suggest_name
from rightrank.schema.metrics import infer_direction

SYNONYMS: dict[str, tuple[str, ...]] = {
    "rank": ("rank", "lora_r", "lora_rank", "r", "peft_r", "adapter_rank", "adapter_r", "lora_dim", "network_dim"),
    "lr": ("lr", "learning_rate", "base_lr", "peak_lr", "lr_peak"),
    "seed": ("seed", "random_seed", "data_seed", "rng_seed"),
    "std": ("std", "stdev", "sd", "stddev", "std_dev", "standard_deviation", "seed_std"),
    "std_seeds": ("n_seeds", "num_seeds", "std_seeds", "n_runs", "n"),
    "example": ("item", "item_id", "example", "example_id", "sample_id", "question_id"),
    "group": ("group", "item_group", "group_id"),
    "weight": ("tokens", "item_tokens", "example_tokens", "label_tokens", "n_tokens", "num_tokens", "weight"),
    "train_value": ("train_loss", "train_value", "training_loss", "train_train_loss"),
    "step": ("step", "global_step", "train_global_step", "training_iteration", "steps", "total_steps", "num_steps"),
    "seconds": ("train_seconds", "train_runtime", "runtime", "time_total_s", "duration", "wall_seconds", "seconds"),
    "status": ("status", "state"),
    "trial": ("trial_id", "run_id", "run", "trial", "name", "id"),
}
_SPLITS = ("eval", "val", "validation", "valid", "dev", "heldout", "held_out", "test")
# Columns of the held-out value, in order of preference. A bare `loss` comes last, and it is not used if it may be the training
# loss (`_may_be_training_loss`).
VALUE_COLUMNS = (
    "value",
    *(f"{split}_{name}" for name in ("loss", "nll", "perplexity", "ppl") for split in _SPLITS),
    *(f"{split}_{name}" for name in ("accuracy", "acc", "f1", "score", "exact_match", "em") for split in _SPLITS),
    *("accuracy", "acc", "perplexity", "ppl", "nll", "score", "loss"),
)
_BARE_LOSSES = ("loss", "nll", "perplexity", "ppl")
# Columns that a trainer logs together with its training loss, which it calls `loss`.
_TRAINER_COLUMNS = {
    "train_loss", "train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos", "grad_norm",
}  # fmt: skip
_CONTAINERS = {
    "summary", "metrics", "hyperparameters", "user_attrs", "peft", "lora", "model", "trainer", "attributes", "default",
}  # fmt: skip
_CONTAINER_LIKE = re.compile(r"(params?|config|args|kwargs)$")
_OPTUNA_PREFIX = re.compile(r"^(params|user_attrs)_")  # in the columns of Optuna's trials_dataframe()
_LOGGED_PREFIX = re.compile(r"(metrics|summary)[./]", re.IGNORECASE)
_MAX_NAMES = 12
TRAINER_STATE_FILE = "trainer_state.json"
BLANK_TEXTS = ("", "-", "–", "—", "none", "null", "n/a")  # texts of empty cells
# Patterns for names with r16, r=16, rank_16, lora-r-16; lr1e-4, lr=0.0003; seed3, s3. The first pattern requires the spelled-out setting.
_NUMBER = r"(\d+)(?![\d.]|[bkmt](?![a-z]))"  # excludes sizes of models and data, such as r7b
_NAME_PATTERNS = {
    "rank": (rf"(?:^|[^a-z])rank[-_= ]?{_NUMBER}", rf"(?:^|[^a-z])(?:lora[-_=]?)?(?:rank|r)[-_= ]?{_NUMBER}"),
    "lr": (r"(?:^|[^a-z])(?:lr|learning[-_]?rate)[-_=]?(\d+(?:\.\d+)?(?:e-?\d+)?)(?!\d|\.\d|e[-_+]?\d)",),
    "seed": (rf"(?:^|[^a-z])seed[-_=]?{_NUMBER}", rf"(?:(?:^|[^a-z])seed[-_=]?|(?:^|[-_./ ])s){_NUMBER}"),
}
_MODEL_NAMES = re.compile(r"deepseek[-_ ]?r\d+(?:[-_ ]zero)?", re.IGNORECASE)  # models with names that look like a rank


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns of a table by their roles."""

    by_role: Mapping[str, str]
    value: str
    metric: str  # name of the value
    other_metrics: tuple[str, ...]  # columns of other held-out metrics


def normalize_column(name: str) -> str:
    """Normalize a column's name: `config.lora.r` → `r`, `params_lora_r` → `lora_r`, `eval/loss` → `eval_loss`."""
    words = [word for word in re.split(r"[./:\s]+", re.sub(r"\((.*)\)", "", name.strip().lower())) if word]
    while len(words) > 1 and (words[0] in _CONTAINERS or _CONTAINER_LIKE.search(words[0])):
        words.pop(0)
    return _OPTUNA_PREFIX.sub("", re.sub(r"[-_]+", "_", "_".join(words)).strip("_"))


def infer_column_direction(column: str) -> bool | None:
    """Return whether higher values of a column are better, or None if its name is not a known metric."""
    exact_direction = infer_direction(column)
    return infer_direction(normalize_column(column)) if exact_direction is None else exact_direction


def is_blank(value: Any) -> bool:
    """Return whether a cell is empty or contains a placeholder such as `n/a`."""
    return value is None or (isinstance(value, str) and value.strip().lower() in BLANK_TEXTS)


def parse_training_name(name: str, setting_names: Collection[str] = tuple(_NAME_PATTERNS)) -> dict[str, str]:
    """Return `rank`, `lr` and `seed` if a name such as `lora-r16-lr1e-4-seed0` states them.

    If a name has several numbers for a setting, the one that spells the setting out is used (`rank16`, `seed0`), or else the last one if it
    alone follows `lora`.

    Args:
        name: the name of a training, or the path of its folder.
        setting_names: the settings to look for.

    Raises:
        ResultsError: a name with several numbers for a setting, none of which is certain.
    """
    numbers = {
        setting: _parse_setting(_MODEL_NAMES.sub(" ", name), setting, name)
        for setting in _NAME_PATTERNS
        if setting in setting_names
    }
    return {setting: number for setting, number in numbers.items() if number is not None}


def _parse_setting(text: str, setting: str, name: str) -> str | None:
    """Return the number of a setting in `text`, the name without model names, or None."""
    matches: list[re.Match[str]] = []
    for pattern in _NAME_PATTERNS[setting]:
        matches = list(re.finditer(pattern, text, re.IGNORECASE))
        if len({float(match[1]) for match in matches}) == 1:
            return matches[-1][1]
        if matches:
            break
    after_lora = [match for match in matches if "lora" in match[0].lower()]
    if after_lora and after_lora == matches[-1:]:
        return matches[-1][1]
    if not matches:
        return None
    numbers = " and ".join(dict.fromkeys(match[1] for match in matches))
    raise ResultsError(
        f"{quote_value(name)}: the name states {'learning rate' if setting == 'lr' else setting} {numbers}; name the training so that it states one "
        f"({'lr1e-4' if setting == 'lr' else setting + '16' if setting == 'rank' else 'seed0'}), or give a table with a column {setting}"
    )


def list_columns(rows: Iterable[Row]) -> list[str]:
    """Return the names of all columns in order of appearance."""
    return list(dict.fromkeys(name for row in rows for name in row.fields))


def identify_columns(rows: Sequence[Row], metric: str | None, mapping: Mapping[str, str], table_name: str) -> Columns:
    """Find the column of each role.

    Args:
        metric: the user's `--metric`: a column, or the name of the metric in column `value`.
        mapping: the user's `--columns`: role → column.
        table_name: the table's name in error messages.

    Raises:
        ResultsError: no column for the rank or the held-out value, or a mapped column that does not exist.
    """
    names = list_columns(rows)
    for name, column in mapping.items():
        if name not in SYNONYMS and name != "value":
            raise ResultsError(
                f"--columns {name}={column}: {name!r} is not allowed; allowed: {', '.join([*SYNONYMS, 'value'])}"
            )
        if column not in names:
            raise ResultsError(
                f"--columns {name}={column}: {table_name} has no column {column!r}{suggest_name(column, names)}"
            )
    columns_by_name: dict[str, str] = {}
    # A configured setting is preferred to a logged one.
    for column in sorted(names, key=lambda name: bool(_LOGGED_PREFIX.match(name))):
        columns_by_name.setdefault(normalize_column(column), column)
    detected_roles = {name: _find_column(synonyms, columns_by_name) for name, synonyms in SYNONYMS.items()}
    roles = {name: column for name, column in detected_roles.items() if column is not None} | dict(mapping)
    if "rank" not in roles:
        raise ResultsError(
            f"{table_name}: none of the columns ({format_names(names)}) is recognized as the rank; name it with --columns rank=COLUMN"
        )
    unused_columns = [name for name in names if name not in roles.values()]
    value, metric_name = _find_value_column(unused_columns, columns_by_name, metric, mapping, table_name)
    std_column = _find_column((f"{normalize_column(value)}_{name}" for name in SYNONYMS["std"]), columns_by_name)
    if "std" not in roles and std_column is not None:
        roles["std"] = std_column
    used_columns = {*roles.values(), value}
    other_metrics = tuple(
        column
        for name in VALUE_COLUMNS
        if (column := columns_by_name.get(name, value)) not in used_columns
        and not _may_be_training_loss(column, columns_by_name)
    )
    return Columns(roles, value, metric_name, other_metrics)


def _find_value_column(
    names: Sequence[str],
    columns_by_name: Mapping[str, str],
    metric: str | None,
    mapping: Mapping[str, str],
    table_name: str,
) -> tuple[str, str]:
    """Return `(column, name of the metric)` of the held-out value. `names` are the columns without another role."""
    if "value" in mapping:
        return mapping["value"], metric or mapping["value"]
    if metric is not None:
        normalized_metric = normalize_column(metric)
        column = (
            metric
            if metric in names
            else _find_column(
                (normalized_metric, *(f"{split}_{normalized_metric}" for split in _SPLITS)), columns_by_name
            )
        )
        if column is not None:
            return column, metric
        if "value" in columns_by_name:
            return columns_by_name["value"], metric
        raise ResultsError(
            f"{table_name}: there is no column {metric!r} and no column `value`{suggest_name(metric, names)}; the columns are {format_names(names)}"
        )
    column = _find_column(VALUE_COLUMNS, columns_by_name)
    if column is None:  # Use a column that is the only one with the name of a metric.
        metric_columns = [
            name for name in names if infer_column_direction(name) is not None and "train" not in name.lower()
        ]
        column = metric_columns[0] if len(metric_columns) == 1 else None
    if column is None:
        training_loss_note = (
            " (a training loss does not measure held-out data)" if "train_loss" in columns_by_name else ""
        )
        raise ResultsError(
            f"{table_name}: none of the columns ({format_names(names)}) is recognized as the held-out value{training_loss_note}; name it with --metric COLUMN"
        )
    if _may_be_training_loss(column, columns_by_name):
        raise ResultsError(
            f"{table_name}: {column} may be the training loss, which does not measure held-out data; if it was measured on held-out "
            f"data, confirm this with --metric {column}, else name the held-out column with --metric COLUMN"
        )
    return column, "value" if normalize_column(column) == "value" else column


def _may_be_training_loss(column: str, columns_by_name: Mapping[str, str]) -> bool:
    """Return whether a column such as `loss` may contain the training loss, judged by its name and the other columns."""
    name = normalize_column(column)
    training_columns = {f"train_{name}", f"training_{name}"} | (_TRAINER_COLUMNS if name == "loss" else set())
    return name in _BARE_LOSSES and (
        bool(_LOGGED_PREFIX.match(column)) or not training_columns.isdisjoint(columns_by_name)
    )


def _find_column(candidates: Iterable[str], columns_by_name: Mapping[str, str]) -> str | None:
    return next((columns_by_name[name] for name in candidates if name in columns_by_name), None)


def format_names(names: Sequence[str]) -> str:
    """Join names with commas and shorten long lists."""
    text = ", ".join(names[:_MAX_NAMES])
    return f"{text}, … ({len(names)} in all)" if len(names) > _MAX_NAMES else text or "no columns"


def read_trainer_rows(source: Path) -> list[Row] | None:
    """Return the evaluations in a folder of trainings by transformers' Trainer, or None for a plain table.

    Raises:
        ResultsError: a file that cannot be read, or a folder without results in a known format.
    """
    if not source.is_dir():
        return None
    if states := sorted(source.rglob(TRAINER_STATE_FILE)):
        return _read_trainer_states(source, [path.parent for path in states])
    if not any(path.suffix.lower() in FILE_TYPES for path in source.iterdir()):
        raise ResultsError(
            f"{source}: the folder contains no results in a known format; give a run folder, trainer_state.json files, or a folder of CSV or "
            "JSONL files"
        )
    return None


def infer_settings_from_path(folder: Path, root: Path) -> dict[str, Any]:
    """Return `rank`, `lr` and `seed` as far as they can be inferred.

    The rank comes from the nearest adapter_config.json up to `root`; names state the remaining settings.

    Raises:
        ResultsError: an adapter_config.json that is not JSON, or names that state several ranks, learning rates or seeds.
    """
    folders = [folder, *(parent for parent in folder.parents if parent == root or root in parent.parents)]
    ranks = next(filter(None, map(_read_adapter_ranks, folders)), set[int]())
    settings: dict[str, Any] = {"rank": ranks.pop()} if len(ranks) == 1 else {}
    relative_path = "/".join(path.name for path in reversed(folders) if path != root)
    for name in (relative_path, root.name):  # The name of the root applies to all trainings.
        settings = parse_training_name(name, _NAME_PATTERNS.keys() - settings.keys()) | settings
    return settings


def _read_adapter_ranks(folder: Path) -> set[int]:
    """Return the ranks of the adapters in a folder and in its direct subfolders."""
    paths = [folder / "adapter_config.json", *sorted(folder.glob("*/adapter_config.json"))]
    ranks = [_read_json(path).get("r") for path in paths if path.is_file()]
    return {rank for rank in ranks if isinstance(rank, int)}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except UnreadableError as error:
        raise ResultsError(f"{path}: this is not JSON ({error}); restore the file, or remove its folder") from None


def _read_trainer_states(source: Path, folders: Sequence[Path]) -> list[Row]:
    """Return a row for each evaluation of each training. The last checkpoint has the complete history."""
    last_states: dict[Path, tuple[int, Path, dict[str, Any]]] = {}
    for folder in folders:
        training = folder.parent if folder.name.startswith("checkpoint-") else folder
        state = _read_json(folder / TRAINER_STATE_FILE)
        step = state.get("global_step")
        candidate = (step if isinstance(step, int) else 0, folder, state)
        last_states[training] = max(
            last_states.get(training, candidate), candidate, key=lambda candidate_key: candidate_key[:2]
        )
    rows = [
        row
        for training, (_, folder, state) in last_states.items()
        for row in _iterate_evaluations(
            folder / TRAINER_STATE_FILE, state, infer_settings_from_path(folder, source), training.name
        )
    ]
    if not rows:
        raise ResultsError(
            f"{source}: the {TRAINER_STATE_FILE} files contain no evaluation (eval_loss); train with eval_strategy set"
        )
    return rows


def _iterate_evaluations(path: Path, state: dict[str, Any], settings: dict[str, Any], training: str) -> Iterator[Row]:
    """Yield a row for each evaluation of a training. If no name states the learning rate, the highest logged one is used."""
    log = state.get("log_history")
    entries = [entry for entry in log if isinstance(entry, dict)] if isinstance(log, list) else []
    rates = [rate for entry in entries if isinstance(rate := entry.get("learning_rate"), int | float)]
    shared_fields = ({"lr": max(rates)} if rates else {}) | settings | {"trial": training}
    for entry in entries:
        shared_fields |= {"train_loss": entry["loss"]} if "loss" in entry else {}
        held_out = {name: value for name, value in entry.items() if name.startswith("eval_")}
        if held_out and isinstance(entry.get("step"), int):
            yield Row({**shared_fields, "step": entry["step"], **held_out}, f"{path}: step {entry['step']}")
