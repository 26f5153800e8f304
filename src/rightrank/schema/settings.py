"""The settings of a selection: one flat record, validated once, stored whole in the run folder.

Names are those of PEFT, transformers and TRL where they have one.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypedDict, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from rightrank.schema.errors import SettingsError, did_you_mean
from rightrank.schema.metrics import MetricSpec, direction, parse_metrics, unknown_direction
from rightrank.schema.peft_options import HABITS, gathered_options
from rightrank.schema.trials import MAX_WHOLE

AnySettings = TypeVar("AnySettings", bound=BaseModel)
FileFormat: TypeAlias = Literal["kohya", "diffusers"]  # of LoRA files
DtypeName: TypeAlias = Literal["float32", "bfloat16", "float16"]
DTYPE_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def _dtype(name: object) -> object:
    return DTYPE_ALIASES.get(name, name) if isinstance(name, str) else name


ChosenDtype: TypeAlias = Annotated[DtypeName, BeforeValidator(_dtype)]
# auto: bfloat16 on a CUDA device that computes in it, else float32
AutoDtype: TypeAlias = Annotated[Literal["auto", "float32", "bfloat16", "float16"], BeforeValidator(_dtype)]

OPTIMIZER_ALIASES = {  # transformers' further names of the two
    "adamw": "adamw_torch",
    "adamw_fused": "adamw_torch",
    "adamw_torch_fused": "adamw_torch",
    "adamw_bnb_8bit": "adamw_8bit",
}


def _optimizer(name: object) -> object:
    return OPTIMIZER_ALIASES.get(name, name) if isinstance(name, str) else name


Optim: TypeAlias = Annotated[Literal["adamw_torch", "adamw_8bit"], BeforeValidator(_optimizer)]

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
MAX_BYTES = MAX_WHOLE
NEAREST_NAMES = 3  # that answer an unknown setting


def parse_bytes(text: str) -> int:
    """`24GiB` as bytes.

    Raises:
        SettingsError: no number, no unit, or an unknown unit.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    units = {name.lower(): size for name, size in UNITS.items()}
    if match is None or match[2].lower() not in units:
        known = ", ".join(UNITS)
        reason = "has no unit" if match is not None and not match[2] else "is not a size"
        raise SettingsError(f"memory {text!r} {reason}: give a number and one of {known}, such as 24GiB")
    amount = float(match[1]) * units[match[2].lower()]
    if amount > MAX_BYTES:
        raise SettingsError(f"memory {text!r} is too large: give at most {MAX_BYTES // 2**50} PiB")
    size = round(amount)
    if size == 0:
        raise SettingsError(f"memory {text!r} is zero: give a size above 0, such as 24GiB")
    return size


def _bytes(memory: object) -> object:
    return parse_bytes(memory) if isinstance(memory, str) else memory


MemoryBytes: TypeAlias = Annotated[int, BeforeValidator(_bytes), Field(gt=0)]  # a number, or with a unit


def checked(kind: type[AnySettings], values: Mapping[str, object]) -> AnySettings:
    """Settings of a kind from plain values.

    Raises:
        SettingsError: an unknown name (with the nearest known one) or a value that is not allowed.
    """
    unknown = [name for name in values if name not in kind.model_fields]
    if unknown:
        meant = HABITS.get(unknown[0], "")
        near = (
            f" (did you mean {meant!r}?)" if meant in kind.model_fields else did_you_mean(unknown[0], kind.model_fields)
        )
        nearest = ", ".join(get_close_matches(unknown[0], kind.model_fields, n=NEAREST_NAMES, cutoff=0.0))
        raise SettingsError(f"unknown setting {unknown[0]!r}{near or '; the nearest: ' + nearest}")
    try:
        settings = kind.model_validate(dict(values))
    except ValidationError as error:
        raise SettingsError(_first_line(error)) from None
    for name in kind.model_fields:
        _exact(name, getattr(settings, name))
    return settings


def _exact(name: str, value: object) -> None:
    if isinstance(value, list | tuple):
        for inner in value:
            _exact(name, inner)
    if isinstance(value, int) and abs(value) > MAX_WHOLE:
        raise SettingsError(f"{name}: got {_QUOTED.repr(value)}; whole numbers are at most 2**53 ({MAX_WHOLE})")


