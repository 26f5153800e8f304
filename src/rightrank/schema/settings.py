"""The settings of a selection: type, default, meaning, option, and whether a different value makes another run.

Names are those of PEFT, transformers and TRL if they have one. `SelectSettings` has the settings of `rightrank` itself, and
inherits those fields of `LoraConfig` and `TrainingArguments` that a selection passes on under their names.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BeforeValidator, ByteSize

from rightrank.schema.errors import MAX_EXACT_INTEGER, SettingsError
from rightrank.schema.metrics import (
    Checkpoint,
    Margin,
    MetricSpec,
    format_unknown_direction,
    infer_direction,
    parse_margin,
    parse_metrics,
)
from rightrank.schema.setting_table import Group, Settings, build_options, list_rows, option, setting
from rightrank.schema.trials import round_digits

COMPARE, DECIDE, BUDGET, ADAPTER, TRAINING, DATA, MACHINE = Group

DtypeName: TypeAlias = Literal["float32", "bfloat16", "float16"]
AutoDtype: TypeAlias = Literal["auto", "float32", "bfloat16", "float16"]
Scaling: TypeAlias = Literal["alpha/r", "alpha/sqrt(r)", "constant"]
Goal: TypeAlias = Literal["adapter", "best-adapter", "training-rank"]
LONGER_TRAININGS = 2  # the length of the second training of goal "best-adapter", in trainings

# `constant` scaling uses alpha too: its scale is that of alpha/r at this rank,
# so that alpha = 32 means s = 2 at every rank (the common choice "alpha = 2r").
CONSTANT_SCALING_RANK = 16
MAX_SEED = MAX_EXACT_INTEGER
MAX_STEPS = 1_000_000  # of a training; the order of its examples is drawn before it starts
MAX_ADAPTERS_PER_PASS = 16  # unless adapters_per_pass is given
EVAL_SUBSET_SIZE = 200  # held-out examples that an evaluation during training scores, a subset of those at its end
DEFAULT_MAX_EVAL_EXAMPLES = 2000  # default maximum for a held-out split
EVALUATION_SHARE = 0.1  # maximum share of a training's time for one evaluation at its end, by default
SCORED_PER_TRAINED = 3  # examples that are scored in the time of one training example
DTYPE_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


# Checks of values beyond their types.


def _list_columns(value: object) -> object:
    """Convert a mapping, such as `{"prompt": "ask", "ignore": ["id", "source"]}`, to entries; return any other value unchanged."""
    if not isinstance(value, Mapping):
        return value
    return [
        f"{name}={column}"
        for name, columns in value.items()
        for column in (columns if isinstance(columns, list | tuple) else [columns])
    ]


def _require_columns(entries: tuple[str, ...]) -> tuple[str, ...]:
    for entry in entries:
        name, equals, column = entry.partition("=")
        if not (name and equals and column):
            raise ValueError(f"columns: got {entry!r}; give NAME=COLUMN, such as prompt=question,completion=answer")
    return entries


def _require_distinct(
    is_allowed: Callable[[Any], bool], noun: str, allowed: str, values: tuple[Any, ...]
) -> tuple[Any, ...]:
    """Return the sorted values after checking that there is at least one, and that each is allowed and occurs once."""
    disallowed = next((value for value in values if not is_allowed(value)), None)
    if disallowed is not None:
        raise ValueError(f"{noun} {disallowed:g} is not allowed: {noun}s are {allowed}")
    if not values or len(set(values)) != len(values):
        raise ValueError(f"{noun.replace(' ', '_')}s: got {list(values)}; give at least one value, each of them once")
    return tuple(sorted(values))


def _require_learning_rates(rates: tuple[float, ...] | None) -> tuple[float, ...] | None:
    if rates is None:
        return None
    rounded = tuple(dict.fromkeys(map(round_digits, rates)))
    return _require_distinct(lambda rate: rate > 0, "learning rate", "numbers above 0, such as 1e-4", rounded)


def _require_device(device: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device):
        raise ValueError(f"device {device!r} is unknown; give auto, cpu, cuda, cuda:1 or mps")
    return device


# Fields of PEFT's LoraConfig without a setting of their own; they are passed on unchanged.
PEFT_OPTIONS = (
    *("lora_bias", "layers_pattern", "use_qalora", "qalora_group_size", "ensure_weight_tying", "fan_in_fan_out"),
)


def _require_peft_options(options: dict[str, Any]) -> dict[str, Any]:
    if not options.keys() <= {*PEFT_OPTIONS}:
        raise ValueError(f"peft_options: got {options!r}; give a mapping of {', '.join(PEFT_OPTIONS)}")
    return options


Ranks: TypeAlias = Annotated[
    tuple[int, ...],
    AfterValidator(
        partial(
            _require_distinct,
            lambda rank: rank >= 1,
            "rank",
            "integers from 1 (the base model, rank 0, is always evaluated)",
        )
    ),
]
LearningRates: TypeAlias = Annotated[tuple[float, ...] | None, AfterValidator(_require_learning_rates)]
Seeds: TypeAlias = Annotated[
    tuple[int, ...],
    AfterValidator(
        partial(_require_distinct, lambda seed: 0 <= seed <= MAX_SEED, "seed", f"integers from 0 to {MAX_SEED}")
    ),
]
Columns: TypeAlias = Annotated[tuple[str, ...], BeforeValidator(_list_columns), AfterValidator(_require_columns)]
Device: TypeAlias = Annotated[str, AfterValidator(_require_device)]
SettingMargin: TypeAlias = Annotated[Margin | None, BeforeValidator(parse_margin)]


class PeftFields(Settings):
    """Fields of PEFT's LoraConfig that the adapters of all ranks share."""

    lora_dropout: float = setting(0.0, ADAPTER, "dropout before A", foreign_names=("dropout",), ge=0, lt=1)
    target_modules: tuple[str, ...] = option(
        ("all-linear",),
        ADAPTER,
        "module names as PEFT matches them, or `all-linear`",
        foreign_names=("targets", "lora_target_modules"),
    )
    layers_to_transform: tuple[int, ...] | None = setting(
        None, ADAPTER, "layer numbers, such as 26,27; by default all", foreign_names=("layers",)
    )
    exclude_modules: tuple[str, ...] = setting((), ADAPTER, "module names to leave out")
    modules_to_save: tuple[str, ...] = setting(
        (), ADAPTER, "modules that are trained in full and saved with the adapter"
    )
    use_dora: bool = setting(
        False,
        ADAPTER,
        "DoRA, a trained magnitude for each row of a weight ([kinds of adapters](../how-to/adapter-kinds.md))",
    )
    target_parameters: tuple[str, ...] = setting(
        (), ADAPTER, "names of bare parameters as PEFT matches them, such as `mlp.experts.down_proj`"
    )
    init_lora_weights: Literal["default", "gaussian"] = setting(
        "default",
        ADAPTER,
        "`default` (PEFT's: uniform A, zero B) or `gaussian` ([initialization](../how-to/adapter-kinds.md#initialization))",
    )
    peft_options: Annotated[dict[str, Any], AfterValidator(_require_peft_options)] = setting(
        {}, ADAPTER, 'other fields of PEFT\'s `LoraConfig`, such as `{"lora_bias": true}`'
    )

    def build_lora_config(self) -> dict[str, Any]:
        """Return these fields as arguments of LoraConfig, without the parameters, whose names depend on the model."""
        return {
            "lora_dropout": self.lora_dropout,
            "exclude_modules": list(self.exclude_modules) or None,
            "modules_to_save": list(self.modules_to_save) or None,
            "use_dora": self.use_dora,
            **self.peft_options,
        }


