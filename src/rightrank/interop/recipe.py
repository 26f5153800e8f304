"""The result of a run in the terms of trainers and servers."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from rightrank.data.files import UnreadableError, read_json_object
from rightrank.decision.adapter import METHODS, Making, making_of
from rightrank.models.ranks import peft_scaling
from rightrank.schema.command import set_arguments
from rightrank.schema.errors import RunFolderError
from rightrank.schema.events import RunStarted
from rightrank.schema.settings import EVALUATION_SETTINGS, SelectSettings
from rightrank.schema.trials import TrialFinished

UNKNOWN_MODEL, UNKNOWN_DATA = "path/to/model", "path/to/data.jsonl"


@dataclass(frozen=True, slots=True)
class Recipe:
    """The adapter that was handed over and the training that it comes from, in the names of PEFT and transformers.

    `r`, `lora_alpha` and the patterns are the adapter's; `learning_rate`, `max_steps` and `seed` are the training's, and `settings` the run's.
    `module_names` are the full names of the adapted modules. `layers_to_transform` is None if every layer is adapted;
    `target_modules` is then enough to name them.
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
    settings: SelectSettings  # of the run
    making: Making
    trained_alpha: float  # PEFT's lora_alpha at the rank that was trained
    shape: str | None = None  # how rows of other columns became the form: see `data.forms`
    columns: Mapping[str, str] = field(default_factory=dict)  # a column of the form → its other name in the file
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
    held_out: int = 0  # rows of `data` that the training did not see
    served: Path | None = None  # the folder that a server loads, where it is another than `adapter`

    @property
    def unusual(self) -> dict[str, Any]:
        """What a trainer may lack a word for, in PEFT's and transformers' names; what is as by default is left out."""
        names = ("exclude_modules", "layers_to_transform", "modules_to_save", "rank_pattern", "alpha_pattern")
        given = {name: getattr(self, name) for name in names} | self.kind
        given |= {"init_lora_weights": self.init_lora_weights is not True and self.init_lora_weights}
        given |= {name: getattr(self.settings, name) for name in ("load_in_4bit", "load_in_8bit", "trust_remote_code")}
        return {name: value for name, value in given.items() if value}

    @property
    def kind(self) -> dict[str, Any]:
        """What makes the adapter another kind than plain LoRA, in PEFT's names; empty for plain LoRA."""
        given = {"use_dora": self.use_dora, "target_parameters": list(self.target_parameters)}
        given |= self.settings.peft_options
        return {name: value for name, value in given.items() if value}

    @property
    def has_patterns(self) -> bool:
        """Whether modules differ in rank, or in alpha."""
        return bool(self.rank_pattern or self.alpha_pattern)

    @property
    def alpha(self) -> int | float:
        """Alpha, as an integer if it is whole: most schemas require that."""
        return int(self.lora_alpha) if float(self.lora_alpha).is_integer() else self.lora_alpha

    @property
    def _is_made_smaller(self) -> bool:
        """Whether training alone does not give this adapter."""
        return self.making.truncation is not None

    def training(self) -> Recipe:
        """The recipe of the training that the adapter comes from."""
        init = self.settings.init_lora_weights
        recipe = self if init == "default" else replace(self, init_lora_weights=init)
        if not self._is_made_smaller and self.r == self.making.trained_rank:
            return recipe
        return replace(
            recipe, r=self.making.trained_rank, lora_alpha=self.trained_alpha, rank_pattern={}, alpha_pattern={}
        )

    def comments(self) -> list[str]:
        """How to make the adapter again, where training alone does not give it."""
        if not self._is_made_smaller:
            return []
        rank, data = str(self.making.rank), self.data
        rule = ["--data", data, "--train", data, "--ranks", rank, "--base", self.model]
        given = {name: value for name in EVALUATION_SETTINGS if (value := getattr(self.settings, name)) is not None}
        rule += set_arguments(given)
        rule = ["--rank", rank] if self.making.truncation == METHODS["svd"] else rule
        command = shlex.join(["rightrank", "resize", "TRAINED", "SMALLER", *rule])
        return [
            f"The adapter of rank {self.making.rank} was {self.making.sentence()}.",
            f"To make it again, train at rank {self.making.trained_rank}, then: {command}",
        ]

    @property
    def explicit_targets(self) -> list[str]:
        """Names that identify the adapted modules without `layers_to_transform` and `exclude_modules`."""
        is_whole = self.layers_to_transform is None and not self.exclude_modules
        return list(self.target_modules if is_whole else self.module_names)


