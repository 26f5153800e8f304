"""One seed's probability that a further seed finds a rank enough: what it is, when there is none, and what a confidence picks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import pytest
from click.testing import CliRunner
from scipy.stats import t as student

import benchmarks
from rightrank.cli import cli
from rightrank.decision.evidence import Evidence
from rightrank.decision.rule import ONE_SEED_CONFIDENCE, decide
from rightrank.decision.run import decide_run
from rightrank.decision.seeds import FURTHER_SEED_DEGREES, FURTHER_SEED_RATIO
from rightrank.decision.sentences import chance
from rightrank.decision.table import ScoreTable
from rightrank.schema.decision import Decision
from rightrank.schema.errors import ResultsError
from tests.decision.tables import bare, scored
from tests.report import runs

STUDY = Path(benchmarks.__file__).parent / "selection" / "one_seed.json"
LOSSES = {1: 2.3, 4: 2.012, 16: 2.002, 64: 2.0}


def one_seed(items: int = 400, noise: float = 0.02) -> ScoreTable:
    return scored(LOSSES, items=items, seeds=(0,), noise=noise)


def chances(decision: Decision) -> dict[int, float | None]:
    return {evidence.rank: evidence.probability for evidence in decision.ranks}


def test_it_is_the_smallest_over_the_other_ranks() -> None:
    table, margin = one_seed(), 0.01
    found = chances(decide(table, margin))
    cells = {rank: table.cells[rank, 1e-3, 0] for rank in LOSSES}
    for rank, cell in cells.items():
        differences = [cell.sums - other.sums for one, other in cells.items() if one != rank]
        expected = min(
            student.cdf((margin - d.mean()) / (FURTHER_SEED_RATIO * d.std(ddof=1)), FURTHER_SEED_DEGREES)
            for d in differences
        )
        assert found[rank] == pytest.approx(expected, rel=1e-6)


def test_a_wider_margin_makes_every_rank_likelier_and_the_best_is_not_certain() -> None:
    narrow, wide = (chances(decide(one_seed(), margin)) for margin in (0.002, 0.02))
    assert all((narrow[rank] or 0) < (wide[rank] or 0) < 1 for rank in LOSSES)
    assert (wide[1] or 0) < 0.01 < (wide[4] or 0)


def test_the_sentence_says_it_beside_a_larger_rank() -> None:
    decision = decide(one_seed(noise=0.005), 0.02)
    found = {rank: chance(likely) for rank, likely in chances(decision).items() if likely is not None}
    assert decision.rank == 4
    assert f"Rank 4 looks enough ({found[4]} likely" in decision.sentence
    assert found[1] == "under 10%"
    assert decision.probability_note.startswith("The probability is that a further seed")


def test_bounds_decide_with_several_seeds_and_the_probability_stands_beside() -> None:
    table = scored(LOSSES, seeds=(0, 1), items=100, noise=0.03)
    decision = decide(table, 0.02)
    assert decision == decide(table, 0.02, confidence=0.9) == decide(table, 0.02, confidence=None)
    assert decision.verdict == "undecided"
    assert decision.sentence.endswith(f"{chance(chances(decision)[4] or 0)} likely enough).")
    sure = decide(scored(LOSSES, seeds=(0, 1)), 0.02)
    assert (sure.rank, "likely" in sure.sentence, (chances(sure)[4] or 0) > 0.8) == (4, False, True)


def test_a_mean_of_two_seeds_is_nearer_to_a_further_one() -> None:
    """Both seeds have the same scores, so that the mean and its spread are those of one: (1 + 1/2) / 2 of the variance is left."""
    alone = one_seed(items=100, noise=0.03)
    both = replace(alone, cells=alone.cells | {(rank, lr, 1): cell for (rank, lr, _), cell in alone.cells.items()})
    one, two = (Evidence(table).margin_of(4, 0.9) - Evidence(table).margin_of(4, 0.5) for table in (alone, both))
    assert two == pytest.approx(one * 0.75**0.5, rel=0.01)


def test_there_is_none_where_its_assumptions_fail() -> None:
    table = one_seed()
    cells = dict(table.cells)
    uneven = {key: replace(cell, steps=400 if key[0] == 4 else 200) for key, cell in cells.items()}
    alike = cells | {(16, 1e-3, 0): cells[64, 1e-3, 0]}
    apart = {(rank, lr, 7 if rank == 4 else seed): cell for (rank, lr, seed), cell in cells.items()}
    for given, reason in {
        "values": (bare(LOSSES), "one number a training shows no noise"),
        "few": (one_seed(items=40), "40 examples are too few (at least 64)"),
        "steps": (replace(table, cells=uneven), "the trainings have unequal numbers of steps"),
        "alike": (replace(table, cells=alike), "two ranks have the same scores"),
        "apart": (replace(table, cells=apart), "the ranks have no seed in common"),
        "own": (replace(table, metric="reward", kind="other"), "how reward varies between seeds is not known"),
    }.values():
        decision = decide(given, 0.01, confidence=0.9)
        assert decision.probability_note == f"No probability: {reason}."
        assert set(chances(decision).values()) == {None}
        assert decision.rank == decide(given, 0.01, confidence=None).rank == decide(given, 0.01).rank


def test_a_confidence_picks_the_smallest_rank_that_has_it() -> None:
    table = one_seed(noise=0.005)
    found = chances(decide(table, 0.02))
    for confidence in (0.5, 0.8, 0.9):
        decision = decide(table, 0.02, confidence=confidence)
        assert decision.rank == min(rank for rank in LOSSES if (found[rank] or 0) >= confidence)
        assert decision.verdict == "saturated"


def test_without_a_confidence_it_is_seven_tenths_and_may_differ_from_the_rule() -> None:
    """The rule leaves rank 4 open, since the bounds over examples do; a further seed probably finds it enough."""
    table, margin = one_seed(items=100, noise=0.03), 0.02
    found, decision = chances(decide(table, margin)), decide(table, margin)
    assert decision == decide(table, margin, confidence=ONE_SEED_CONFIDENCE)
    assert decision.rank == min(rank for rank in LOSSES if (found[rank] or 0) >= 0.7) == 4
    assert (decision.confidence, "one_seed" in decision.flags) == (None, True)
    assert f"({chance(found[4] or 0)} likely" in decision.sentence
    rule = decide(table, margin, confidence=None)
    assert (rule.rank, rule.verdict) == (None, "undecided")
    assert chances(rule) == found


def test_the_staircase_is_that_of_the_probabilities() -> None:
    for table in (one_seed(items=100, noise=0.03), scored({0: 2.4, **LOSSES}, items=100, seeds=(0,), noise=0.03)):
        steps = decide(table, 0.02).staircase
        assert len({step.rank for step in steps}) > 2
        assert all(step.rank > 0 for step in steps)  # the base is no answer, and has no place on an axis of ranks
        for step in steps[1:]:
            just, before = (decide(table, step.margin * factor) for factor in (1.0001, 0.9999))
            assert just.rank == step.rank
            assert before.rank is None or before.rank > step.rank


def test_the_other_rows_of_the_verdict_stay() -> None:
    rising = scored({1: 2.3, 4: 2.2, 16: 2.1, 64: 2.0}, items=400, seeds=(0,), noise=0.02)
    flat = scored({1: 2.001, 4: 2.0005, 16: 2.0, 64: 2.0002}, items=400, seeds=(0,), noise=0.01)
    assert [(one.rank, one.verdict) for one in (decide(rising, 0.01), decide(flat, 0.01))] == [
        (64, "rising"),
        (1, "flat"),
    ]


def test_an_open_base_leaves_the_answer_open() -> None:
    table = scored({0: 2.01, **LOSSES}, items=100, seeds=(0,), noise=0.1)
    decision = decide(table, 0.005)
    assert (decision.rank, decision.verdict) == (None, "undecided")
    assert decision.sentence.startswith("Undecided whether there is any gain")


def test_no_rank_at_the_confidence_is_undecided_and_asks_for_a_seed() -> None:
    decision = decide(one_seed(noise=0.1), 0.005, confidence=0.99)
    assert (decision.rank, decision.verdict) == (None, "undecided")
    assert decision.sentence.startswith("Undecided: no rank is enough at 99%; rank ")
    assert decision.next_runs[0].action == "seeds"


@pytest.mark.parametrize("confidence", [0.4, 1.0, float("nan")])
def test_a_confidence_that_is_none_is_refused(confidence: float) -> None:
    with pytest.raises(ResultsError, match=r"give a probability from 0\.5 to below 1"):
        decide(one_seed(), 0.01, confidence=confidence)


def test_the_command_prints_it(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    level = generator.normal(size=100)
    rows = [
        f"{rank},0,{item},{loss + level[item] + 0.005 * generator.normal():.6f}"
        for rank, loss in LOSSES.items()
        for item in range(100)
    ]
    file = tmp_path / "runs.csv"
    file.write_text("\n".join(["rank,seed,item,eval_loss", *rows]))
    said = CliRunner().invoke(cli, ["decide", str(file), "--margin", "0.02", "--confidence", "0.9", "--json"])
    assert said.exit_code == 0, said.output
    decision = json.loads(said.output)
    assert decision["rank"] == 4
    assert next(one for one in decision["ranks"] if one["rank"] == 4)["probability"] >= 0.9


def test_a_run_is_decided_at_its_own_confidence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "ITEMS", 200)
    records = runs.made_up_run()
    found = chances(decide_run(records))
    likely = {rank: chance for rank, chance in found.items() if chance is not None}
    assert set(likely) == {1, 4, 16, 64}
    confidence = min(0.99, max(0.5, likely[16]))
    settings = records.started.settings | {"confidence": confidence}
    asked = decide_run(replace(records, started=records.started.model_copy(update={"settings": settings})))
    assert asked.rank == min((rank for rank in likely if likely[rank] >= confidence), default=None)
    assert decide_run(records).rank == min((rank for rank in likely if likely[rank] >= 0.7), default=None)


def test_its_constants_are_those_of_the_study_and_it_is_calibrated_there() -> None:
    """The ratio is that of the grids that were open when the locked ones judged; a later grid moves the fit by less than .01."""
    study = json.loads(STUDY.read_text())
    judged = json.loads(STUDY.with_name("judged.json").read_text())["one seed"]
    assert round(judged["ratio"], 2) == FURTHER_SEED_RATIO == pytest.approx(study["ratio"], abs=0.01)
    brier = {name: row["all"] for name, row in study["brier"].items()}
    assert min(brier, key=lambda name: brier[name]) == "probability"
    rows = study["reliability"]["probability"]["all"]
    assert all(abs(row["forecast"] - row["held"]) < 0.15 for row in rows)
    assert median(abs(row["forecast"] - row["held"]) for row in rows) < 0.06