class StepSettings(PeftFields):
    """Fields of a training step, which a selection and a plan share."""

    batch_size: int = option(
        8,
        TRAINING,
        "examples in a forward pass",
        foreign_names=("per_device_train_batch_size", "train_batch_size"),
        gt=0,
    )
    seq_len: int = option(
        512,
        TRAINING,
        "maximum length of an example in tokens",
        foreign_names=("max_length", "max_seq_length", "cutoff_len"),
        gt=1,
    )
    memory_bytes: ByteSize | None = setting(
        None,
        MACHINE,
        "memory budget, such as 24GiB, by default that of the CUDA device; ranks that need more are skipped",
        option="--memory",
        identity=False,
        foreign_names=("memory",),
        ge=2**20,  # 24 without a unit is 24 bytes
    )
    load_in_4bit: bool = option(
        False,
        MACHINE,
        "load the base model's matrices in 4 bits, with bitsandbytes (extra `bnb`)",
    )
    load_in_8bit: bool = setting(False, MACHINE, "load the base model's matrices in 8 bits")
    gradient_checkpointing: bool = setting(
        False, MACHINE, "recompute activations block by block", foreign_names=("activation_checkpointing",)
    )
    trust_remote_code: bool = setting(False, MACHINE, "run code that a model repository contains")

    def _require_consistent(self) -> None:
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit were both given: give one of them")
        super()._require_consistent()

    @property
    def weight_bits(self) -> int | None:
        """Return the bits of a quantized base model, or None if its weights have the type `dtype`."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else None

    def load_error_hint(self, default_hint: str) -> str:
        """Return a hint for an error while loading the base model: leave its quantization out, or `default_hint` without one."""
        if self.weight_bits is None:
            return default_hint
        name = f"load_in_{self.weight_bits}bit"
        return f"bitsandbytes may not support this base model in {self.weight_bits} bits on this device: leave {name} out, or choose another device"


class SelectSettings(StepSettings):
    """All settings of a selection other than MODEL, DATA and --out."""

    goal: Goal = option(
        "adapter",
        COMPARE,
        "`adapter`, `best-adapter` (also trains for twice the steps) or `training-rank` ([guide](../how-to/strategies.md))",
        identity=False,
    )
    strategy: str = option(
        "bracket",
        COMPARE,
        "what to train next: `bracket`, `grid` or `upward`",
        continuable=True,
    )
    ranks: Ranks = option(
        (1, 4, 16, 64),
        COMPARE,
        "ranks to compare, beside the base model (rank 0); the largest is trained first",
        continuable=True,
        foreign_names=("rank", "r", "lora_r", "lora_rank"),
    )
    learning_rates: LearningRates = option(
        None,
        COMPARE,
        "learning rates to compare, or one to use; by default [a walk](../how-to/strategies.md#how-the-learning-rate-is-found) from where models of this size usually have their best",
        continuable=True,
        foreign_names=("lr", "learning_rate"),
    )
    seeds: Seeds = option(
        (0,),
        COMPARE,
        "seeds of batch order, initial A and dropout",
        continuable=True,
        foreign_names=("seed",),
    )
    metric: str = option(
        "loss",
        DECIDE,
        "the deciding metric: `loss`, `accuracy`, `f1`, `rougeL`, … or a function ([metrics](../how-to/metrics.md))",
    )
    margin: SettingMargin = option(
        None,
        DECIDE,
        "the loss of quality that you accept: a share of the gain such as `2%` (default `1%`), or a number in the metric's unit",
        continuable=True,
    )
    checkpoint: Checkpoint = setting(
        "best",
        DECIDE,
        "which evaluation of a training is kept: `last`, or `best` of the factors and of their mean since the warm-up",
        foreign_names=("load_best_model_at_end",),
    )
    metrics: tuple[str, ...] = setting((), DECIDE, "additional metrics to measure, such as exact_match,rougeL")
    max_new_tokens: int = setting(64, DECIDE, "maximum length of an answer, in tokens", gt=0)

    budget_trainings: float | None = setting(
        None,
        BUDGET,
        "maximum number of trainings; one that stops early counts as a fraction",
        continuable=True,
        gt=0,
    )
    budget_hours: float | None = setting(
        None,
        BUDGET,
        "time for training and evaluation, such as 3h or 90min; as a setting, a number of hours",
        option="--time",
        continuable=True,
        foreign_names=("time", "time_budget", "budget"),
        gt=0,
    )

    lora_alpha: float = option(
        32.0,
        ADAPTER,
        "alpha, the same at every rank",
        foreign_names=("alpha",),
        gt=0,
    )
    scaling: Scaling = setting(
        "alpha/r",
        ADAPTER,
        "`alpha/r`, `alpha/sqrt(r)` (rsLoRA) or `constant` (the scale of alpha/r at rank 16)",
        foreign_names=("use_rslora",),
    )
    gradient_accumulation_steps: int = setting(1, TRAINING, "forward passes in an optimizer step", gt=0)
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = setting(
        "linear", TRAINING, "`constant`, `linear` or `cosine`, as in transformers"
    )
    warmup_ratio: float = setting(0.05, TRAINING, "share of the steps that warm up", ge=0, lt=1)
    weight_decay: float = setting(0.0, TRAINING, "of AdamW", ge=0)
    max_grad_norm: float = setting(1.0, TRAINING, "gradient clipping; 0 turns it off", ge=0)
    max_steps: int | None = option(
        None,
        TRAINING,
        "optimizer steps of each training; by default one epoch",
        foreign_names=("steps", "max_iters"),
        gt=0,
    )
    num_train_epochs: float | None = option(
        None,
        TRAINING,
        "passes over the data, in place of `max_steps`",
        foreign_names=("epochs", "num_epochs"),
        gt=0,
    )
    beta: float = setting(
        0.1,
        TRAINING,
        "penalty on the distance from the base model, for [preference pairs](../how-to/preference-pairs.md)",
        gt=0,
    )

    columns: Columns = option(
        (),
        DATA,
        "columns with other names, such as prompt=question; `ignore=source` ignores a column; `group=document` names the column of "
        "[groups](file-formats.md#rows-that-belong-together)",
    )
    data_config: str = option("", DATA, "configuration of a data set on the hub")
    validation: str = option(
        "", DATA, "file or folder of the validation split; by default a tenth of the data"
    )  # fmt: skip
    test_fraction: float = setting(0.1, DATA, "share of the examples in the test split; 0 for none", ge=0, lt=1)
    validation_fraction: float = setting(0.1, DATA, "share of the examples in the validation split", gt=0, lt=1)
    max_eval_examples: int | None = option(
        None,
        DATA,
        "maximum number of examples of a held-out split; by default 200 to 2,000 by the length of the training, 200 for written "
        "answers. Evaluations during training score the first 200",
        gt=1,
    )
    num_evaluations: int = setting(4, DATA, "held-out evaluations of a training, with the one at its end", gt=0)
    dtype: AutoDtype = setting(
        "auto",
        MACHINE,
        "type of the base model: `auto` (bfloat16 on a CUDA device that supports it, else float32), `bf16`, `fp16` or `fp32`",
        foreign_names=("bf16", "fp16", "torch_dtype"),
        aliases=DTYPE_ALIASES,
    )
    device: Device = option(
        "auto",
        MACHINE,
        "`auto`, `cpu`, `cuda`, `cuda:1` or `mps`",
    )
    adapters_per_pass: int | None = setting(
        None,
        MACHINE,
        "adapters trained in one pass over the base model ([multi-LoRA](../explanation/engine.md)); by default "
        "as many as fit into memory (at most 16), 1 on a CPU",
        identity=False,
        foreign_names=("arms",),
        gt=0,
    )
    workers: int | None = option(
        None,
        MACHINE,
        "train in this many processes, each with a device ([guide](../how-to/clusters.md))",
        identity=False,
        foreign_names=("gpus", "num_workers"),
        gt=0,
    )
    ray: str | None = option(
        None, MACHINE, "train on the Ray cluster at this address, such as HOST:6379", identity=False
    )
    report_to: tuple[str, ...] = option(
        (),
        MACHINE,
        "trackers: trackio, wandb, mlflow ([guide](../how-to/tracking.md))",
        identity=False,
    )

    def _require_consistent(self) -> None:
        if self.max_steps is not None and self.num_train_epochs is not None:
            raise ValueError("max_steps and num_train_epochs were both given: give one of them")
        if self.test_fraction + self.validation_fraction >= 0.9:
            raise ValueError(
                "test_fraction + validation_fraction leave less than a tenth of the examples for training: "
                f"got {self.test_fraction:g} + {self.validation_fraction:g}, give less than 0.9 together"
            )
        super()._require_consistent()
        for spec in self.metric_specs:
            self.is_higher_better(spec.name)

    def is_higher_better(self, name: str) -> bool:
        """Return the direction of a metric, from the settings or else from its name.

        Raises:
            ValueError: the direction is unknown; the message says what to give.
        """
        higher = self.get_direction(name)
        if higher is None:
            specs = zip(self.metric_specs, (self.metric, *self.metrics), strict=True)
            text = next((text for spec, text in specs if spec.name == name), name)
            raise ValueError(f"{format_unknown_direction(name)}; give max:{text} or min:{text}")
        return higher

    def get_direction(self, name: str) -> bool | None:
        """Return the direction of a metric, or None if it is unknown."""
        explicit = next((spec.higher_is_better for spec in self.metric_specs if spec.name == name), None)
        return infer_direction(name) if explicit is None else explicit

    @property
    def has_workers(self) -> bool:
        """Return whether other processes train."""
        return self.workers is not None or self.ray is not None

    @property
    def group(self) -> str:
        """Return the column that defines groups of rows, or an empty text if `columns` has none."""
        return dict(entry.split("=", 1) for entry in self.columns).get("group", "")

    @property
    def metric_specs(self) -> tuple[MetricSpec, ...]:
        """Return the metrics; the first one decides."""
        return parse_metrics(self.metric, *self.metrics)

    @property
    def metric_name(self) -> str:
        return self.metric_specs[0].name

    @property
    def points_metric(self) -> str:
        """Return the metric of evaluations during training: the deciding metric if they compute it, else the loss."""
        spec = self.metric_specs[0]
        return spec.name if spec.is_eval_metric else "loss"

    @property
    def eval_batch_size(self) -> int:
        """Return the number of examples in a forward pass of an evaluation, which needs no memory for gradients."""
        return 2 * self.batch_size

    @property
    def examples_per_step(self) -> int:
        return self.batch_size * self.gradient_accumulation_steps

    def compute_max_eval_examples(self, train_examples: int) -> int:
        """Return the maximum number of examples of a held-out split.

        This is `max_eval_examples`, or a number that depends on the length of the training and on the metrics.
        """
        if self.max_eval_examples is not None:
            return self.max_eval_examples
        if any(not spec.is_eval_metric for spec in self.metric_specs):
            return EVAL_SUBSET_SIZE
        trained = self.count_training_steps(train_examples) * self.examples_per_step
        return min(
            DEFAULT_MAX_EVAL_EXAMPLES, max(EVAL_SUBSET_SIZE, round(EVALUATION_SHARE * SCORED_PER_TRAINED * trained))
        )

    def count_training_steps(self, train_examples: int) -> int:
        """Return the optimizer steps of every arm: `max_steps`, or `num_train_epochs` (1 by default) passes over the data."""
        steps = self.max_steps or max(
            1, round((self.num_train_epochs or 1.0) * train_examples / self.examples_per_step)
        )
        if steps > MAX_STEPS:
            name = "num_train_epochs" if self.max_steps is None else "max_steps"
            raise SettingsError(
                f"{name}: {steps:,} steps of {self.examples_per_step} examples; give at most {MAX_STEPS:,} steps"
            )
        return steps


OptimizerName: TypeAlias = Literal["adamw", "adamw_fused", "adamw_8bit"]
TRANSFORMERS_NAMES = {"adamw_torch": "adamw", "adamw_torch_fused": "adamw_fused", "adamw_bnb_8bit": "adamw_8bit"}

DEFAULT_PLAN_RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class PlanSettings(StepSettings):
    """All settings of `plan` other than MODEL."""

    ranks: Ranks = option(
        DEFAULT_PLAN_RANKS,
        COMPARE,
        "ranks, such as 8,16; by default powers of two, 1 to 512",
        foreign_names=("rank", "r", "lora_r", "lora_rank"),
    )

    # the step
    optim: OptimizerName = setting(
        "adamw",
        TRAINING,
        "`adamw`, `adamw_fused` or `adamw_8bit`",
        foreign_names=("optimizer",),
        aliases=TRANSFORMERS_NAMES,
    )
    loss: Literal["full", "chunked"] = setting(
        "full",
        TRAINING,
        "`full`, as Trainer, or `chunked`, as `rightrank select`",
    )
    adapters_per_pass: int = setting(
        1, TRAINING, "adapters trained in one pass over the frozen base", foreign_names=("arms",), gt=0
    )
    padding: bool = setting(False, TRAINING, "rows of unequal length, so that attention is given a mask")
    attn_implementation: Literal["sdpa", "eager"] = setting("sdpa", TRAINING, "as in transformers")
    packed: bool = setting(
        False,
        TRAINING,
        "adapted layers run as `rightrank select` runs them; always so for more than one adapter in a pass",
    )
    num_labels: int | None = setting(None, TRAINING, "a classification head of so many labels", gt=1, le=2**20)
    eval_batch_size: int | None = setting(None, DATA, "examples in a forward pass of an evaluation", gt=0)

    # the device and the budget
    dtype: DtypeName = setting(
        "bfloat16",
        MACHINE,
        "the frozen weights' type: `bf16`, `fp16` or `fp32`",
        foreign_names=("bf16", "fp16", "torch_dtype"),
        aliases=DTYPE_ALIASES,
    )
    device: Literal["cuda", "cpu"] = setting("cuda", MACHINE, "kernels and allocator of `cuda` or `cpu`")

    def _require_consistent(self) -> None:
        super()._require_consistent()
        if self.adapters_per_pass > 1 and (self.use_dora or self.target_parameters or self.peft_options):
            raise ValueError(
                "several adapters in a pass are for plain LoRA on modules, other adapters train alone: leave out use_dora and target_parameters"
            )
        if self.num_labels is not None and self.loss == "chunked":
            raise ValueError("a classification (num_labels) has no logits to take in pieces: give loss 'full'")

    @property
    def is_packed(self) -> bool:
        return self.packed or self.adapters_per_pass > 1


# Settings of a step that mean the same in a selection.
STEP_OF_SELECT = tuple(
    name for name in PlanSettings.model_fields if name in SelectSettings.model_fields and name != "adapters_per_pass"
)

# Settings that determine the rows of each split.
SPLIT_SETTINGS = ("columns", "data_config", "validation", "test_fraction", "validation_fraction", "max_eval_examples")
# Settings with which few rows are enough, and no rows are split off.
NO_SPLIT_OVERRIDES = {"batch_size": 1, "gradient_accumulation_steps": 1, "test_fraction": 0.0, "validation": ""}
# Settings that select and judge trials without changing one; a run folder may be continued with other values.
CONTINUABLE_SETTINGS = tuple(name for name, row in list_rows(SelectSettings).items() if row.continuable)


def select_identity_settings(values: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings among `values` (JSON) that determine the trials of a selection.

    A setting that changes no trial has its stored value, so that trials keep their identity. Two spellings of one path, such as
    `model` and `./model`, are the same.
    """
    rows = list_rows(SelectSettings)
    identity_values = {name: stored[name] for name in CONTINUABLE_SETTINGS if name in stored}
    for name in ("model", "data", "validation"):
        path, stored_path = values.get(name), stored.get(name)
        if isinstance(path, str) and isinstance(stored_path, str) and Path(path).exists():
            identity_values[name] = stored_path if Path(path).resolve() == Path(stored_path).resolve() else path
    return {
        name: value for name, value in {**values, **identity_values}.items() if name not in rows or rows[name].identity
    }


def build_reproduce_command(
    model: str | None, data: str | None, settings: SelectSettings, out: str = "run"
) -> str | None:
    """Return the command that repeats a run in the folder `out`, or None if it used a custom trainer, or a model or data in memory."""
    if model is None or data is None or "in memory" in (model + data):
        return None
    values = {name: getattr(settings, name) for name in list_rows(SelectSettings)}
    defaults = {name: field.default for name, field in SelectSettings.model_fields.items()}
    changed = {name: value for name, value in values.items() if value is not None and value != defaults[name]}
    return shlex.join(["rightrank", "select", model, data, "--out", out, *build_options(SelectSettings, changed)])


def build_resume_command(run: str) -> str:
    """Return the command that continues a selection with the settings that it began with."""
    return shlex.join(["rightrank", "select", "--out", run])


def build_budget_options(settings: SelectSettings, trainings: float) -> list[str]:
    """Return options that add a number of trainings to the budget and double its time; empty without a budget."""
    budgets = {
        "budget_trainings": settings.budget_trainings and settings.budget_trainings + trainings,
        "budget_hours": settings.budget_hours and float(f"{2 * settings.budget_hours:.3g}"),
    }
    return build_options(SelectSettings, {name: budget for name, budget in budgets.items() if budget})