_QUOTED = reprlib.Repr()
_QUOTED.maxstring = _QUOTED.maxother = 120  # what is longer, or nested, is shortened: never written out whole


def _first_line(error: ValidationError) -> str:
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ").partition(", unable to parse")[0]
    if first["type"] == "value_error":
        return message
    where = str(first["loc"][0]) if first["loc"] else "settings"
    return f"{where}: got {_QUOTED.repr(first['input'])}; {message[0].lower()}{message[1:]}"


Scaling: TypeAlias = Literal["alpha/r", "alpha/sqrt(r)", "constant"]
Goal: TypeAlias = Literal["adapter", "training-rank"]

# `constant` scaling is stated through alpha too: it is the scale that alpha/r has at this rank,
# so that alpha = 32 means s = 2 at every rank (the common "alpha = 2r" habit).
CONSTANT_SCALING_RANK = 16
MAX_SEED = 2**53
DEVICE_HABITS = {"gpu": "cuda"}
PAIR_MARGIN = 0.02  # nats a preference pair: about the noise over seeds between ranks (benchmarks/preference)
LISTS = (  # settings that take one value as well as several
    "ranks", "learning_rates", "seeds", "target_modules", "exclude_modules", "layers_to_transform", "modules_to_save",
    "target_parameters", "report_to", "columns",
)  # fmt: skip