def recipe_of(
    started: RunStarted, trial: TrialFinished, adapter: Path, finished: Sequence[TrialFinished] = ()
) -> Recipe:
    """The recipe of the chosen trial of a run.

    Args:
        finished: the trials of the run; among them the one that `trial` truncates, if it does.

    Raises:
        RunFolderError: the run has no PEFT adapter.
    """
    from safetensors import safe_open

    config = _adapter_config(adapter)
    with safe_open(adapter / "adapter_model.safetensors", framework="numpy") as file:  # its header names the modules
        names = {name.split(".lora_")[0] for name in file.keys() if ".lora_" in name}  # noqa: SIM118 - not a dict
    settings = started.select_settings
    unsaid = {"dtype": "float32", "warmup_ratio": 0.0}  # a trainer of one's own may state neither
    settings = settings.model_copy(
        update={name: value for name, value in unsaid.items() if name not in settings.model_fields_set}
    )
    making = making_of(trial, finished)
    alpha, _ = peft_scaling(settings.scaling, trial.lora_alpha, making.trained_rank)
    return Recipe(
        model=_named(started.model_name, UNKNOWN_MODEL),
        data=_named(started.data_name, UNKNOWN_DATA),
        form=started.data.form,
        shape=started.data.shape,
        columns=started.data.renamed,
        adapter=adapter,
        module_names=tuple(sorted(name.removeprefix("base_model.model.") for name in names)),
        learning_rate=making.learning_rate,
        max_steps=making.steps,
        warmup_steps=math.ceil(settings.warmup_ratio * making.steps),
        seed=trial.seed,
        making=making,
        trained_alpha=config["lora_alpha"] if making.trained_rank == config["r"] else alpha,
        settings=settings,
        held_out=0 if started.data.splits_given else _held_out(started),
        **_adapter_fields(config),
    )


def _held_out(started: RunStarted) -> int:
    """Rows of the data in the splits that no training saw."""
    if started.select_settings.validation:
        return sum(split.items for name, split in started.data.splits.items() if name == "test")
    return sum(split.items for name, split in started.data.splits.items() if name != "train")


def _adapter_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a recipe that PEFT's configuration of the adapter gives, in its names."""
    given = {named.name: config[named.name] for named in fields(Recipe) if config.get(named.name) is not None}
    for name in ("target_modules", "target_parameters"):
        given[name] = tuple(sorted(given.get(name, ())))
    if isinstance(given.get("layers_to_transform"), int):
        given["layers_to_transform"] = (given["layers_to_transform"],)
    return given


def _adapter_config(adapter: Path) -> dict[str, Any]:
    try:
        config = read_json_object(adapter / "adapter_config.json")
    except UnreadableError as error:
        raise RunFolderError(f"{adapter}: no PEFT adapter there ({error}); finish the selection, then export") from None
    if config.get("target_parameters") and config.get("target_modules") is None:
        config["target_modules"] = []
    if config.get("peft_type") != "LORA" or not isinstance(config.get("target_modules"), list):
        raise RunFolderError(f"{adapter}: only LoRA adapters with a list of target_modules can be exported")
    return config


def _named(name: str | None, otherwise: str) -> str:
    return otherwise if name is None or "in memory" in name else name
