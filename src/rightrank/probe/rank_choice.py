"""The rank of each module: one for all, by energy, or by the singular values above the noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rightrank.errors import SettingsError
from rightrank.io.adapter_folder import AdapterFolder
from rightrank.maths.spectra import energy_rank, factored_singular_values
from rightrank.probe.adapter_spectra import inspect_adapter


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
