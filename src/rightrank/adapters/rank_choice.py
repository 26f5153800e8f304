"""The rank of each module: one for all, by energy, or by the singular values above the noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rightrank.adapters.spectra import inspect_adapter
from rightrank.models.adapter_files import AdapterFolder
from rightrank.models.spectra import energy_rank, factored_singular_values
from rightrank.schema.errors import SettingsError
from rightrank.schema.settings import DtypeName, SelectSettings, make_settings


@dataclass(frozen=True, slots=True)
class ResizeRule:
    """The rule that chooses the rank: exactly one of `rank`, `energy`, `noise` and `data`."""

    rank: int | None = None
    energy: float | None = None
    noise: bool = False
    data: Path | None = None

    def require_one(self) -> None:
        """Raise `SettingsError` unless exactly one is given."""
        given = [
            name
            for name, value in (("--rank", self.rank), ("--energy", self.energy), ("--data", self.data))
            if value is not None
        ]
        given += ["--noise"] if self.noise else []
        if len(given) != 1:
            raise SettingsError(
                f"{' and '.join(given) or 'no rule'} given; give exactly one of --rank, --energy, --noise and --data"
            )


@dataclass(frozen=True, slots=True)
class ResizeOptions:
    """Options besides the rule. All but `dtype` and `uniform` have an effect only with data."""

    dtype: DtypeName | None = None  # of the written tensors; None keeps theirs
    uniform: bool = False  # one rank for all modules, the largest that any of them needs
    base: str | None = None  # the base model; None for the one that the adapter names
    settings: SelectSettings = field(default_factory=lambda: make_settings({}))
    ranks: Sequence[int] | None = None  # candidates; None for the powers of two
    recover_steps: int = 0
    learning_rate: float | None = None  # of recovery
    on_rank: Callable[[int, float], None] = lambda _rank, _value: None
    # what the adapter was trained on: left out of the scores, and read for K-FAC and recovery
    train: Path | None = None
    notice: Callable[[str], None] = lambda _: None  # receives each line for a person


def require_data_for(options: Mapping[str, object], data: Path | None) -> None:
    """Refuse options that have no effect without data: those that are not None, 0 or empty."""
    given = [name for name, value in options.items() if value]
    if given and data is None:
        raise SettingsError(f"{given[0]} goes with --data FILE, which was not given; give both, or leave it out")


@dataclass(frozen=True, slots=True)
class RankChoice:
    """A rank for every module, and the rule that chose it."""

    ranks: Mapping[str, int]
    chosen_by: str
    notes: tuple[str, ...] = ()

    @property
    def common(self) -> int:
        """The largest rank of any module."""
        return max(self.ranks.values())

    def as_common(self, rank: int | None = None) -> RankChoice:
        """One rank for all modules: `rank`, or the largest of any."""
        return RankChoice(dict.fromkeys(self.ranks, rank or self.common), self.chosen_by, self.notes)


def by_rank(adapter: AdapterFolder, rank: int) -> RankChoice:
    """One rank for all modules.

    Raises:
        SettingsError: below 1, or above the limit of a module's ΔW.
    """
    if rank < 1:
        raise SettingsError(f"--rank {rank} is not allowed: give a whole number from 1")
    for module in adapter.modules:
        if rank > max(module.rank, min(module.rows, module.columns)):
            raise SettingsError(
                f"--rank {rank} is above the {min(module.rows, module.columns)} that {module.name} "
                f"({module.rows} × {module.columns}) can have; give a lower rank"
            )
    return RankChoice({module.name: rank for module in adapter.modules}, f"rank {rank}")


def by_energy(adapter: AdapterFolder, fraction: float) -> RankChoice:
    """The fewest singular values of each module with this fraction of its energy Σσ².

    Raises:
        SettingsError: `fraction` is not above 0 and up to 1.
    """
    require_fraction(fraction)
    ranks: dict[str, int] = {}
    for module in adapter.modules:
        s = factored_singular_values(*adapter.factors(module))
        ranks[module.name] = max(1, energy_rank(s, fraction) or module.rank)
    return RankChoice(ranks, f"energy {fraction:g}")


def require_fraction(energy: float) -> None:
    """Raise `SettingsError` unless 0 < energy ≤ 1."""
    if not 0 < energy <= 1:
        raise SettingsError(f"--energy {energy:g} is not allowed: give a fraction above 0 and up to 1, such as 0.99")


def by_noise(adapter: AdapterFolder) -> RankChoice:
    """The number of singular values above the optimal hard threshold; a module where the noise is unclear keeps its rank."""
    ranks: dict[str, int] = {}
    unclear: list[str] = []
    for module, found in zip(adapter.modules, inspect_adapter(adapter.path).modules, strict=True):
        ranks[module.name] = max(1, found.noise_rank)
        if "noise_unclear" in found.flags:
            ranks[module.name] = module.rank
            unclear.append(module.name)
    notes = (
        (f"{len(unclear)} module(s) keep their rank, with too few singular values to estimate the noise",)
        if unclear
        else ()
    )
    return RankChoice(ranks, "noise", notes)


def candidate_ranks(adapter: AdapterFolder, asked: Sequence[int] | None = None) -> list[int]:
    """The ranks to measure: `asked`, or every power of two below the adapter's largest rank; and that rank.

    Raises:
        SettingsError: a rank above the adapter's.
    """
    top = adapter.rank
    if top == 1:
        raise SettingsError(
            f"{adapter.path}: its rank is 1, and there is no lower rank to measure; give an adapter of a higher rank"
        )
    if asked:
        for rank in asked:
            if not 1 <= rank <= top:
                raise SettingsError(f"rank {rank} cannot be reached by truncation; give ranks from 1 to {top}")
        return sorted({*asked, top})
    return sorted({2**power for power in range(top.bit_length()) if 2**power < top} | {top})
