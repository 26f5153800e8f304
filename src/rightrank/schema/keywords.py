"""The keywords of `select_rank` and `plan`: the settings with an option. Made from their table by `make generated`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict


class SelectKeywords(TypedDict, total=False):
    """The settings that most selections use. Pass all others through `settings`."""

    goal: Literal["adapter", "best-adapter", "training-rank"]
    strategy: str
    ranks: Sequence[int] | int
    learning_rates: Sequence[float] | float
    seeds: Sequence[int] | int
    metric: str
    margin: float | str
    budget_hours: float
    target_modules: Sequence[str] | str
    lora_alpha: float
    batch_size: int
    seq_len: int
    max_steps: int
    num_train_epochs: float
    columns: Mapping[str, str] | Sequence[str]
    data_config: str
    validation: str
    max_eval_examples: int
    memory_bytes: int | str
    load_in_4bit: bool
    device: str
    workers: int
    ray: str
    report_to: Sequence[str] | str


class PlanKeywords(TypedDict, total=False):
    """The settings that most plans use. Pass all others through `settings`."""

    ranks: Sequence[int] | int
    target_modules: Sequence[str] | str
    batch_size: int
    seq_len: int
    memory_bytes: int | str
    load_in_4bit: bool
