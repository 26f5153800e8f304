"""The records of `inspect`, `resize` and `allocate`; one JSON object each."""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import Field

from rightrank.records.adapter import AdapterAnswer
from rightrank.records.base import Record

ModuleKind: TypeAlias = Literal["linear", "embedding", "convolution", "expert", "matrix"]


class ModuleSpectrum(Record):
    """The spectrum of one module's update ΔW."""

    name: str
    kind: ModuleKind
    shape: tuple[int, int]  # of ΔW: out × in
    rank: int  # of the factors; for a matrix, its shorter side
    scaling: float  # s in s·B·A; 1 for a matrix
    singular_values: list[float]  # of s·B·A, descending; for a large matrix, the leading ones
    frobenius_norm: float
    spectral_norm: float
    stable_rank: float
    effective_rank: float | None  # None: too little of the spectrum is known
    energy_rank: dict[str, int | None]  # by fraction; None: beyond the known singular values
    noise_rank: int  # above the optimal hard threshold
    null_rank: int | None  # above random factors of the same shape; None for a matrix
    base_spectral_norm: float | None = None  # of the base's weight, if available
    # untrained, no_token, dead, dora, lora_bias, noise_unclear, partial_spectrum
    flags: list[str] = Field(default_factory=list)


class InspectionSummary(Record):
    """The whole adapter or checkpoint."""

    kind: Literal["adapter", "checkpoints", "gradient"]
    modules: int
    parameters: int  # of the factors
    ranks: list[int]  # the different ranks
    scaling_rule: str
    base_model: str | None
    energy_rank: dict[str, int | None]  # the maximum over modules, as one common rank requires
    median_effective_rank: float | None
    most_concentrated: str | None  # the module that uses the least of its rank
    least_concentrated: str | None
    untrained: list[str]  # B = 0: never trained
    dead: list[str]  # updates under a thousandth of the median module's
    modules_to_save: list[str]  # fully trained modules
    unchanged: int = 0  # checkpoints: matrices without a difference
    not_matrices: list[str] = Field(default_factory=list)  # checkpoints: changed norms and biases, which have no rank
    notes: list[str] = Field(default_factory=list)
    sentence: str


class Inspection(Record):
    """`inspect --json`."""

    modules: list[ModuleSpectrum]
    summary: InspectionSummary


class ModuleResize(Record):
    """The change of one module."""

    name: str
    from_rank: int
    rank: int
    relative_delta_error: float  # ‖ΔW' − ΔW‖ / ‖ΔW‖ of the tensors as written


class HeldOut(Record):
    """A truncation measured on held-out data."""

    rank: int
    value: float
    recovered_steps: int = 0


class Resized(Record):
    """`resize --json`."""

    rank: int | None  # None: modules differ
    relative_delta_error: float  # over all modules, of the written tensors
    modules: list[ModuleResize]
    out: str
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    chosen_by: str
    held_out: list[HeldOut] = Field(default_factory=list)
    scored_examples: int | None = None  # with data: how many held-out examples every candidate was measured on
    answer: AdapterAnswer | None = None  # with data: the truncation that is enough, and every candidate
    notes: list[str] = Field(default_factory=list)


class ResizedTogether(Record):
    """Several adapters at one common rank."""

    rank: int
    adapters: list[Resized]


class AllocationTrial(Record):
    """One trained pattern with the given number of parameters."""

    pattern: Literal["uniform", "allocated", "shuffled"]
    seed: int
    parameters: int
    value: float
    ranks: dict[str, int]


class AllocationVerdict(Record):
    """A paired comparison. Positive differences mean that the allocated ranks are worse."""

    against: Literal["uniform", "shuffled"]
    difference: float
    low: float
    high: float
    better: bool  # the whole 95% interval lies below 0


class Allocation(Record):
    """`allocate --json`."""

    proposal: Literal["uniform", "pattern"]
    sentence: str
    by: str
    rank: int  # of the uniform adapter with as many parameters
    parameters: int
    rank_pattern: dict[str, int]  # by module, for PEFT's LoraConfig; empty if uniform is the answer
    lora_alpha: float  # the same for every module
    verdicts: list[AllocationVerdict]
    trials: list[AllocationTrial]
