"""Identifies the columns of a results table, also by synonyms, and states each match."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rightrank.schema.errors import ResultsError, did_you_mean
from rightrank.schema.metrics import direction

SYNONYMS: dict[str, tuple[str, ...]] = {
    "rank": ("rank", "lora_r", "lora_rank", "r", "peft_r", "adapter_rank", "adapter_r", "lora_dim", "network_dim"),
    "lr": ("lr", "learning_rate", "base_lr", "peak_lr", "lr_peak"),
    "seed": ("seed", "random_seed", "data_seed", "rng_seed"),
    "std": ("std", "stdev", "sd", "stddev", "std_dev", "standard_deviation", "seed_std"),
    "std_seeds": ("n_seeds", "num_seeds", "std_seeds", "n_runs"),
    "item": ("item", "item_id", "example", "example_id", "sample_id", "question_id"),
    "weight": ("tokens", "item_tokens", "label_tokens", "n_tokens", "num_tokens", "weight"),
    "train_value": ("train_loss", "train_value", "training_loss", "train_train_loss"),
    "step": ("step", "global_step", "train_global_step", "training_iteration", "steps", "total_steps", "num_steps"),
    "seconds": ("train_seconds", "train_runtime", "runtime", "time_total_s", "duration", "wall_seconds", "seconds"),
    "metric": ("metric", "metric_name"),
    "higher_is_better": ("higher_is_better",),
    "status": ("status", "state"),
    "trial": ("trial_id", "run_id", "run", "trial", "name", "id"),
}
# Columns of the held-out value, in order of preference. A bare `loss` comes last and the output states that it was
# taken as held-out; a training loss never is.
VALUES = (
    "value",
    *(f"{split}_{name}" for name in ("loss", "nll", "perplexity", "ppl") for split in ("eval", "val", "validation", "valid", "dev", "heldout", "held_out", "test")),
    *(f"{split}_{name}" for name in ("accuracy", "acc", "f1", "score", "exact_match", "em") for split in ("eval", "val", "validation", "valid", "dev", "heldout", "held_out", "test")),
    "accuracy",
    "acc",
    "perplexity",
    "ppl",
    "nll",
    "score",
    "loss",
)  # fmt: skip
_CONTAINERS = {
    "summary", "metrics", "hyperparameters", "user_attrs", "peft", "lora", "model", "trainer", "attributes", "default",
}  # fmt: skip
_CONTAINER_LIKE = re.compile(r"(params?|config|args|kwargs)$")
_OPTUNA_PREFIX = re.compile(r"^(params|user_attrs)_")  # of the columns of Optuna's trials_dataframe()
_MAX_NAMES = 12


@dataclass(frozen=True, slots=True)
class Columns:
    """Canonical name → column of the table."""

    by_name: Mapping[str, str]
    value: str
    metric: str  # what the value is called
    others: tuple[str, ...]  # columns of further held-out metrics

    def get(self, name: str) -> str | None:
        return self.by_name.get(name)


def plain(name: str) -> str:
    """Normalize a column's name: `config.lora.r` → `r`, `params_lora_r` → `lora_r`, `eval/loss` → `eval_loss`."""
    parts = [part for part in re.split(r"[./:\s]+", re.sub(r"\((.*)\)", "", name.strip().lower())) if part]
    while len(parts) > 1 and (parts[0] in _CONTAINERS or _CONTAINER_LIKE.search(parts[0])):
        parts.pop(0)
    return _OPTUNA_PREFIX.sub("", re.sub(r"[-_]+", "_", "_".join(parts)).strip("_"))


def direction_of(column: str) -> bool | None:
    """Whether higher is better by the metric in a column; None if its name is not a known metric's."""
    found = direction(column)
    return direction(plain(column)) if found is None else found


def identify_columns(names: Sequence[str], metric: str | None, mapping: Mapping[str, str], where: str) -> Columns:
    """Find the columns.

    Args:
        names: all column names of the table.
        metric: the user's `--metric`: a column, or what to call the `value` column.
        mapping: the user's `--map`, canonical name → column.
        where: the table's name in error messages.

    Raises:
        ResultsError: no rank or no held-out value, or a mapped column that isn't there.
    """
    for name, column in mapping.items():
        if name not in SYNONYMS and name != "value":
            raise ResultsError(f"--map {name}={column}: {name!r} is not one of {', '.join([*SYNONYMS, 'value'])}")
        if column not in names:
            raise ResultsError(f"--map {name}={column}: {where} has no column {column!r}{did_you_mean(column, names)}")
    by_plain: dict[str, str] = {}
    for column in names:
        by_plain.setdefault(plain(column), column)
    near = {name: _first(synonyms, by_plain) for name, synonyms in SYNONYMS.items()}
    found = {name: column for name, column in near.items() if column is not None}
    found |= mapping
    if "rank" not in found:
        raise ResultsError(f"{where}: no column for the rank among {_listed(names)}; name it with --map rank=COLUMN")
    unused = [name for name in names if name not in found.values()]
    value, called = _value_column(unused, by_plain, metric, mapping, where)
    taken = {*found.values(), value}
    others = tuple(by_plain[name] for name in VALUES if name in by_plain and by_plain[name] not in taken)
    return Columns(found, value, called, others)


def _value_column(
    names: Sequence[str],
    by_plain: Mapping[str, str],
    metric: str | None,
    mapping: Mapping[str, str],
    where: str,
) -> tuple[str, str]:
    """`(column, name of the metric)`; `names` are the columns without another role."""
    if "value" in mapping:
        return mapping["value"], metric or mapping["value"]
    if metric is not None:
        column = metric if metric in names else by_plain.get(plain(metric))
        if column is not None:
            return column, metric
        if "value" in by_plain:
            return by_plain["value"], metric
        raise ResultsError(
            f"{where}: no column {metric!r} and no column `value`{did_you_mean(metric, names)}; there are {_listed(names)}"
        )
    column = _first(VALUES, by_plain) or _any_metric(names)
    if column is None:
        trained = " (a training loss does not measure held-out data)" if "train_loss" in by_plain else ""
        raise ResultsError(
            f"{where}: no column for the held-out value among {_listed(names)}{trained}; name it with --metric COLUMN"
        )
    return column, "value" if plain(column) == "value" else column


def _any_metric(names: Sequence[str]) -> str | None:
    """The column named like a metric that is not a training metric; None if there are several."""
    like = [name for name in names if direction_of(name) is not None and "train" not in name.lower()]
    return like[0] if len(like) == 1 else None


def _first(candidates: Iterable[str], by_plain: Mapping[str, str]) -> str | None:
    return next((by_plain[name] for name in candidates if name in by_plain), None)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_MAX_NAMES])
    return f"{shown}, … ({len(names)} in all)" if len(names) > _MAX_NAMES else shown or "no columns"
