"""Judgements: which of two ranks answered a prompt better."""

from __future__ import annotations

from typing import Literal, TypeAlias

from rightrank.records.base import Record, Whole

Outcome: TypeAlias = Literal["a", "b", "tie"]
SCORES: dict[str, float] = {"a": 1.0, "tie": 0.5, "b": 0.0}  # by outcome, of rank_a


class Judgement(Record):
    """One judge's choice between the answers of two ranks to one prompt."""

    prompt: str
    rank_a: Whole
    rank_b: Whole
    outcome: Outcome
    judge: str

    def score_of(self, rank: int) -> float:
        """1 for a win of `rank`, 1/2 for a tie, 0 for a loss."""
        return SCORES[self.outcome] if rank == self.rank_a else 1 - SCORES[self.outcome]
