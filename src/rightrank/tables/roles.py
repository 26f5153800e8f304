"""Find what the columns of a result table hold: the settings of a training, its held-out value, examples, or a label."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from rightrank.schema.errors import ResultsError, suggest_name
from rightrank.schema.metrics import infer_direction
from rightrank.tables.sources import Table, format_cell, format_names

# The names of each role, as in docs/how-to/decide.md. The prefixes of trackers (`config.`, `params.`, `metrics.`) are left out.
NAMES: dict[str, tuple[str, ...]] = {
    "rank": ("rank", "r", "lora_r", "lora_rank", "peft_r", "adapter_rank", "lora_dim", "network_dim"),
    "lr": ("lr", "learning_rate"),
    "seed": ("seed", "random_seed"),
    "alpha": ("alpha", "lora_alpha", "network_alpha"),
    "step": ("step", "global_step", "train_global_step", "training_iteration", "steps", "total_steps", "num_steps", "max_steps"),
    "example": ("item", "item_id", "example", "example_id", "sample_id", "question_id"),
    "group": ("group", "group_id", "item_group"),
    "weight": ("tokens", "num_tokens", "n_tokens", "label_tokens", "item_tokens", "weight"),
    "std": ("std", "stdev", "sd"),
    "std_seeds": ("n_seeds", "num_seeds", "n"),
    "train_value": ("train_loss", "training_loss"),
    "status": ("status", "state"),
}  # fmt: skip
UNIQUE_ROLES = ("rank", "lr", "seed", "alpha")  # a table has only one column for each of them
EXAMPLE_ROLES = ("group", "weight")  # of tables with a row for each example
# Columns that identify a training or say when and where it ran. They may differ.
LABELS = {
    "", "name", "id", "run", "run_id", "run_name", "trial", "trial_id", "number", "tags_mlflow_runname", "created", "created_at",
    "start_time", "end_time", "datetime_start", "datetime_complete", "duration", "artifact_uri", "output_dir", "logging_dir",
}  # fmt: skip
SPLITS = ("eval", "val", "validation", "valid", "dev", "heldout", "held_out", "test")
BARE_LOSSES = ("loss", "nll", "perplexity", "ppl")
SCORES = ("accuracy", "acc", "f1", "score", "exact_match", "em")
# The held-out value, in order of preference. A bare `loss` may be the training loss (`_may_be_training_loss`).
VALUE_NAMES = (
    "value",
    *(f"{split}_{name}" for name in (*BARE_LOSSES, *SCORES) for split in SPLITS),
    *("accuracy", "acc", "score", "perplexity", "ppl", "nll", "loss"),
)
_SETTING_PREFIXES = {
    "config", "params", "param", "hyperparameters", "args", "training_args", "user_attrs", "peft", "peft_config", "lora",
    "lora_config", "adapter_config", "default",
}  # fmt: skip
_LOGGED_PREFIXES = {"metrics", "summary"}
_OPTUNA_PREFIX = re.compile(r"^(params|user_attrs)_")  # in the columns of Optuna's trials_dataframe()


@dataclass(frozen=True, slots=True)
class Roles:
    """The columns of a table by role, with the held-out value as `value`, and the name of its metric."""

    columns: Mapping[str, str]
    metric: str


def normalize_name(name: str) -> str:
    """Normalize a column's name: `config.lora.r` → `r`, `params_lora_r` → `lora_r`, `eval/loss` → `eval_loss`."""
    words = _split_name(name)
    while len(words) > 1 and words[0] in _SETTING_PREFIXES | _LOGGED_PREFIXES:
        words.pop(0)
    return _OPTUNA_PREFIX.sub("", _join_words(words))


def _split_name(name: str) -> list[str]:
    return [word for word in re.split(r"[./:\s]+", re.sub(r"\(.*\)", "", name.lower())) if word]


def _join_words(words: Collection[str]) -> str:
    return re.sub(r"[-_]+", "_", "_".join(words)).strip("_")


def is_label(name: str) -> bool:
    """Return whether a column identifies a training. Names under `config.` and the like are settings."""
    return _join_words(_split_name(name)) in LABELS


def is_setting(name: str) -> bool:
    """Return whether a tracker says that a column is a setting of the training."""
    return bool(_SETTING_PREFIXES & {*_split_name(name)[:1]} or _OPTUNA_PREFIX.match(name))


def _is_logged(name: str) -> bool:
    return bool(_LOGGED_PREFIXES & {*_split_name(name)[:1]})


def infer_column_direction(name: str) -> bool | None:
    """Return whether higher values of a column are better, or None if its name is not a known metric."""
    direction = infer_direction(name)
    return infer_direction(normalize_name(name)) if direction is None else direction


