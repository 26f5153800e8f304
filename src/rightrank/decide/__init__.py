"""From finished trials to a rank, a verdict and what to do next: pure, no files, no torch."""

from __future__ import annotations

from rightrank.decide.rule import decide, default_margin
from rightrank.decide.table import ScoreTable, table_of

__all__ = ["ScoreTable", "decide", "default_margin", "table_of"]