class SelectSettings(BaseModel):
    """All settings of a selection besides MODEL, DATA and --out."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    goal: Goal = "training-rank"  # "adapter" stops once the smallest adapter of the top training is known

    # what to compare
    strategy: str = "bracket"
    ranks: tuple[int, ...] = (1, 4, 16, 64)
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    seeds: tuple[int, ...] = (0,)

    # the budget: the tightest applies, and a strategy stops within it
    budget_trainings: float | None = Field(default=None, gt=0)  # whole trainings
    budget_steps: int | None = Field(default=None, gt=0)  # optimizer steps over all trainings
    budget_hours: float | None = Field(default=None, gt=0)  # of training and evaluation
    # add ranks while the answer is rising, learning rates at an edge; None: with budget_hours
    extend: bool | None = None
    sweep: tuple[str, ...] = ()  # such as alpha=16,64: further values, tried at the chosen rank and at the reference

    # how to decide
    metric: str = "loss"  # see metric_spec
    margin: float | None = Field(default=None, gt=0)  # None for the metric's default (decision.metrics)
    metrics: tuple[str, ...] = ()  # further metrics, measured and reported; they don't decide
    higher_is_better: tuple[str, ...] = ()  # metrics whose direction is not known from their name
    lower_is_better: tuple[str, ...] = ()
    # when the model generates: after each training, or at every evaluation
    answers_at: Literal["end", "points"] = "end"
    max_new_tokens: int = Field(default=64, gt=0)  # that the model generates for one example
    metric_timeout_seconds: float = Field(default=600.0, gt=0)  # for a function or program that computes a metric

    # what must not get worse
    guard: tuple[str, ...] = ()  # files or folders whose loss must not be worse than the base's
    # nats; None: 0.02 per token, for classes 1% of the base's loss
    guard_margin: float | None = Field(default=None, gt=0)

    # the adapter, in PEFT's names
    lora_alpha: float = Field(default=32.0, gt=0)
    scaling: Scaling = "alpha/r"
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    init_lora_weights: Literal["default", "gaussian"] = "default"
    target_modules: tuple[str, ...] = ("all-linear",)
    exclude_modules: tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] | None = None
    modules_to_save: tuple[str, ...] = ()
    bias: Literal["none", "all", "lora_only"] = "none"
    use_dora: bool = False
    target_parameters: tuple[str, ...] = ()  # names of bare parameters, such as fused experts
    divide_rank_by_experts: bool = False  # the rank of an expert is that of the arm divided by the number of experts
    peft_options: dict[str, Any] = Field(default={})  # further fields of LoraConfig (settings.peft_options)

    # the training, in transformers' names where they have one
    max_steps: int | None = Field(default=None, gt=0)
    num_train_epochs: float | None = Field(default=None, gt=0)
    batch_size: int = Field(default=8, gt=0)
    gradient_accumulation_steps: int = Field(default=1, gt=0)
    seq_len: int = Field(default=512, gt=1)
    train_sampling_strategy: Literal["random", "group_by_length"] = "random"
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "linear"
    warmup_ratio: float = Field(default=0.05, ge=0, lt=1)
    optim: Optim = "adamw_torch"  # or adamw_8bit: states in 8 bits, through bitsandbytes
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, ge=0)  # 0 turns clipping off
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    adam_epsilon: float = Field(default=1e-8, gt=0)
    beta: float = Field(default=0.1, gt=0)  # of preference pairs: how strongly a step away from the base counts
    loraplus_lr_ratio: float | None = Field(default=None, ge=1)  # LoRA+: the learning rate of B over that of A
    divergence_factor: float = Field(default=2.0, gt=1)  # diverged above this times the base's loss

    # the data
    columns: tuple[str, ...] = ()  # NAME=COLUMN for columns of other names, such as prompt=question
    validation: str = ""  # a file or folder whose rows are the validation split
    test_fraction: float = Field(default=0.1, ge=0, lt=1)  # 0 for no test split
    validation_fraction: float = Field(default=0.1, gt=0, lt=1)
    long_items: Literal["truncate", "split"] = "truncate"
    eval_items: int = Field(default=200, gt=1)  # at most, on the validation and on the test split
    eval_points: int = Field(default=4, gt=0)  # held-out evaluations during a training, the one at its end included
    eval_batch_size: int = Field(default=16, gt=0)
    samples: int = Field(default=1, ge=0)  # test examples to generate for, before and after, if examples have a prompt

    # where and how it runs
    dtype: AutoDtype = "auto"
    device: str = "auto"
    memory_bytes: MemoryBytes | None = None  # the budget; None for that of the CUDA device, else unlimited
    load_in_4bit: bool = False  # the base's matrices in 4 bits (NF4); adapters and optimizer stay in float32
    load_in_8bit: bool = False  # the base's matrices in 8 bits
    shard_base: bool = False  # each of several processes holds a share of the base's blocks (FSDP)
    gradient_checkpointing: bool = False
    cache_prefix: bool = True  # compute the frozen layers below the adapters once per example
    # arms trained in one pass; None for as many as pay and fit
    adapters_per_pass: int | None = Field(default=None, gt=0)
    certify: bool = False  # train one arm again alone and compare
    checkpoint_seconds: float = Field(default=60.0, gt=0)
    executor: Literal["local", "processes", "ray"] = "local"  # this process, or workers that each load the base
    workers: int | None = Field(default=None, gt=0)  # None for one per CUDA device, on Ray for as many as fit
    devices_per_arm: int = Field(default=1, gt=0)  # processes that share each batch of an arm, one per CUDA device
    ray_address: str | None = None  # None for a cluster on this machine, else a new one for this run
    launcher: str = ""  # words before the command of a worker process, such as "srun --ntasks=1 --gpus=1"
    store: str = ""  # fsspec address for the workers' files if machines share no disk: "s3://bucket/runs"
    hang_seconds: float = Field(default=600.0, gt=0)  # without a step, after which a worker counts as lost
    trust_remote_code: bool = False
    report_to: tuple[str, ...] = ()  # trackers that log every trial: trackio, wandb, mlflow, tensorboard

    @field_validator("guard", "metrics", "higher_is_better", "lower_is_better", "sweep", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("columns", mode="before")
    @classmethod
    def _columns_of_a_mapping(cls, value: object) -> object:
        return [f"{name}={column}" for name, column in value.items()] if isinstance(value, Mapping) else value

    @field_validator(*LISTS, mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        """One value, or a string with commas between, as a list: `learning_rates=1e-3`, `target_modules="all-linear"`."""
        if isinstance(value, str):
            return [part.strip() for part in value.split(",") if part.strip()]
        return (value,) if isinstance(value, int | float) and not isinstance(value, bool) else value

    @field_validator("columns")
    @classmethod
    def _columns_named(cls, columns: tuple[str, ...]) -> tuple[str, ...]:
        for entry in columns:
            name, equals, column = entry.partition("=")
            if not (name and equals and column):
                raise ValueError(f"columns: got {entry!r}; give NAME=COLUMN, such as prompt=question,completion=answer")
        return columns

    @field_validator("ranks")
    @classmethod
    def _ranks_positive(cls, ranks: tuple[int, ...]) -> tuple[int, ...]:
        for rank in ranks:
            if rank < 1:
                raise ValueError(
                    f"rank {rank} is not allowed: ranks are integers from 1 (the base, rank 0, is always measured)"
                )
        return _distinct(ranks, "ranks")

    @field_validator("learning_rates")
    @classmethod
    def _learning_rates_positive(cls, learning_rates: tuple[float, ...]) -> tuple[float, ...]:
        for learning_rate in learning_rates:
            if learning_rate <= 0:
                raise ValueError(
                    f"learning rate {learning_rate:g} is not allowed: learning rates are numbers above 0, such as 1e-4"
                )
        return _distinct(learning_rates, "learning_rates")

    @field_validator("device")
    @classmethod
    def _device_named(cls, device: str) -> str:
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device):
            near = did_you_mean(DEVICE_HABITS.get(device, device), ("auto", "cpu", "cuda", "mps"))
            raise ValueError(f"device {device!r} is not known{near}; give auto, cpu, cuda, cuda:1 or mps")
        return device

    @field_validator("store")
    @classmethod
    def _store_reached_by_all(cls, store: str) -> str:
        scheme, colon, rest = store.partition("://")
        if store and (not colon or not rest or scheme == "memory"):
            raise ValueError(
                f"{store!r} is not an address that several machines can reach: give one such as s3://bucket/runs or file:///mnt/share"
            )
        if re.match(r"[^/]*:[^/]*@", rest) or "?" in rest or "::" in store:
            raise ValueError(
                "an address with credentials, options or chained protocols is refused, because it would be stored: "
                "give SCHEME://PLACE, and credentials through the environment"
            )
        return store

    @field_validator("seeds")
    @classmethod
    def _seeds_natural(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        for seed in seeds:
            if not 0 <= seed <= MAX_SEED:
                raise ValueError(f"seed {seed} is not allowed: seeds are integers from 0 to {MAX_SEED}")
        return _distinct(seeds, "seeds")

    @model_validator(mode="after")
    def _one_length(self) -> SelectSettings:
        if self.max_steps is not None and self.num_train_epochs is not None:
            raise ValueError("max_steps and num_train_epochs were both given: give one of them")
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit were both given: give one of them")
        if self.test_fraction + self.validation_fraction >= 0.9:
            raise ValueError(
                "test_fraction + validation_fraction leave less than a tenth of the examples for training: "
                f"got {self.test_fraction:g} + {self.validation_fraction:g}, give less than 0.9 together"
            )
        return self

    @model_validator(mode="after")
    def _workers_of_an_executor(self) -> SelectSettings:
        for name, given, executors in (
            ("workers", self.workers, ("processes", "ray")),
            ("ray_address", self.ray_address, ("ray",)),
            ("launcher", self.launcher, ("processes",)),
            ("store", self.store, ("processes", "ray")),
        ):
            if given and self.executor not in executors:
                raise ValueError(
                    f"{name} was given and the executor is {self.executor!r}: give executor {' or '.join(executors)}"
                )
        if self.devices_per_arm > 1 and self.executor == "local":
            raise ValueError(
                f"devices_per_arm {self.devices_per_arm} needs executor processes or ray: give one of them"
            )
        if self.devices_per_arm > 1 and self.launcher:
            raise ValueError(
                "devices_per_arm and launcher were both given: the processes of an arm run on this machine; leave one of them out"
            )
        if self.devices_per_arm > self.batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} can't be split over devices_per_arm {self.devices_per_arm}: "
                "give a batch_size at least as large, or fewer devices"
            )
        return self

    @model_validator(mode="after")
    def _metrics_known(self) -> SelectSettings:
        names = [spec.name for spec in parse_metrics(self.metric, self.metrics)]
        for setting, given in (("higher_is_better", self.higher_is_better), ("lower_is_better", self.lower_is_better)):
            unknown = next((name for name in given if name not in names), None)
            if unknown is not None:
                raise ValueError(f"{setting}: {unknown!r} is not one of the metrics ({', '.join(names)})")
        both = next((name for name in self.higher_is_better if name in self.lower_is_better), None)
        if both is not None:
            raise ValueError(f"{both!r} is in higher_is_better and in lower_is_better: give it once")
        for name in names:
            self.is_higher_better(name)
        return self

    def is_higher_better(self, name: str) -> bool:
        """The direction of one of the metrics: as given, else as its name or, for `evaluate` and `lm-eval`, its key says.

        Raises:
            ValueError: it is not known; the message says what to give.
        """
        if name in self.higher_is_better or name in self.lower_is_better:
            return name in self.higher_is_better
        spec = next((spec for spec in self.metric_specs if spec.name == name), None)
        key = spec.key or (spec.target if spec.kind == "evaluate" else "") if spec is not None else ""
        found = direction(name)
        found = direction(key) if found is None and key else found
        if found is None:
            raise ValueError(
                f"{unknown_direction(name)}; give --higher-is-better {name} or --lower-is-better {name} (settings "
                "higher_is_better and lower_is_better)"
            )
        return found

    def of_form(self, form: str) -> SelectSettings:
        """These settings with the margin that the loss of preference pairs has by default; unchanged for other data."""
        if form != "preference" or self.margin is not None or self.metric_name != "loss":
            return self
        return self.model_copy(update={"margin": PAIR_MARGIN})

    @property
    def metric_specs(self) -> tuple[MetricSpec, ...]:
        """The metric that decides, then the others."""
        return parse_metrics(self.metric, self.metrics)

    @property
    def metric_name(self) -> str:
        return self.metric_specs[0].name

    @property
    def points_metric(self) -> str:
        """The metric of the evaluations during a training: the one that decides if it is measured there, else the loss."""
        spec = self.metric_specs[0]
        return spec.name if spec.is_measured_along or self.answers_at == "points" else "loss"

    @property
    def weight_bits(self) -> int | None:
        """The bits of a quantised base; None for a base in `dtype`."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else None

    @property
    def extends(self) -> bool:
        """Whether ranks and learning rates are added while the answer asks for them."""
        return self.budget_hours is not None if self.extend is None else self.extend

    @property
    def items_per_step(self) -> int:
        return self.batch_size * self.gradient_accumulation_steps

    def training_steps(self, train_examples: int) -> int:
        """Optimizer steps of every arm: `max_steps`, or `num_train_epochs` (1 by default) passes over the data."""
        if self.max_steps is not None:
            return self.max_steps
        return max(1, round((self.num_train_epochs or 1.0) * train_examples / self.items_per_step))