def identify_roles(table: Table, metric: str | None, mapping: Mapping[str, str]) -> Roles:
    """Find the column of each role by its name.

    Args:
        metric: the user's `--metric`: a column, or the name of the metric in the column `value`.
        mapping: the user's `--columns`: role → column.

    Raises:
        ResultsError: no column for the rank or the held-out value, several that may be meant, or a mapped one that does not exist.
    """
    for role, name in mapping.items():
        if role not in NAMES and role != "value":
            raise ResultsError(
                f"--columns {role}={name}: {role!r} is not allowed; allowed: {', '.join([*NAMES, 'value'])}"
            )
        table.require_column(name, f"--columns {role}={name}:")
    columns_by_name: dict[str, list[str]] = {}
    for name in table.columns:
        columns_by_name.setdefault(normalize_name(name), []).append(name)
    value, metric_name = _find_value(table, columns_by_name, metric, mapping)
    columns = {"value": value}
    std_names = (*NAMES["std"], *(f"{normalize_name(value)}_{name}" for name in NAMES["std"]))
    for role, role_names in NAMES.items():
        names = std_names if role == "std" else role_names
        column = mapping.get(role) or _find_role(table, role, names, columns_by_name, value)
        if column is not None and (role not in EXAMPLE_ROLES or role in mapping or "example" in columns):
            columns[role] = column
    if "rank" not in columns:
        raise ResultsError(
            f"{table.name}: none of the columns ({format_names(sorted(table.columns))}) is recognized as the rank; name it with --columns rank=COLUMN"
        )
    return Roles(columns, metric_name)


def _find_role(
    table: Table, role: str, names: Collection[str], columns_by_name: Mapping[str, list[str]], value: str
) -> str | None:
    """Find the column of a role. A setting is not read from the logged numbers of a tracker."""
    is_unique = role in UNIQUE_ROLES
    candidates = [
        column
        for name in names
        for column in columns_by_name.get(name, [])
        if column != value and not (is_unique and _is_logged(column))
    ]
    if candidates and not is_unique:
        preferred = normalize_name(candidates[0])
        candidates = [column for column in candidates if normalize_name(column) == preferred]
    return _require_one(table, candidates, f"--columns {role}=COLUMN") if candidates else None


def _require_one(table: Table, candidates: Collection[str], advice: str) -> str:
    """Return the only candidate, or the first of several that have the same cells in every row."""
    first, *others = sorted(candidates)
    texts, codes = table.columns[first].encode(format_cell)
    for name in others:
        other_texts, other_codes = table.columns[name].encode(format_cell)
        if other_texts != texts or (other_codes != codes).any():
            raise ResultsError(
                f"{table.name}: the columns {format_names([first, *others])} may mean the same; name the one to use with {advice}, or leave "
                "one out with --ignore"
            )
    return first


def _find_value(
    table: Table, columns_by_name: Mapping[str, list[str]], metric: str | None, mapping: Mapping[str, str]
) -> tuple[str, str]:
    """Return `(column, name of the metric)` of the held-out value."""
    if "value" in mapping:
        return mapping["value"], metric or mapping["value"]
    if metric is not None and metric in table.columns:
        return metric, metric
    value_names: Collection[str] = VALUE_NAMES
    if metric is not None:
        metric_name = normalize_name(metric)
        value_names = (metric_name, *(f"{split}_{metric_name}" for split in SPLITS), "value")
    candidates: list[str] = next((columns_by_name[name] for name in value_names if name in columns_by_name), [])
    names = sorted(table.columns)
    if not candidates and metric is None:  # a column that is the only one with the name of a metric
        metrics = [name for name in names if infer_column_direction(name) is not None and "train" not in name.lower()]
        candidates = metrics if len(metrics) == 1 else []
    if not candidates:
        fault = "no column is recognized as the held-out value"
        if metric is not None:
            fault = f"there is no {metric!r} and no `value`{suggest_name(metric, names)}"
        raise ResultsError(
            f"{table.name}: {fault}; name it with --metric COLUMN; the columns are {format_names(names)}"
        )
    column = _require_one(table, candidates, "--metric COLUMN")
    if metric is not None:
        return column, metric
    if _may_be_training_loss(column, columns_by_name):
        raise ResultsError(
            f"{table.name}: {column} may be the training loss, which does not measure held-out data; if it was measured on held-out "
            f"data, confirm this with --metric {column}, else name the held-out column with --metric COLUMN"
        )
    return column, "value" if normalize_name(column) == "value" else column


def _may_be_training_loss(column: str, columns_by_name: Mapping[str, list[str]]) -> bool:
    """Return whether a column such as `loss` may contain the training loss: beside others of a training log, it does."""
    has_log = any(
        name.startswith(("train_", "training_")) or name in ("grad_norm", "total_flos") for name in columns_by_name
    )
    return normalize_name(column) in BARE_LOSSES and (has_log or _is_logged(column))
