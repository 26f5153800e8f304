"""The probability that a rank is enough: what it is, when there is none, what a confidence picks, and the words where none has it."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from scipy.stats import t as student

from rightrank.cli import cli
from rightrank.decision.records import decide_run
from rightrank.decision.rule import ASKED_CONFIDENCE, decision_of
from rightrank.decision.seeds import NOISE, NOISE_DEGREES, NoiseParts
from rightrank.decision.sentences import chance
from rightrank.decision.table import ScoreTable
from rightrank.schema.decision import Decision
from rightrank.schema.errors import ResultsError
from tests.decision.tables import bare, scored
from tests.report import runs

STUDY = Path(__file__).parents[2] / "benchmarks" / "selection" / "noise_model.json"
LOSSES = {1: 2.3, 4: 2.012, 16: 2.002, 64: 2.0}


def one_seed(items: int = 400, noise: float = 0.02) -> ScoreTable:
    return scored(LOSSES, items=items, seeds=(0,), noise=noise)


def chances(decision: Decision) -> dict[int, float | None]:
    return {evidence.rank: evidence.probability for evidence in decision.ranks}


def test_it_is_that_of_the_difference_where_there_is_one() -> None:
    table, margin = scored({4: 2.012, 64: 2.0}, seeds=(0,)), 0.01
    worse = table.cells[4, 1e-3, 0].sums - table.cells[64, 1e-3, 0].sums
    deviation = NOISE.ratio(1, worse.size) ** 0.5 * worse.std(ddof=1)
    expected = student.cdf((margin - worse.mean()) / deviation, NOISE_DEGREES)
    assert chances(decision_of(table, margin))[4] == pytest.approx(expected, abs=0.015)


def test_a_wider_margin_makes_every_rank_likelier_and_the_best_is_not_certain() -> None:
    narrow, wide = (chances(decision_of(one_seed(), margin)) for margin in (0.002, 0.02))
    assert all((narrow[rank] or 0) < (wide[rank] or 0) for rank in (4, 16))
    assert (narrow[64] or 0) < 0.8 < (wide[64] or 0)
    assert (wide[1] or 0) < 0.01 < (wide[4] or 0)


def test_the_sentence_says_it_beside_a_larger_rank() -> None:
    decision = decision_of(one_seed(noise=0.005), 0.02)
    found = {rank: chance(likely) for rank, likely in chances(decision).items() if likely is not None}
    assert decision.rank == 4
    assert f"Rank 4 looks enough ({found[4]} likely" in decision.sentence
    assert found[1] == "under 10%"
    assert decision.probability_note.startswith("The probability is that the rank is within the margin")


def test_several_seeds_answer_as_one_does_and_the_bounds_are_a_grade_beside_it() -> None:
    table = scored(LOSSES, seeds=(0, 1), items=100, noise=0.03)
    decision = decision_of(table, 0.02)
    assert (decision.rank, decision.take, decision.grade, decision.asked) == (4, 4, "likely", ASKED_CONFIDENCE)
    assert decision.probability == chances(decision)[4]
    assert f"Rank 4 looks enough ({chance(decision.probability or 0)} likely" in decision.sentence
    assert (decision_of(table, 0.02, confidence=None).verdict, decision_of(table, 0.02, confidence=None).grade) == (
        "undecided",
        "cannot tell",
    )
    shown = decision_of(scored(LOSSES, seeds=(0, 1, 2), noise=0.005), 0.02)
    assert (shown.rank, shown.grade, shown.confidence) == (4, "shown", 0.95)
    assert shown.sentence.startswith("Rank 4 is enough (")
    assert decision_of(one_seed(noise=0.005), 0.02).grade == "likely"  # one seed shows nothing
    assert decision_of(bare(LOSSES), 0.02).grade is None


def test_where_no_rank_is_as_likely_the_words_say_what_to_do() -> None:
    decision = decision_of(scored({0: 2.4, **LOSSES}, seeds=(0, 1), items=100, noise=0.03), 0.002)
    assert (decision.rank, decision.verdict, decision.grade) == (None, "undecided", "cannot tell")
    assert (decision.alike, decision.probably_worse, decision.take) == ([4, 16, 64], [1], 64)
    assert decision.sentence.startswith("Ranks 4, 16 and 64 cannot be told apart (±0.0")
    for words in (
        "the margin is 0.002 nats",
        "Rank 1 is probably worse.",
        "Take rank 64: 75% likely to be within 0.00",
    ):
        assert words in decision.sentence
    assert decision.rank_at_hand == 64
    assert 0 < (decision.resolves or 0) <= (decision.take_within or 0)
    wider = decision_of(scored({0: 2.4, **LOSSES}, seeds=(0, 1), items=100, noise=0.03), decision.take_within)
    assert wider.rank == 64
    items, seeds = decision.next_runs
    assert (items.action, items.items, seeds.action, seeds.minutes) == ("items", 500, "seeds", None)
    enough = scored({0: 2.4, **LOSSES}, seeds=(0, 1), items=20_000, noise=0.03)
    assert decision_of(enough, 0.002).verdict != "undecided"


def test_purchases_are_priced_by_the_trainings_and_evaluations_so_far() -> None:
    table = scored({4: 2.002, 64: 2.0}, seeds=(0, 1), items=100, noise=0.03)
    for train, evaluation, first in ((600.0, 1.0, "items"), (1.0, 600.0, "seeds")):
        cells = {key: replace(cell, train_seconds=train, eval_seconds=evaluation) for key, cell in table.cells.items()}
        runs = decision_of(replace(table, cells=cells), 0.002).next_runs
        assert runs[0].action == first
        assert runs[0].minutes is not None
        assert runs[0].minutes < (runs[1].minutes or 0)
        assert "about" in runs[1].sentence.rpartition("(")[2]


def test_noisy_seeds_at_hand_make_a_rank_less_likely_than_earlier_grids_do() -> None:
    quiet, noisy = (
        scored(LOSSES, seeds=(0, 1), items=100, noise=0.03),
        scored(LOSSES, seeds=(0, 1), items=100, noise=0.03),
    )
    moved = {
        key: replace(cell, sums=cell.sums + (0.06 if key[0] == 4 else 0.0) * (1 if key[2] else -1))
        for key, cell in noisy.cells.items()
    }
    assert (chances(decision_of(quiet, 0.02))[4] or 0) > (
        chances(decision_of(replace(noisy, cells=moved), 0.02))[4] or 0
    ) + 0.02


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
        decision = decision_of(given, 0.01, confidence=0.9)
        assert decision.probability_note == f"No probability: {reason}."
        assert set(chances(decision).values()) == {None}
        assert decision.rank == decision_of(given, 0.01, confidence=None).rank == decision_of(given, 0.01).rank


def test_a_confidence_picks_the_smallest_rank_that_has_it() -> None:
    table = one_seed(noise=0.005)
    found = chances(decision_of(table, 0.02))
    for confidence in (0.5, 0.8, 0.9):
        decision = decision_of(table, 0.02, confidence=confidence)
        assert decision.rank == min(rank for rank in LOSSES if (found[rank] or 0) >= confidence)
        assert decision.verdict == "saturated"


def test_the_staircase_is_that_of_the_probabilities() -> None:
    alike = scored({4: 2.002, 16: 2.001, 64: 2.0, 128: 2.0}, items=100, seeds=(0,), noise=0.1)
    for table in (
        one_seed(items=100, noise=0.03),
        scored({0: 2.4, **LOSSES}, items=100, seeds=(0,), noise=0.03),
        alike,
    ):
        steps = decision_of(table, 0.02).staircase
        assert all(before.rank > after.rank for before, after in pairwise(steps))
        assert len({step.rank for step in steps}) > (2 if table is not alike else 1)
        assert all(step.rank > 0 for step in steps)  # the base is no answer, and has no place on an axis of ranks
        for step in steps[1:]:
            just, before = (decision_of(table, step.margin * factor) for factor in (1.0001, 0.9999))
            assert just.rank == step.rank
            assert before.rank is None or before.rank > step.rank


def test_the_other_rows_of_the_verdict_stay() -> None:
    rising = scored({1: 2.3, 4: 2.2, 16: 2.1, 64: 2.0}, items=400, seeds=(0,), noise=0.02)
    flat = scored({1: 2.001, 4: 2.0005, 16: 2.0, 64: 2.0002}, items=400, seeds=(0,), noise=0.01)
    assert [(one.rank, one.verdict) for one in (decision_of(rising, 0.01), decision_of(flat, 0.01))] == [
        (64, "rising"),
        (1, "flat"),
    ]


def test_an_open_base_is_said_beside_the_answer() -> None:
    decision = decision_of(scored({0: 2.022, **LOSSES}, items=100, seeds=(0,), noise=0.06), 0.02)
    likely = chances(decision)[0]
    assert likely is not None
    assert decision.sentence.endswith(f"The base itself is {chance(likely)} likely to be within the margin.")
    surely = decision_of(scored({0: 2.001, 4: 2.0, 64: 2.0}, items=400, seeds=(0, 1), noise=0.01), 0.02)
    assert (surely.verdict, surely.rank, surely.grade) == ("no_gain", None, "shown")


def test_no_rank_at_the_confidence_is_undecided() -> None:
    decision = decision_of(one_seed(noise=0.1), 0.005, confidence=0.99)
    assert (decision.rank, decision.verdict, decision.asked) == (None, "undecided", 0.99)
    assert "99% likely to be within" in decision.sentence


@pytest.mark.parametrize("confidence", [0.4, 1.0, float("nan")])
def test_a_confidence_that_is_none_is_refused(confidence: float) -> None:
    with pytest.raises(ResultsError, match=r"give a probability from 0\.5 to below 1"):
        decision_of(one_seed(), 0.01, confidence=confidence)


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
    assert set(likely) >= {1, 4, 16, 64}
    confidence = min(0.99, max(0.5, likely[16]))
    settings = records.started.settings | {"confidence": confidence}
    asked = decide_run(replace(records, started=records.started.model_copy(update={"settings": settings})))
    assert asked.rank == min((rank for rank in likely if rank and likely[rank] >= confidence), default=None)
    assert decide_run(records).rank == min(
        (rank for rank in likely if rank and likely[rank] >= ASKED_CONFIDENCE), default=None
    )


def test_its_constants_are_those_of_the_study_and_it_is_calibrated_there() -> None:
    study = json.loads(STUDY.read_text(encoding="utf-8"))
    assert (
        NoiseParts(*(pytest.approx(study["parts"][name], rel=0.03) for name in ("seeds", "crossed", "examples")))
        == NOISE
    )
    assert study["confidence"] == ASKED_CONFIDENCE
    assert study["trade_off"][f"2 seeds, {ASKED_CONFIDENCE:g}"]["answered"] >= 0.85
    for rows in study["reliability"].values():  # the truth has noise of its own, which draws what held to the middle
        assert all(abs(row["forecast"] - row["held"]) < 0.21 for row in rows if row["events"] >= 100)
        assert all(before["held"] < after["held"] + 0.05 for before, after in pairwise(rows))


@pytest.mark.parametrize("seeds", [1, 2])
def test_answers_beside_a_larger_rank_that_is_worse_were_mostly_too_small(seeds: int) -> None:
    counts = json.loads(STUDY.read_text(encoding="utf-8"))["larger rank worse"]
    doubted, others = (counts[f"{seeds} seeds, {which}"] for which in ("doubted", "others"))
    assert doubted["too small"] > doubted["answers"] / 2
    assert others["too small"] < others["answers"] / 8
    told = (STUDY.parent / "README.md").read_text(encoding="utf-8")
    assert all(f"{count['too small']} of {count['answers']}" in told for count in (doubted, others))
