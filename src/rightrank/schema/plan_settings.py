"""The settings of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from rightrank.schema.peft_options import gathered_options
from rightrank.schema.settings import ChosenDtype, MemoryBytes, checked

OptimizerName: TypeAlias = Literal["adamw", "adamw_fused", "adamw_8bit", "paged_adamw_8bit", "sgd"]
TRANSFORMERS_NAMES = {"adamw_torch": "adamw", "adamw_torch_fused": "adamw_fused", "adamw_bnb_8bit": "adamw_8bit"}

DEFAULT_PLAN_RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class PlanSettings(BaseModel):
    """All settings of `plan` besides MODEL. Names are those of PEFT and transformers where they have one."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    ranks: tuple[int, ...] = DEFAULT_PLAN_RANKS

    # the adapter
    target_modules: tuple[str, ...] = ("all-linear",)
    exclude_modules: tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()  # names of bare parameters, such as fused experts
    layers_to_transform: tuple[int, ...] | None = None
    modules_to_save: tuple[str, ...] = ()
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    use_dora: bool = False
    divide_rank_by_experts: bool = False  # the rank of an expert is that of the plan divided by the number of experts
    peft_options: dict[str, Any] = Field(default={})  # further fields of LoraConfig (settings.peft_options)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    autocast_adapter_dtype: bool = True  # adapters in float32 whatever the base's type: PEFT's default

    # the step
    batch_size: int = Field(default=8, gt=0)
    seq_len: int = Field(default=512, gt=1)
    dtype: ChosenDtype = "bfloat16"
    autocast: Literal["bfloat16", "float16"] | None = None
    padding: bool = False  # rows of unequal length, so that attention is given a mask
    keep_logits: bool = False  # whoever trains holds the model's outputs until the next step; Trainer does not
    gradient_checkpointing: bool = False
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    loss: Literal["full", "chunked"] = "full"  # all logits at once, as Trainer; or in pieces, as `select`
    optimizer: OptimizerName = "adamw"
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_4bit_use_double_quant: bool = False
    packed: bool = False  # adapted layers run as `select` runs them; always so for more than one arm
    arms: int = Field(default=1, gt=0)  # trained together over one frozen base
    num_labels: int | None = Field(default=None, gt=1)  # a classification head of so many labels
    sharding: Literal["none", "ddp", "fsdp"] = "none"
    num_devices: int = Field(default=1, gt=0)
    eval_batch_size: int | None = Field(default=None, gt=0)

    # the device and the budget
    device: Literal["cuda", "cpu"] = "cuda"
    memory_bytes: MemoryBytes | None = None
    context_bytes: int | None = Field(default=None, ge=0)  # of the process beside its tensors; None: assumed
    headroom: float = Field(default=0.03, ge=0, lt=1)  # of the predicted peak, kept free

    # the data, for the range of ranks to begin with
    data_tokens: int | None = Field(default=None, gt=0)  # label tokens of the training data
    first_loss: float | None = Field(default=None, gt=0)  # the base's loss on them, nats a token

    # the selection, for its time and price
    calibrate: bool = False  # run a few real steps on this device first
    strategy: str | None = None  # `select`'s; says how many trainings, and that they are run as `select` runs them
    steps: int | None = Field(default=None, gt=0)  # optimizer steps of each training
    trainings: float | None = Field(default=None, gt=0)  # how many, where no strategy says so
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    seeds: tuple[int, ...] = (0,)
    budget_trainings: float | None = Field(default=None, gt=0)
    eval_items: int = Field(default=200, gt=1)
    eval_points: int = Field(default=4, gt=0)
    price_per_hour: float | None = Field(default=None, ge=0)
    trust_remote_code: bool = False

    @field_validator("target_modules", "target_parameters", "exclude_modules", "modules_to_save", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("optimizer", mode="before")
    @classmethod
    def _name_of_transformers(cls, value: object) -> object:
        return TRANSFORMERS_NAMES.get(value, value) if isinstance(value, str) else value

    @field_validator("ranks")
    @classmethod
    def _ranks_allowed(cls, ranks: tuple[int, ...]) -> tuple[int, ...]:
        if not ranks:
            raise ValueError("ranks is empty: give at least one")
        for rank in ranks:
            if rank < 1:
                raise ValueError(f"rank {rank} is not allowed: ranks are integers from 1")
        return tuple(sorted(set(ranks)))

    @model_validator(mode="after")
    def _consistent(self) -> PlanSettings:
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit were both given: give one of them")
        if self.autocast is not None and self.dtype != "float32":
            raise ValueError(f"autocast is for weights in float32: got dtype {self.dtype}; give one of the two")
        if (self.data_tokens is None) != (self.first_loss is None):
            raise ValueError("data_tokens and first_loss belong together: give both or neither")
        if self.sharding != "none" and self.num_devices < 2:
            raise ValueError(f"sharding {self.sharding!r} needs num_devices of 2 or more, got {self.num_devices}")
        if self.sharding == "none" and self.num_devices > 1:
            raise ValueError(f"num_devices {self.num_devices} needs sharding: give 'ddp' or 'fsdp'")
        if self.strategy is not None and self.trainings is not None:
            raise ValueError("strategy and trainings were both given: the strategy says how many; give one of them")
        if (self.strategy is not None or self.trainings is not None) and self.steps is None:
            raise ValueError("the time of a selection needs the steps of a training: give steps")
        if self.arms > 1 and (self.use_dora or self.target_parameters or self.peft_options):
            raise ValueError(
                "arms are for plain LoRA on modules, other adapters train alone: leave out use_dora and target_parameters"
            )
        if self.num_labels is not None and self.loss == "chunked":
            raise ValueError("a classification (num_labels) has no logits to take in pieces: give loss 'full'")
        return self

    @property
    def is_packed(self) -> bool:
        return self.packed or self.arms > 1


def make_plan_settings(values: Mapping[str, Any]) -> PlanSettings:
    """Plan settings from plain values.

    With a strategy, the settings of the step default to those that `select` uses.

    Raises:
        SettingsError: an unknown name (with the nearest known one) or a value that is not allowed.
    """
    values = gathered_options(values)
    as_select = loop_of_select(values.get("num_labels")) if values.get("strategy") is not None else {}
    return checked(PlanSettings, as_select | dict(values))


def loop_of_select(num_labels: object, optimizer: str = "adamw") -> dict[str, Any]:
    """The settings of a step in the training loop of `select`, for a classification where `num_labels` is given."""
    plain = optimizer in ("adamw", "sgd")
    return {
        "packed": True,
        "loss": "full" if num_labels else "chunked",
        "optimizer": "adamw_fused" if plain else optimizer,
    }
