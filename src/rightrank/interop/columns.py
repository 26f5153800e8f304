"""What tables and folders of results mean: the roles of columns by synonyms, the names of trainings, the states of transformers' Trainer.

A folder of trainings gives rank, learning rate and seed by the adapters in it, or by names such as `r2-seed0-lr5e-3`. The results of Optuna
and MLflow are tables that pandas holds: `study.trials_dataframe()`, `mlflow.search_runs()`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rightrank.data.files import UnreadableError, read_json_object
from rightrank.data.rows import FILE_TYPES, Row
from rightrank.schema.errors import ResultsError, did_you_mean, quoted
from rightrank.schema.metrics import direction

SYNONYMS: dict[str, tuple[str, ...]] = {
    "rank": ("rank", "lora_r", "lora_rank", "r", "peft_r", "adapter_rank", "adapter_r", "lora_dim", "network_dim"),
    "lr": ("lr", "learning_rate", "base_lr", "peak_lr", "lr_peak"),
    "seed": ("seed", "random_seed", "data_seed", "rng_seed"),
    "std": ("std", "stdev", "sd", "stddev", "std_dev", "standard_deviation", "seed_std"),
    "std_seeds": ("n_seeds", "num_seeds", "std_seeds", "n_runs", "n"),
    "item": ("item", "item_id", "example", "example_id", "sample_id", "question_id"),
    "group": ("group", "item_group", "group_id"),
    "weight": ("tokens", "item_tokens", "example_tokens", "label_tokens", "n_tokens", "num_tokens", "weight"),
    "train_value": ("train_loss", "train_value", "training_loss", "train_train_loss"),
    "step": ("step", "global_step", "train_global_step", "training_iteration", "steps", "total_steps", "num_steps"),
    "seconds": ("train_seconds", "train_runtime", "runtime", "time_total_s", "duration", "wall_seconds", "seconds"),
    "status": ("status", "state"),
    "trial": ("trial_id", "run_id", "run", "trial", "name", "id"),
}
_SPLITS = ("eval", "val", "validation", "valid", "dev", "heldout", "held_out", "test")
# Columns of the held-out value, in order of preference. A bare `loss` comes last, and where it may be of training
# (`_is_perhaps_of_training`) it is not taken.
VALUES = (
    "value",
    *(f"{split}_{name}" for name in ("loss", "nll", "perplexity", "ppl") for split in _SPLITS),
    *(f"{split}_{name}" for name in ("accuracy", "acc", "f1", "score", "exact_match", "em") for split in _SPLITS),
    *("accuracy", "acc", "perplexity", "ppl", "nll", "score", "loss"),
)
_BARE_LOSSES = ("loss", "nll", "perplexity", "ppl")
# What a trainer logs beside its training loss, which it calls `loss`.
_OF_TRAINERS = {
    "train_loss", "train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos", "grad_norm",
}  # fmt: skip
_CONTAINERS = {
    "summary", "metrics", "hyperparameters", "user_attrs", "peft", "lora", "model", "trainer", "attributes", "default",
}  # fmt: skip
_CONTAINER_LIKE = re.compile(r"(params?|config|args|kwargs)$")
_OPTUNA_PREFIX = re.compile(r"^(params|user_attrs)_")  # of the columns of Optuna's trials_dataframe()
_MEASURED = re.compile(r"(metrics|summary)[./]", re.IGNORECASE)
_MAX_NAMES = 12
STATE = "trainer_state.json"
BLANKS = ("", "-", "–", "—", "none", "null", "n/a")  # texts of cells that hold nothing
# Parts of a name such as r16, r=16, rank_16, lora-r-16; lr1e-4, lr=0.0003; seed3, s3: those that spell the setting out, then all of them.
_NUMBER = r"(\d+)(?![\d.]|[bkmt](?![a-z]))"  # and not the size of a model or of its data, such as r7b
_NAMED = {
    "rank": (rf"(?:^|[^a-z])rank[-_= ]?{_NUMBER}", rf"(?:^|[^a-z])(?:lora[-_=]?)?(?:rank|r)[-_= ]?{_NUMBER}"),
    "lr": (r"(?:^|[^a-z])(?:lr|learning[-_]?rate)[-_=]?(\d+(?:\.\d+)?(?:e-?\d+)?)(?!\d|\.\d|e[-_+]?\d)",),
    "seed": (rf"(?:^|[^a-z])seed[-_=]?{_NUMBER}", rf"(?:(?:^|[^a-z])seed[-_=]?|(?:^|[-_./ ])s){_NUMBER}"),
}
_MODELS = re.compile(r"deepseek[-_ ]?r\d+(?:[-_ ]zero)?", re.IGNORECASE)  # models whose names look like a rank


@dataclass(frozen=True, slots=True)
class Columns:
    """Canonical name → column of the table."""

    by_name: Mapping[str, str]
    value: str
    metric: str  # what the value is called
    others: tuple[str, ...]  # columns of further held-out metrics


def plain(name: str) -> str:
    """Normalize a column's name: `config.lora.r` → `r`, `params_lora_r` → `lora_r`, `eval/loss` → `eval_loss`."""
    parts = [part for part in re.split(r"[./:\s]+", re.sub(r"\((.*)\)", "", name.strip().lower())) if part]
    while len(parts) > 1 and (parts[0] in _CONTAINERS or _CONTAINER_LIKE.search(parts[0])):
        parts.pop(0)
    return _OPTUNA_PREFIX.sub("", re.sub(r"[-_]+", "_", "_".join(parts)).strip("_"))


