"""Test groups of examples in tables of results."""

from __future__ import annotations

from typing import Any

import pytest

from rightrank.api.runs import DecisionResult, decide
from rightrank.schema.errors import ResultsError


def make_table(documents: int) -> list[dict[str, Any]]:
    """Make rows of two ranks on 40 examples, where the smaller rank is worse on half of the documents."""
    return [
        {
            "rank": rank,
            "seed": seed,
            "item": f"{example:02}",
            "doc": example % documents,
            "value": 1 + seed / 100 + worse,
        }
        for rank in (4, 16)
        for seed in (0, 1)
        for example in range(40)
        if (worse := 0.01 * (rank == 4) * (example % documents % 2) * (1 + seed / 10)) >= 0
    ]


def decide_rows(rows: list[dict[str, Any]], group: str | None = None) -> DecisionResult:
    return decide(rows, metric="loss", margin=0.02, columns={"group": group} if group else None)


def test_decide_reads_the_groups_of_a_table() -> None:
    alone, grouped = decide_rows(make_table(8)), decide_rows(make_table(8), "doc")
    width = [
        result.decision.ranks[0].difference_high - result.decision.ranks[0].difference for result in (alone, grouped)
    ]  # type: ignore[operator]
    assert width[1] > 1.9 * width[0]
    assert "group from column doc" in grouped.input_notes
    rows_with_group = [row | {"group": row["doc"]} for row in make_table(8)]
    assert decide_rows(rows_with_group).decision == grouped.decision


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (make_table(1), "does not divide the examples into groups"),
        (make_table(40), "does not divide the examples into groups"),
        ([row | {"doc": row["rank"]} for row in make_table(8)], "example 00 has another doc"),
        (
            [{"rank": rank, "value": 1.0 + rank / 100, "doc": 1} for rank in (4, 16)],
            "does not divide the examples into groups",
        ),
        ([{key: value for key, value in row.items() if key != "doc"} for row in make_table(8)], "has no column 'doc'"),
    ],
)
def test_a_table_whose_column_groups_nothing_gets_one_line(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ResultsError, match=message) as refused:
        decide_rows(rows, "doc")
    assert "\n" not in str(refused.value)