def _distinct(values: tuple[Any, ...], name: str) -> tuple[Any, ...]:
    if not values:
        raise ValueError(f"{name} is empty: give at least one")
    if len(set(values)) != len(values):
        raise ValueError(f"{name} repeats a value: got {list(values)}, give each once")
    return tuple(sorted(values))


def make_settings(values: Mapping[str, object]) -> SelectSettings:
    """Settings from plain values.

    Raises:
        SettingsError: an unknown name (with the nearest known one) or a value that is not allowed.
    """
    return checked(SelectSettings, gathered_options(values))


# Where trainings run.
PLACEMENT = (
    "executor", "workers", "devices_per_arm", "ray_address", "launcher", "store", "adapters_per_pass", "hang_seconds",
)  # fmt: skip
# Settings that change how a selection runs and not what it finds: they may differ when a run is resumed.
NOT_IDENTITY = (
    *PLACEMENT, "goal", "extend", "guard", "guard_margin", "certify", "checkpoint_seconds", "memory_bytes",
    "metric_timeout_seconds", "report_to", "shard_base",
)  # fmt: skip
# Settings that choose trials and judge them, and change no trial: a run folder may be continued with other values.
CONTINUABLE = (
    "margin", "ranks", "learning_rates", "seeds", "strategy", "sweep", "eval_items", "budget_trainings", "budget_steps",
    "budget_hours",
)  # fmt: skip


