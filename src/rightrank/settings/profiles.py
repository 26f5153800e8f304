"""Profiles: the settings that suit a kind of training, for `select_rank_with(..., profile=NAME)`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from rightrank.errors import SettingsError, did_you_mean

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
