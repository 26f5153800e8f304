"""Test the simulation of `compare --tries`, in short, and that its page has the stored results."""

from __future__ import annotations

import json

from benchmarks.compared.tries import HERE, format_rows, simulate_policies


def test_the_best_of_several_tries_is_accepted_in_error_without_the_correction() -> None:
    shares = {policy: row["worse"] for policy, row in simulate_policies("no change helps", "0.3, 256", 200).items()}
    assert shares["plain"] > 0.8
    assert shares["compare"] > 0.15
    assert max(shares["compare, tries"], shares["final split"]) < 0.08  # 5%, and two standard errors of 200 rounds


def test_the_page_has_the_stored_results() -> None:
    page = (HERE / "README.md").read_text(encoding="utf-8")
    rows = json.loads((HERE / "tries.json").read_text(encoding="utf-8"))["rows"]
    assert [line for line in format_rows(rows) if line not in page] == []
    assert all(row["policies"]["compare, tries"]["worse"] < 0.05 for row in rows)
