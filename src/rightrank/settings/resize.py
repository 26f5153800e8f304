"""How `resize` chooses a rank, and their options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rightrank.errors import SettingsError
from rightrank.settings.select import SelectSettings, make_settings
from rightrank.settings.values import DtypeName


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
