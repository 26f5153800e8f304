"""The judgement of the squeeze study, on results that are made up."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from benchmarks.squeeze.judge import JUDGE, cases_of, judgement, picture, read, table
from benchmarks.squeeze.table import Row, best_rates, choose

from rightrank.interop.squeeze import STUDY

RESULTS = Path(__file__).parents[2] / "benchmarks" / "squeeze" / "results"


def test_what_squeeze_says_of_the_study_is_its_judgement() -> None:
    chosen = {int(rank): way for rank, way in json.loads((RESULTS / "choice.json").read_text())["chosen"].items()}
    tasks = [task for name in JUDGE if (task := read(RESULTS, name)) is not None]
    cases = [case for task in tasks for case in cases_of(task, chosen)]
    shares = [100 * case.share for case in cases]
    held = sum(case.holds for case in cases)
    assert STUDY.startswith(f"In a study, {held} of {len(cases)} such cuts ended no worse")
    assert f"{min(shares):.0f}% to {max(shares):+.0f}%" in STUDY
    assert judgement(cases) in (RESULTS.parent / "README.md").read_text(encoding="utf-8")


def rows_of(cut: float) -> list[Row]:
    """Two seeds; rank 4 is best at .01 on the choosing examples, where rate .001 would look better on the reported ones."""
    rows = [Row("base", 0, 0.0, 0, 3.0, 3.0, 0.0, 0)]
    for seed in (0, 1):
        rows += [Row("top", 64, 0.01, seed, 1.0, 1.0, 6.0, 640), Row("top", 64, 0.001, seed, 1.1, 0.9, 6.0, 640)]
        rows += [Row("direct", 4, 0.01, seed, 1.2, 1.2, 6.0, 40), Row("direct", 4, 0.001, seed, 1.4, 1.1, 6.0, 40)]
        rows += [Row("half", 4, 0.01, seed, 1.2, cut, 6.0, 40), Row("late", 4, 0.01, seed, 1.2, 1.3, 6.0, 40)]
    return rows


def stored(folder: Path, rows: list[Row]) -> None:
    losses = np.array([[row.loss * 1000] * 5 for row in rows], np.int16)
    np.savez(folder / "verbs.npz", losses=losses, tokens=np.ones(5, np.int16))
    document = {"base": "b", "machine": {}, "rows": [row._asdict() for row in rows]}
    (folder / "verbs.json").write_text(json.dumps(document))


def test_rates_are_chosen_on_other_examples_and_ways_by_what_they_lose() -> None:
    assert best_rates(rows_of(1.1)) == {64: 0.01, 4: 0.01}
    assert choose({"a": rows_of(1.1), "b": rows_of(1.3)}, ("half", "late")) == {4: {"half": 0.1, "late": 0.15}}


@pytest.mark.parametrize(("cut", "held"), [(1.1, 2), (1.204, 2), (1.206, 0)])
def test_a_cut_holds_within_half_a_margin_of_the_training_at_its_rank(cut: float, held: int, tmp_path: Path) -> None:
    """The margin is 1% of the top's loss, 0.01."""
    stored(tmp_path, rows_of(cut))
    task = read(tmp_path, "verbs")
    assert task is not None
    cases = list(cases_of(task, {4: "half"}))
    assert [case.difference for case in cases] == pytest.approx([cut - 1.2] * 2, abs=1e-9)
    assert f"In {held} of 2 cases" in judgement(cases)
    assert ("The rule is met" in judgement(cases)) == (held == 2)
    assert f"| verbs | cut inside | – | {cut - 1:+.4f} | – |" in table([task], {4: "half"}, {"cut": "cut inside"})
    assert read(tmp_path, "unions") is None


def test_the_picture_has_every_way(tmp_path: Path) -> None:
    rows = [
        Row(kind, rank, rate, seed, loss, loss, 1.0, 1)
        for seed in (0, 1)
        for kind, rank, rate, loss in [
            ("top", 64, 0.01, 1.0),
            *(
                (kind, rank, 0.01, 1.0 + 0.1 / rank)
                for kind in ("direct", "half", "end", "recovered")
                for rank in (1, 4, 16)
            ),
        ]
    ]
    stored(tmp_path, [Row("base", 0, 0.0, 0, 3.0, 3.0, 0.0, 0), *rows])
    task = read(tmp_path, "verbs")
    assert task is not None
    figure = picture([task], dict.fromkeys((1, 4, 16), "half"))
    assert [one.y for one in figure.series] == [pytest.approx((5.0, 1.25, 0.3125))] * 4
