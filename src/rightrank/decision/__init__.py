"""The decision: pure functions from a table of scores to a rank with its evidence. No files, no torch."""

from __future__ import annotations

from rightrank.decision.judge import CONFIDENCE
from rightrank.decision.metrics import default_margin
from rightrank.decision.rule import decide
from rightrank.decision.table import Cell, ScoreTable, table_of, table_of_results

__all__ = ["CONFIDENCE", "Cell", "ScoreTable", "decide", "default_margin", "table_of", "table_of_results"]
