"""What a plan answers.

Every number carries where it comes from: `exact` (counted), `traced` (the real step followed allocation by
allocation), `formula` (a per-module rule, where the step can't be traced), `measured` (on this device), or `assumed`.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from pydantic import Field

from rightrank.records.base import Record

Source: TypeAlias = Literal["exact", "traced", "formula", "measured", "assumed"]
Components: TypeAlias = dict[str, int]


class RankPlan(Record):
    """What one rank takes."""

    rank: int
    trainable_parameters: int
    adapter_bytes: int  # of adapter_model.safetensors
    peak_bytes: int  # allocated, at the step's highest point
    peak_reserved_bytes: int  # with the CUDA allocator's segments; on the CPU the same as peak_bytes
    total_bytes: int  # reserved, with the CUDA context: what nvidia-smi shows
    needed_bytes: int  # total_bytes and the headroom: what is compared with the memory there is
    components: Components  # they add up to peak_bytes
    peak_at: str  # where in the step the peak is
    fits: bool | None  # None where no memory was given or found
    flops_per_step: int
    seconds_per_step: float | None = None
    error_share: float  # how far the peak may be off, as a share of it
    peak_low_bytes: int  # the peak with that error, either way
    peak_high_bytes: int


class AxisPrice(Record):
    """What a change of one axis costs, at the largest rank that was asked."""

    axis: str  # such as "batch_size 4 → 8"
    peak_reserved_bytes: int
    difference_bytes: int
    flops_factor: float


class Change(Record):
    """A change that saves memory, and what the plan is with it and all the changes before it."""

    setting: str
    value: str
    peak_reserved_bytes: int
    fits: bool
    price: str  # what it costs beside


class RangeLimit(Record):
    """One reason for an end of the range of ranks."""

    name: Literal["capacity", "matrices", "memory"]
    rank: int | None  # None: no limit known
    reason: str


class Extent(Record):
    """So much of trainings, and what they take; evaluations and the frozen prefix are in it."""

    trainings: float  # whole ones; one stopped early counts for its part
    flops: float
    seconds: float | None  # None: nothing was measured on this device
    price: float | None  # None: no price an hour was given


class RankTraining(Record):
    """One whole training of one rank, with the evaluations on its way."""

    rank: int
    flops: float
    seconds: float | None
    price: float | None


class SelectionCost(Record):
    """Time and price of a whole selection, its trainings one after the other."""

    strategy: str | None  # None: a number of trainings was given
    steps: int  # of a whole training
    ranks: list[RankTraining]
    prefix_flops: float  # frozen blocks below the adapters, computed once
    evaluation_flops: float  # one pass over the held-out items
    expected: Extent  # at the mean cost of the ranks
    most: Extent  # at the cost of the dearest rank


class Error(Record):
    """How far numbers of one source may be off, as a share, and where that is known from."""

    share: float
    basis: str


class Plan(Record):
    """The answer: what every rank takes, which is the largest that fits, and why."""

    model: str
    architecture: str
    base_parameters: int
    base_bytes: int
    targets: int  # adapted matrices
    ranks: list[RankPlan]
    max_rank: int | None  # the largest rank asked for that fits; None where none does, or no memory is known
    largest_possible_rank: int | None = None  # of all ranks, not only of those asked for
    memory_bytes: int | None = None
    headroom_share: float
    context_bytes: int
    activations: Components  # kept for the backward pass at the largest rank, by kind of module
    prices: list[AxisPrice] = Field(default_factory=list)
    changes: list[Change] = Field(
        default_factory=list
    )  # the shortest list that makes the smallest rank fit, when none does
    limits: list[RangeLimit] = Field(default_factory=list)
    suggested_ranks: list[int] = Field(default_factory=list)
    selection: SelectionCost | None = None
    sources: dict[str, Source]
    errors: dict[str, Error] = Field(default_factory=dict)  # by source
    notes: list[str] = Field(default_factory=list)
    seconds: float  # that planning took
    settings: dict[str, Any]
