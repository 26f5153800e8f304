"""The files of an export target, and what the targets for trainers share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from rightrank.interop.recipe import Recipe
from rightrank.schema.settings import FileFormat

STRINGS = "the file is for a `prompt`, `chosen` and `rejected` of text"


@dataclass(frozen=True, slots=True)
class Written:
    """The files of a target by name, the command that uses them, and what the target cannot express."""

    files: dict[str, str]
    command: str
    notes: list[str] = field(default_factory=list)
    with_adapter: bool = False  # copy the files of the adapter too
    # by name, the format and the model's part
    lora_files: Mapping[str, tuple[FileFormat, str]] = field(default_factory=dict)


def given(**values: Any) -> dict[str, Any]:
    """The values that are not empty."""
    return {name: value for name, value in values.items() if value}


def loader(path: str) -> str:
    """The `datasets` loader of a file."""
    ending = path.rsplit(".", 1)[-1].lower()
    return {"csv": "csv", "tsv": "csv", "parquet": "parquet"}.get(ending, "json")


def as_yaml(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=1000)


def transformers_arguments(recipe: Recipe) -> dict[str, Any]:
    """The arguments that TRL, LLaMA-Factory and ms-swift share with transformers' TrainingArguments."""
    return {
        "learning_rate": recipe.learning_rate,
        "max_steps": recipe.max_steps,
        "per_device_train_batch_size": recipe.batch_size,
        "gradient_accumulation_steps": recipe.gradient_accumulation_steps,
        "lr_scheduler_type": recipe.lr_scheduler_type,
        "warmup_steps": recipe.warmup_steps,
        "weight_decay": recipe.weight_decay,
        "max_grad_norm": recipe.max_grad_norm,
        "bf16": recipe.dtype == "bfloat16",
        "fp16": recipe.dtype == "float16",
        "seed": recipe.seed,
        **({"optim": recipe.optim} if recipe.optim != "adamw_torch" else {}),
    }


def kind_notes(recipe: Recipe, who: str, has: Sequence[str] = ()) -> list[str]:
    """A note on the settings of the adapter's kind that the target lacks."""
    named = [*recipe.kind, *(["loraplus_lr_ratio"] if recipe.loraplus_lr_ratio is not None else [])]
    lacking = [name for name in named if name not in has]
    return [f"{who} has no {' and no '.join(lacking)}: it trains another adapter than the run did"] if lacking else []


def column_notes(recipe: Recipe, who: str) -> list[str]:
    """What to do with data whose columns the trainer does not know."""
    if recipe.shape is None:
        return []
    return [
        f"{who} reads the columns of the form {recipe.form}; change those of {recipe.data} as select did ({recipe.shape})"
    ]


def pattern_notes(recipe: Recipe, who: str) -> list[str]:
    missing = [name for name in ("rank_pattern", "alpha_pattern") if getattr(recipe, name)]
    return [f"{who} has no {' and no '.join(missing)}; the file has one rank for all modules"] if missing else []
