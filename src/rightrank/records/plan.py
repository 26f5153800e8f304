"""The records of `plan`.

Every number has a source: `exact` (counted), `traced` (every allocation of a real step), `formula` (a rule per module,
if the step can't be traced), `measured` (on this device), or `assumed`.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from pydantic import Field

from rightrank.records.base import Record
from rightrank.records.run import DataSummary

Source: TypeAlias = Literal["exact", "traced", "formula", "measured", "assumed"]
Components: TypeAlias = dict[str, int]


class RankPlan(Record):
    """The memory and compute of one rank."""

    rank: int
    trainable_parameters: int
    adapter_bytes: int  # of adapter_model.safetensors
    peak_bytes: int  # allocated, at the peak of the step
    peak_reserved_bytes: int  # with the CUDA allocator's segments; on the CPU the same as peak_bytes
    total_bytes: int  # reserved, with the CUDA context: what nvidia-smi shows
    needed_bytes: int  # total_bytes and the headroom; compared with the available memory
    components: Components  # they add up to peak_bytes
    peak_at: str  # where in the step the peak is
    fits: bool | None  # None: the available memory is unknown
    flops_per_step: int
    seconds_per_step: float | None = None
    error_share: float  # relative error of the peak
    peak_low_bytes: int  # the peak minus and plus that error
    peak_high_bytes: int
    select_peak_bytes: int | None = None  # in the training loop of `select`; None: the plan is of that loop
    select_needed_bytes: int | None = None
    fits_in_select: bool | None = None


class AxisPrice(Record):
    """The cost of changing one setting, at the largest requested rank."""

    axis: str  # such as "batch_size 4 → 8"
    peak_reserved_bytes: int
    difference_bytes: int
    flops_factor: float


class Change(Record):
    """A change that saves memory, and the plan with this change and all before it."""

    setting: str
    value: str
    peak_reserved_bytes: int
    fits: bool
    price: str  # what the change costs


class RangeLimit(Record):
    """One limit of the range of ranks."""

    name: Literal["capacity", "matrices", "memory"]
    rank: int | None  # None: no limit known
    reason: str


class Extent(Record):
    """An amount of training and its cost, including evaluations and the frozen prefix."""

    trainings: float  # complete ones; early stopping counts in proportion
    flops: float
    seconds: float | None  # None: not measured on this device
    price: float | None  # None: no hourly price was given


class RankTraining(Record):
    """One complete training of one rank, including its evaluations."""

    rank: int
    flops: float
    seconds: float | None
    price: float | None


class SelectionCost(Record):
    """Time and price of a selection with one training after the other."""

    strategy: str | None  # None: a number of trainings was given
    steps: int  # of a complete training
    ranks: list[RankTraining]
    prefix_flops: float  # frozen blocks below the adapters, computed once
    evaluation_flops: float  # one pass over the held-out examples
    expected: Extent  # at the mean cost of the ranks
    most: Extent  # at the cost of the most expensive rank


class Error(Record):
    """The relative error of numbers from one source, and the basis of that estimate."""

    share: float
    basis: str


class Plan(Record):
    """The cost of every rank, and the largest rank that fits."""

    model: str
    architecture: str
    base_parameters: int
    base_bytes: int
    targets: int  # adapted matrices
    ranks: list[RankPlan]
    max_rank: int | None  # the largest requested rank that fits; None: none fits, or the memory is unknown
    largest_possible_rank: int | None = None  # of all ranks, also those that were not requested
    memory_bytes: int | None = None
    headroom_share: float
    context_bytes: int
    activations: Components  # kept for the backward pass at the largest rank, by kind of module
    prices: list[AxisPrice] = Field(default_factory=list)
    changes: list[Change] = Field(default_factory=list)  # the fewest that make the smallest rank fit, if none fits
    limits: list[RangeLimit] = Field(default_factory=list)
    suggested_ranks: list[int] = Field(default_factory=list)
    selection: SelectionCost | None = None
    data: DataSummary | None = None  # of the selection that is planned; None: a plan without data
    sources: dict[str, Source]
    errors: dict[str, Error] = Field(default_factory=dict)  # by source
    notes: list[str] = Field(default_factory=list)
    seconds: float  # spent on planning
    settings: dict[str, Any]