def direction_of(column: str) -> bool | None:
    """Whether higher is better by the metric in a column; None if its name is not a known metric's."""
    known = direction(column)
    return direction(plain(column)) if known is None else known


def is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value.strip().lower() in BLANKS)


def settings_of_name(name: str, wanted: Collection[str] = tuple(_NAMED)) -> dict[str, str]:
    """Return `rank`, `lr` and `seed` by a name such as `lora-r16-lr1e-4-seed0`, where it has them.

    Of several numbers the one that the name spells out counts (`rank16`, `seed0`), else the last one if it alone follows `lora`.

    Args:
        name: of a training, or the path of its folder.
        wanted: the settings to look for.

    Raises:
        ResultsError: a name with several numbers of which none is certain.
    """
    numbers = {setting: _number_in(_MODELS.sub(" ", name), setting, name) for setting in _NAMED if setting in wanted}
    return {setting: number for setting, number in numbers.items() if number is not None}


def _number_in(text: str, setting: str, name: str) -> str | None:
    """Return the number of a setting in `text`, the name without those of models; None if it has none."""
    matches: list[re.Match[str]] = []
    for pattern in _NAMED[setting]:
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
        f"{quoted(name)}: the name says {'learning rate' if setting == 'lr' else setting} {numbers}; name the training so that it says one "
        f"({'lr1e-4' if setting == 'lr' else setting + '16' if setting == 'rank' else 'seed0'}), or give a table with a column {setting}"
    )


def names_of(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.fields))


def identify_columns(rows: Sequence[Row], metric: str | None, mapping: Mapping[str, str], where: str) -> Columns:
    """Find the columns.

    Args:
        metric: the user's `--metric`: a column, or what to call the `value` column.
        mapping: the user's `--columns`, canonical name → column.
        where: the table's name in error messages.

    Raises:
        ResultsError: no rank or no held-out value, or a mapped column that isn't there.
    """
    names = names_of(rows)
    for name, column in mapping.items():
        if name not in SYNONYMS and name != "value":
            raise ResultsError(f"--columns {name}={column}: {name!r} is not one of {', '.join([*SYNONYMS, 'value'])}")
        if column not in names:
            raise ResultsError(
                f"--columns {name}={column}: {where} has no column {column!r}{did_you_mean(column, names)}"
            )
    by_plain: dict[str, str] = {}
    for column in sorted(names, key=lambda name: bool(_MEASURED.match(name))):  # a setting as set before one as logged
        by_plain.setdefault(plain(column), column)
    near = {name: _first(synonyms, by_plain) for name, synonyms in SYNONYMS.items()}
    roles = {name: column for name, column in near.items() if column is not None} | dict(mapping)
    if "rank" not in roles:
        raise ResultsError(f"{where}: no column for the rank among {listed(names)}; name it with --columns rank=COLUMN")
    unused = [name for name in names if name not in roles.values()]
    value, called = _value_column(unused, by_plain, metric, mapping, where)
    deviation = _first((f"{plain(value)}_{name}" for name in SYNONYMS["std"]), by_plain)
    if "std" not in roles and deviation is not None:
        roles["std"] = deviation
    taken = {*roles.values(), value}
    others = tuple(
        column
        for name in VALUES
        if (column := by_plain.get(name, value)) not in taken and not _is_perhaps_of_training(column, by_plain)
    )
    return Columns(roles, value, called, others)


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
        asked = plain(metric)
        column = metric if metric in names else _first((asked, *(f"{split}_{asked}" for split in _SPLITS)), by_plain)
        if column is not None:
            return column, metric
        if "value" in by_plain:
            return by_plain["value"], metric
        raise ResultsError(
            f"{where}: no column {metric!r} and no column `value`{did_you_mean(metric, names)}; there are {listed(names)}"
        )
    column = _first(VALUES, by_plain)
    if column is None:  # the only one that is named like a metric
        like = [name for name in names if direction_of(name) is not None and "train" not in name.lower()]
        column = like[0] if len(like) == 1 else None
    if column is None:
        trained = " (a training loss does not measure held-out data)" if "train_loss" in by_plain else ""
        raise ResultsError(
            f"{where}: no column for the held-out value among {listed(names)}{trained}; name it with --metric COLUMN"
        )
    if _is_perhaps_of_training(column, by_plain):
        raise ResultsError(
            f"{where}: {column} may be the loss of the training, which does not measure held-out data; if it is of held-out "
            f"data, say so with --metric {column}, else name the held-out column with --metric COLUMN"
        )
    return column, "value" if plain(column) == "value" else column


