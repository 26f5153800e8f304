"""Judgements as evidence: win rates with ties as halves, intervals over prompts and judges, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rightrank import decide
from rightrank.decision.records import Answers
from rightrank.plugins.judge.judgements import Judgement, clustered_mean, decide_judged
from rightrank.report.answer import answer_view
from rightrank.report.evidence_tables import evidence_table
from rightrank.schema.errors import ResultsError
from tests.commands import run
from tests.tiny import write_jsonl


def rows(rates: dict[int, float], prompts: int = 300, judges: int = 1, reference: int = 16) -> list[dict[str, Any]]:
    """Every rank against the reference with exactly this share of wins, in both orders."""
    found = []
    for rank, rate in rates.items():
        for prompt in range(prompts):
            for judge in range(judges):
                wins = (prompt * 7 + judge * 3) % prompts < rate * prompts
                first = prompt % 2 == 0
                pair = {"rank_a": rank, "rank_b": reference} if first else {"rank_a": reference, "rank_b": rank}
                outcome = "a" if wins == first else "b"
                found.append({"prompt": f"p{prompt}", **pair, "outcome": outcome, "judge": f"j{judge}"})
    return found


def test_a_rank_that_wins_often_enough_is_enough() -> None:
    found = decide(rows({4: 0.5, 1: 0.2}), margin=0.1).decision
    assert (found.rank, found.verdict, found.metric, found.reference_rank) == (4, "saturated", "win_rate", 16)
    assert (found.fallback_rank, found.best_so_far) == (4, None)
    assert {one.rank: one.value for one in found.ranks} == pytest.approx({1: 0.2, 4: 0.5, 16: 0.5})
    assert {one.rank: one.non_inferior for one in found.ranks} == {1: False, 4: True, 16: True}
    four = next(one for one in found.ranks if one.rank == 4)
    assert four.difference_high == pytest.approx(1.645 * 0.5 / 300**0.5, rel=0.02)
    assert found.flags == ["one_judge"]
    assert (found.staircase[0].margin, found.staircase[0].rank) == (0.0, 16)


@pytest.mark.parametrize(("rates", "rank", "verdict"), [({4: 0.2}, 16, "rising"), ({4: 0.6, 1: 0.55}, 1, "flat")])
def test_verdicts(rates: dict[int, float], rank: int, verdict: str) -> None:
    found = decide(rows(rates), margin=0.1).decision
    assert (found.rank, found.verdict) == (rank, verdict)


def test_too_few_judgements_cannot_tell_and_say_how_many_would() -> None:
    found = decide(rows({4: 0.5}, prompts=40), margin=0.05).decision
    assert (found.rank, found.fallback_rank, found.best_so_far, found.verdict) == (None, None, 16, "undecided")
    assert found.sentence.startswith("Cannot tell")
    (run_,) = found.next_runs
    needed = ((1.645 + 0.842) * 0.5 / 0.05) ** 2  # 618 prompts, for four of five cases
    assert needed <= (run_.items or 0) <= 1.2 * needed
    again = decide(rows({4: 0.5}, prompts=int(run_.items or 0)), margin=0.05).decision
    assert again.rank == 4


def test_the_best_so_far_is_the_rank_that_wins_most_often() -> None:
    found = decide(rows({4: 0.55, 1: 0.5}, prompts=40), margin=0.05).decision
    assert (found.rank, found.fallback_rank, found.best_so_far) == (None, None, 4)
    assert evidence_table(found)[-1][3:] == ["reference", "", "reference", "1"]
    assert "rank 4 came out best so far" in answer_view(Answers(found)).safe_choice


def test_a_lower_rank_is_not_tested_beyond_one_that_fails() -> None:
    found = decide(rows({4: 0.2, 1: 0.9}), margin=0.1).decision
    assert (found.rank, found.verdict) == (16, "rising")


def test_ties_are_halves_and_order_does_not_matter() -> None:
    half = [Judgement(prompt=f"p{n}", rank_a=4, rank_b=16, outcome="tie", judge="j") for n in range(100)]
    turned = [Judgement(prompt=f"p{n}", rank_a=16, rank_b=4, outcome="tie", judge="j") for n in range(100)]
    assert decide_judged(half, 0.05).ranks == decide_judged(turned, 0.05).ranks
    assert decide_judged(half, 0.05).rank == 4  # 100 ties: the rule of three says at most 3% below


def test_judges_that_differ_widen_the_interval() -> None:
    generator = np.random.default_rng(0)
    prompts, judges = np.repeat(np.arange(100), 5).tolist(), np.tile(np.arange(5), 100).tolist()
    alike = (generator.random(500) < 0.5).astype(float)
    apart = (generator.random(500) < np.tile([0.2, 0.4, 0.5, 0.6, 0.8], 100)).astype(float)
    narrow, wide = (clustered_mean(one.tolist(), prompts, judges) for one in (alike, apart))
    assert wide.standard_error > 2 * narrow.standard_error
    assert wide.degrees < 10


def test_a_file_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_jsonl(tmp_path / "judged.jsonl", rows({4: 0.5, 1: 0.2}, judges=2))
    status, out, _ = run(["decide", str(file), "--margin", "0.1", "--json"], capsys)
    found = json.loads(out)
    assert (status, found["rank"], found["reference_rank"]) == (0, 4, 16)
    assert found["understood"] == ["1200 judgements of 300 prompts by 2 judges"]
    status, text, _ = run(["decide", str(file), "--margin", "0.1"], capsys)
    assert status == 0
    assert "Rank 4 is enough: against rank 16, it wins 50%" in text


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"prompt": "p0", "rank_a": 4, "rank_b": 16, "outcome": "b", "judge": "j0"}, "contradicts row 1"),
        ({"prompt": "p0", "rank_a": 16, "rank_b": 4, "outcome": "a", "judge": "j0"}, "contradicts row 1"),
        ({"prompt": "p0", "rank_a": 4, "rank_b": 4, "outcome": "a"}, "rank_a and rank_b are both 4"),
        ({"prompt": "p0", "rank_a": 4, "rank_b": 16, "outcome": "left"}, "outcome is 'left'; give a, b or tie"),
        ({"prompt": "p0", "rank_a": "x", "rank_b": 16, "outcome": "a"}, "rank_a is 'x'; give a whole number"),
        ({"prompt": "p0", "rank_a": 4, "rank_b": 16}, "no outcome"),
    ],
)
def test_rows_that_cannot_be_used_are_named(bad: dict[str, Any], message: str) -> None:
    first = {"prompt": "p0", "rank_a": 4, "rank_b": 16, "outcome": "a", "judge": "j0"}
    with pytest.raises(ResultsError, match=message):
        decide([first, bad])


@pytest.mark.parametrize("margin", [0.0, 0.5, 2.0])
def test_a_margin_that_is_no_win_rate_is_refused(margin: float) -> None:
    with pytest.raises(ResultsError, match="a win rate's margin"):
        decide(rows({4: 0.5}), margin=margin)
