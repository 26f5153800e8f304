"""The science page says what the stored results say."""

from __future__ import annotations

import re

import pytest
from benchmarks.science import PAGE, TABLES, with_tables

pytestmark = pytest.mark.trains


def test_tables_are_those_of_the_results() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_tables(page), "a result changed: run `python -m benchmarks.science`"


def test_every_table_has_its_place_and_rows() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert re.findall(r"<!-- table: (\w+) -->", page) == list(TABLES)
    for make in TABLES.values():
        assert make().count("\n") >= 3
