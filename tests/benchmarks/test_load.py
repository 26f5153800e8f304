"""Large runs, in a short form: what `benchmarks/load` measures grows with the size and no faster, and pages stay small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks.load.measure import HERE, RANKS, RATES, SIZES, journal

from rightrank.api.runs import status, write_report
from rightrank.decision.records import decide_run
from rightrank.report.html import MAX_ROWS
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import TrialFinished
from rightrank.search.history import Trials, space_of
from tests.report.runs import made_up_run

STORED = json.loads((HERE / "measured.json").read_text(encoding="utf-8"))
PAGE_KIB = 300


def test_the_report_of_two_thousand_trials_is_a_small_page(tmp_path: Path) -> None:
    run = journal(tmp_path, 2000)
    write_report(run)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert len(page.encode()) <= PAGE_KIB * 1024
    assert f"The newest {MAX_ROWS} of 2001 trials" in page
    assert status(run).trials_ended == 2001


def test_a_wide_grid_is_decided() -> None:
    """1,600 cells of one seed each; the benchmark times it."""
    decision = decide_run(made_up_run(range(1, 41), [1e-5 * 1.1**n for n in range(40)]))
    assert decision.rank is not None or decision.best_so_far is not None


def test_a_strategy_finds_the_trials_of_each_cell() -> None:
    records = made_up_run(RANKS, [1e-5 * 1.05**n for n in range(100)], range(2))
    space = space_of(SelectSettings(ranks=RANKS), 40)
    trials = Trials(space, {trial.arm: trial for trial in records.finished()})
    found = {
        cell: trials.by_seed(*cell) for cell in {(arm.rank, arm.learning_rate) for arm in trials.outcomes if arm.rank}
    }
    assert len(found) == 800
    assert all(isinstance(trial, TrialFinished) for seeds in found.values() for trial in seeds.values())


@pytest.mark.parametrize("case", [case for case in SIZES if case in STORED])
def test_the_stored_load_is_linear_and_its_pages_are_small(case: str) -> None:
    rows = sorted((row for row in STORED[case].values() if "failed" not in row), key=lambda row: row["size"])
    assert len(rows) >= 3
    first, last = rows[0], rows[-1]
    growth = last["size"] / first["size"]
    assert last["seconds"] <= 1.5 * growth * first["seconds"]
    if case == "status":
        assert last["seconds"] < 1
    if case == "rows":
        assert last["mib"] - last["mib_before"] <= 1.5 * (first["mib"] - first["mib_before"])
    if case == "report":
        assert max(row["report_kib"] for row in rows) <= PAGE_KIB


def test_the_trials_of_the_table_are_those_it_says() -> None:
    assert len(RANKS) * len(RATES) == SIZES["status"][0]