def _is_perhaps_of_training(column: str, by_plain: Mapping[str, str]) -> bool:
    """Whether a bare loss is of the training by its name in a log, or by what stands beside it."""
    name = plain(column)
    beside = {f"train_{name}", f"training_{name}"} | (_OF_TRAINERS if name == "loss" else set())
    return name in _BARE_LOSSES and (bool(_MEASURED.match(column)) or not beside.isdisjoint(by_plain))


def _first(candidates: Iterable[str], by_plain: Mapping[str, str]) -> str | None:
    return next((by_plain[name] for name in candidates if name in by_plain), None)


def listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_MAX_NAMES])
    return f"{shown}, … ({len(names)} in all)" if len(names) > _MAX_NAMES else shown or "no columns"


def import_rows(source: Path) -> list[Row] | None:
    """Rows of a folder of trainings by transformers' Trainer; None for a plain table.

    Raises:
        ResultsError: a file that can't be read, or a folder without known results.
    """
    if not source.is_dir():
        return None
    if states := sorted(source.rglob(STATE)):
        return _trainer_rows(source, [path.parent for path in states])
    if not any(path.suffix.lower() in FILE_TYPES for path in source.iterdir()):
        raise ResultsError(
            f"{source}: the folder holds no known results; give a run folder, trainer_state.json files, or a folder of CSV or "
            "JSONL files"
        )
    return None


def settings_from_path(folder: Path, root: Path) -> dict[str, Any]:
    """Return `rank`, `lr` and `seed` where known: from the nearest adapter_config.json up to `root`, then from names.

    Raises:
        ResultsError: an adapter_config.json that isn't JSON, or names that say several ranks, learning rates or seeds.
    """
    folders = [folder, *(parent for parent in folder.parents if parent == root or root in parent.parents)]
    ranks = next(filter(None, map(_recorded_ranks, folders)), set[int]())
    settings: dict[str, Any] = {"rank": ranks.pop()} if len(ranks) == 1 else {}
    relative_path = "/".join(path.name for path in reversed(folders) if path != root)
    for name in (relative_path, root.name):  # the name of the root is of all trainings
        settings = settings_of_name(name, _NAMED.keys() - settings.keys()) | settings
    return settings


def _recorded_ranks(folder: Path) -> set[int]:
    """Return the ranks of the adapters in a folder and in those directly below it."""
    paths = [folder / "adapter_config.json", *sorted(folder.glob("*/adapter_config.json"))]
    ranks = [_object(path).get("r") for path in paths if path.is_file()]
    return {rank for rank in ranks if isinstance(rank, int)}


def _object(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except UnreadableError as error:
        raise ResultsError(f"{path}: not JSON ({error}); restore the file, or leave its folder out") from None


def _trainer_rows(source: Path, folders: Sequence[Path]) -> list[Row]:
    """One row for each evaluation of each training, of its last checkpoint, which holds the whole history."""
    last: dict[Path, tuple[int, Path, dict[str, Any]]] = {}
    for folder in folders:
        training = folder.parent if folder.name.startswith("checkpoint-") else folder
        state = _object(folder / STATE)
        step = state.get("global_step")
        place = (step if isinstance(step, int) else 0, folder, state)
        last[training] = max(last.get(training, place), place, key=lambda seen: seen[:2])
    rows = [
        row
        for training, (_, folder, state) in last.items()
        for row in _evaluations(folder / STATE, state, settings_from_path(folder, source), training.name)
    ]
    if not rows:
        raise ResultsError(f"{source}: the {STATE} files hold no evaluation (eval_loss); train with eval_strategy set")
    return rows


def _evaluations(path: Path, state: dict[str, Any], settings: dict[str, Any], training: str) -> Iterator[Row]:
    """The looks of a training; its learning rate is the highest that was logged, where no name says it."""
    log = state.get("log_history")
    entries = [entry for entry in log if isinstance(entry, dict)] if isinstance(log, list) else []
    rates = [rate for entry in entries if isinstance(rate := entry.get("learning_rate"), int | float)]
    shared = ({"lr": max(rates)} if rates else {}) | settings | {"trial": training}
    for entry in entries:
        shared |= {"train_loss": entry["loss"]} if "loss" in entry else {}
        held_out = {name: value for name, value in entry.items() if name.startswith("eval_")}
        if held_out and isinstance(entry.get("step"), int):
            yield Row({**shared, "step": entry["step"], **held_out}, f"{path}: step {entry['step']}")
