"""Describe the result of a run in the terms of trainers and servers."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from rightrank.adapters.rank_math import convert_scaling
from rightrank.data.files import UnreadableError, read_json_object
from rightrank.decision.adapter import TRUNCATION_METHODS, Provenance, build_provenance
from rightrank.schema.command import build_set_arguments
from rightrank.schema.errors import RunFolderError
from rightrank.schema.events import RunStarted
from rightrank.schema.settings import EVALUATION_SETTINGS, SelectSettings
from rightrank.schema.trials import TrialFinished

UNKNOWN_MODEL, UNKNOWN_DATA = "path/to/model", "path/to/data.jsonl"


@dataclass(frozen=True, slots=True)
class Recipe:
    """The exported adapter and the training that it comes from, in the names of PEFT and transformers.

    `r`, `lora_alpha` and the patterns belong to the adapter; `learning_rate`, `max_steps` and `seed` to the training, and `settings` to the run.
    `module_names` are the full names of the adapted modules. `layers_to_transform` is None if every layer is adapted;
    `target_modules` then suffices to identify them.
    """

    model: str
    data: str
    form: str
    adapter: Path
    r: int
    lora_alpha: float
    target_modules: tuple[str, ...]
    target_parameters: tuple[str, ...]
    module_names: tuple[str, ...]
    learning_rate: float
    max_steps: int
    warmup_steps: int
    seed: int
    settings: SelectSettings  # settings of the run
    provenance: Provenance
    trained_alpha: float  # PEFT's lora_alpha at the trained rank
    shape: str | None = None  # how the rows were converted to the form: see `data.forms`
    columns: Mapping[str, str] = field(default_factory=dict)  # column of the form → its name in the file
    use_rslora: bool = False
    lora_dropout: float = 0.0
    task_type: str = "CAUSAL_LM"
    layers_to_transform: Sequence[int] | None = None
    modules_to_save: Sequence[str] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_dora: bool = False
    exclude_modules: Sequence[str] | str = ()
    init_lora_weights: bool | str = True
    num_held_out: int = 0  # number of rows of `data` that were not used for training
    served_folder: Path | None = None  # the folder that a server loads, if it is not `adapter`

    @property
    def non_default(self) -> dict[str, Any]:
        """The settings that a trainer may not support, in the names of PEFT and transformers, without those at their default."""
        names = ("exclude_modules", "layers_to_transform", "modules_to_save", "rank_pattern", "alpha_pattern")
        values = {name: getattr(self, name) for name in names} | self.non_plain_options
        values |= {"init_lora_weights": self.init_lora_weights is not True and self.init_lora_weights}
        values |= {name: getattr(self.settings, name) for name in ("load_in_4bit", "load_in_8bit", "trust_remote_code")}
        return {name: value for name, value in values.items() if value}

    @property
    def non_plain_options(self) -> dict[str, Any]:
        """Return the options that make the adapter another kind than plain LoRA, in PEFT's names."""
        options = {"use_dora": self.use_dora, "target_parameters": list(self.target_parameters)}
        options |= self.settings.peft_options
        return {name: value for name, value in options.items() if value}

    @property
    def has_patterns(self) -> bool:
        """Return whether modules differ in rank or alpha."""
        return bool(self.rank_pattern or self.alpha_pattern)

    @property
    def alpha(self) -> int | float:
        """Alpha, as an integer if possible, because most schemas require one."""
        return int(self.lora_alpha) if float(self.lora_alpha).is_integer() else self.lora_alpha

    @property
    def _is_truncated(self) -> bool:
        """Whether the adapter was truncated after its training."""
        return self.provenance.truncation is not None

    def build_training_recipe(self) -> Recipe:
        """Return the recipe of the training that the adapter comes from."""
        init = self.settings.init_lora_weights
        recipe = self if init == "default" else replace(self, init_lora_weights=init)
        if not self._is_truncated and self.r == self.provenance.trained_rank:
            return recipe
        return replace(
            recipe, r=self.provenance.trained_rank, lora_alpha=self.trained_alpha, rank_pattern={}, alpha_pattern={}
        )

    def format_rebuild_comments(self) -> list[str]:
        """Return comments on how to recreate an adapter that was truncated after its training."""
        if not self._is_truncated:
            return []
        rank, data = str(self.provenance.rank), self.data
        resize_arguments = ["--data", data, "--train", data, "--ranks", rank, "--base", self.model]
        measuring_settings = {
            name: value for name in EVALUATION_SETTINGS if (value := getattr(self.settings, name)) is not None
        }
        resize_arguments += build_set_arguments(measuring_settings)
        resize_arguments = (
            ["--rank", rank] if self.provenance.truncation == TRUNCATION_METHODS["svd"] else resize_arguments
        )
        command = shlex.join(["rightrank", "resize", "TRAINED", "SMALLER", *resize_arguments])
        return [
            f"The adapter of rank {self.provenance.rank} was {self.provenance.format_sentence()}.",
            f"To recreate it, train at rank {self.provenance.trained_rank}, then: {command}",
        ]

    @property
    def explicit_targets(self) -> list[str]:
        """Names that identify the adapted modules without `layers_to_transform` and `exclude_modules`."""
        has_all_layers = self.layers_to_transform is None and not self.exclude_modules
        return list(self.target_modules if has_all_layers else self.module_names)


