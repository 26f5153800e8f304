"""Many adapters on one server: the rank that all of them can have, and what it saves."""

from __future__ import annotations

from pydantic import Field

from rightrank.records.adapter import AdapterCandidate
from rightrank.records.base import Record, Whole


class FleetAdapter(Record):
    """One adapter of the fleet."""

    adapter: str
    rank_before: Whole  # the largest of its modules
    rank: Whole  # the smallest at which it is not worse than itself by more than the margin
    value: float  # held-out, of the adapter as it is
    margin: float
    candidates: list[AdapterCandidate]  # what it loses at every rank, by descending rank
    out: str
    written_rank: Whole  # the largest of its modules as written
    relative_delta_error: float
    notes: list[str] = Field(default_factory=list)


class FleetSlots(Record):
    """What a server reserves for one adapter, at the rank that the fleet needs before and after; 2 bytes a parameter."""

    server: str
    rank_before: Whole  # `max_lora_rank`
    rank: Whole
    bytes_before: Whole
    bytes: Whole
    saved_bytes: Whole


class FleetMerge(Record):
    """The exact sum of the adapters, and its smallest truncation that is enough on every data set."""

    weights: list[float]
    rank: Whole  # of the exact sum
    chosen_rank: Whole
    candidates: dict[str, list[AdapterCandidate]]  # by data set
    out: str


class Fleet(Record):
    """`fleet --json`."""

    rank: Whole  # the smallest that every adapter can be truncated to
    sentence: str
    model: str
    adapters: list[FleetAdapter]
    slots: list[FleetSlots]
    padded_to: Whole | None  # the one rank of all written adapters; None: not padded
    merge: FleetMerge | None = None
    out: str