def with_identity_of(values: Mapping[str, Any], begun: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with those of the begun run where a difference makes no other run: the same trials keep their identity.

    Two spellings of one path, such as `model` and `./model`, are the same.
    """
    kept = {name: begun[name] for name in CONTINUABLE if name in begun}
    for name in ("model", "data", "validation"):
        if name in begun and _is_same_place(values.get(name), begun[name]):
            kept[name] = begun[name]
    return {**values, **kept}


def _is_same_place(one: object, other: object) -> bool:
    if not isinstance(one, str) or not isinstance(other, str):
        return False
    return Path(one).exists() and Path(one).resolve() == Path(other).resolve()


def settings_of_identity(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings among `values` (JSON) that say what a selection finds."""
    return {name: value for name, value in values.items() if name not in NOT_IDENTITY}


def settings_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The settings whose values differ and matter, one `name: old → new` each."""
    before, after = settings_of_identity(old), settings_of_identity(with_identity_of(new, old))
    return [
        f"{name}: {before.get(name)!r} → {after.get(name)!r}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


class PlanKeywords(TypedDict, total=False):
    """The settings that most plans use. Pass all others through `settings`."""

    ranks: Sequence[int]
    target_modules: Sequence[str] | str
    layers_to_transform: Sequence[int]
    modules_to_save: Sequence[str] | str
    use_dora: bool
    batch_size: int
    seq_len: int
    dtype: Literal["float32", "bfloat16", "float16", "bf16", "fp16", "fp32"]
    gradient_checkpointing: bool
    load_in_4bit: bool
    load_in_8bit: bool
    optimizer: str
    loss: str
    strategy: str
    steps: int
    calibrate: bool
    arms: int
    device: str
    memory_bytes: int | str  # bytes, or a number with a unit such as "24GiB"
    price_per_hour: float


class SelectKeywords(TypedDict, total=False):
    """The settings that most selections use. Pass all others through `settings`."""

    goal: Goal
    strategy: str
    ranks: Sequence[int] | int
    learning_rates: Sequence[float] | float
    seeds: Sequence[int] | int
    extend: bool
    sweep: Sequence[str] | str
    margin: float
    metric: str
    metrics: Sequence[str] | str
    higher_is_better: Sequence[str] | str
    lower_is_better: Sequence[str] | str
    guard: Sequence[str] | str
    guard_margin: float
    columns: Mapping[str, str] | Sequence[str]  # {"prompt": "question"} or ["prompt=question"]
    validation: str
    max_steps: int
    target_modules: Sequence[str] | str
    layers_to_transform: Sequence[int] | int
    lora_alpha: float
    batch_size: int
    seq_len: int
    eval_items: int
    dtype: Literal["auto", "float32", "bfloat16", "float16", "bf16", "fp16", "fp32"]
    num_train_epochs: float
    load_in_4bit: bool
    optim: Literal["adamw_torch", "adamw_8bit"]
    device: str
    budget_hours: float
    memory_bytes: int | str  # bytes, or a number with a unit such as "24GiB"
    adapters_per_pass: int
    certify: bool
    executor: Literal["local", "processes", "ray"]
    workers: int
    ray_address: str
    report_to: Sequence[str] | str


ProfileName: TypeAlias = Literal["rl"]


@dataclass(frozen=True, slots=True)
class Profile:
    """Defaults that an argument of `select_rank_with` overrides, and how outcomes are judged."""

    strategy: str = "grid"
    metric: str = "loss"
    seeds: tuple[int, ...] = (0,)
    margin: float | None = None
    judges_collapse: bool = False  # whether a training that falls far below its own best is no result
    smallest_if_alike: bool = False  # whether the smallest rank is the answer where no difference can be shown


PLAIN = Profile()
PROFILES: Mapping[str, Profile] = {
    # Two points of a reward between 0 and 1; three seeds measure the noise before the bulk is spent.
    "rl": Profile("upward", "reward", (0, 1, 2), 0.02, judges_collapse=True, smallest_if_alike=True),
}


def profile_named(name: str | None) -> Profile:
    """The profile of that name; the plain defaults for None.

    Raises:
        SettingsError: an unknown name.
    """
    if name is None:
        return PLAIN
    if name not in PROFILES:
        raise SettingsError(f"unknown profile {name!r}{did_you_mean(name, PROFILES)}; there are: {', '.join(PROFILES)}")
    return PROFILES[name]
