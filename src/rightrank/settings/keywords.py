"""The options of `rightrank select` as typed keywords of `select_rank`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict

from rightrank.settings.select import Goal


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