def build_recipe(
    started: RunStarted, trial: TrialFinished, adapter: Path, finished: Sequence[TrialFinished] = ()
) -> Recipe:
    """Build the recipe of a run's chosen trial.

    Args:
        finished: the trials of the run, including the one that `trial` truncates, if any.

    Raises:
        RunFolderError: the run has no PEFT adapter.
    """
    from safetensors import safe_open

    config = _read_adapter_config(adapter)
    with safe_open(
        adapter / "adapter_model.safetensors", framework="numpy"
    ) as file:  # The file's header names the modules.
        names = {name.split(".lora_")[0] for name in file.keys() if ".lora_" in name}  # noqa: SIM118 - not a dict
    settings = started.select_settings
    defaults = {"dtype": "float32", "warmup_ratio": 0.0}  # for custom trainers that state neither
    settings = settings.model_copy(
        update={name: value for name, value in defaults.items() if name not in settings.model_fields_set}
    )
    provenance = build_provenance(trial, finished)
    alpha, _ = convert_scaling(settings.scaling, trial.lora_alpha, provenance.trained_rank)
    return Recipe(
        model=_resolve_name(started.model_name, UNKNOWN_MODEL),
        data=_resolve_name(started.data_name, UNKNOWN_DATA),
        form=started.data.form,
        shape=started.data.shape,
        columns=started.data.renamed,
        adapter=adapter,
        module_names=tuple(sorted(name.removeprefix("base_model.model.") for name in names)),
        learning_rate=provenance.learning_rate,
        max_steps=provenance.steps,
        warmup_steps=math.ceil(settings.warmup_ratio * provenance.steps),
        seed=trial.seed,
        provenance=provenance,
        trained_alpha=config["lora_alpha"] if provenance.trained_rank == config["r"] else alpha,
        settings=settings,
        num_held_out=0 if started.data.splits_given else _count_held_out(started),
        **_select_adapter_fields(config),
    )


def _count_held_out(started: RunStarted) -> int:
    """Count the rows in the splits that were not used for training."""
    if started.select_settings.validation:
        return sum(split.examples for name, split in started.data.splits.items() if name == "test")
    return sum(split.examples for name, split in started.data.splits.items() if name != "train")


def _select_adapter_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe's fields that PEFT's adapter configuration contains under the same names."""
    values = {named.name: config[named.name] for named in fields(Recipe) if config.get(named.name) is not None}
    for name in ("target_modules", "target_parameters"):
        values[name] = tuple(sorted(values.get(name, ())))
    if isinstance(values.get("layers_to_transform"), int):
        values["layers_to_transform"] = (values["layers_to_transform"],)
    return values


def _read_adapter_config(adapter: Path) -> dict[str, Any]:
    try:
        config = read_json_object(adapter / "adapter_config.json")
    except UnreadableError as error:
        raise RunFolderError(
            f"{adapter}: there is no PEFT adapter ({error}); finish the selection, then export"
        ) from None
    if config.get("target_parameters") and config.get("target_modules") is None:
        config["target_modules"] = []
    if config.get("peft_type") != "LORA" or not isinstance(config.get("target_modules"), list):
        raise RunFolderError(f"{adapter}: only LoRA adapters with a list of target_modules can be exported")
    return config


def _resolve_name(name: str | None, placeholder: str) -> str:
    return placeholder if name is None or "in memory" in name else name
