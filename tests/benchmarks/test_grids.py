"""The families of grids: that what is planted is planted, that texts are read right, that stored files are whole."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.selection import linear, texts
from benchmarks.selection.long_grids import GRIDS
from benchmarks.selection.planted import teachers
from benchmarks.selection.ray_asha import ray_asha, reports
from benchmarks.selection.tables import GridCurve, read_grids

from rightrank.schema.settings import SelectSettings

pytestmark = pytest.mark.trains

STORED = Path(linear.__file__).parent


@pytest.mark.parametrize("layer", linear.layers()[::5], ids=lambda layer: layer.name)
def test_the_optimum_of_a_rank_is_that_of_the_best_approximation(layer: linear.Layer) -> None:
    target = linear.planted(layer)
    u, sigma, vt = torch.linalg.svd(target)
    for rank in linear.RANKS:
        best = (u[:, :rank] * sigma[:rank]) @ vt[:rank]
        assert linear.optimal_risk(layer, rank) == pytest.approx(float(linear.risk(best[None], target)), abs=1e-5)
    assert linear.optimal_risk(layer, 0) == pytest.approx(linear.RISK)


def test_no_training_beats_the_optimum_and_good_ones_come_near(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "STEPS", 120)
    layer = linear.Layer("geometric", 6, 0.0)
    risks, _ = linear.train(layer, 2)
    optimum = linear.optimal_risk(layer, 2)
    assert all(bool((found >= optimum - 1e-5).all()) for found in risks)
    assert float(risks[-1].min()) == pytest.approx(optimum, rel=0.1)


def test_stored_grids_are_whole() -> None:
    planted = {curve.name for curve in read_grids(STORED / "planted_grids.json")}
    assert planted == {teacher.name for teacher in teachers(64)}
    for curve in read_grids(STORED / "linear_grids.json"):
        assert curve.seeds == list(linear.SEEDS)
        assert curve.size == len(linear.RANKS) * len(linear.RATES)


def test_long_grids_are_whole() -> None:
    """Of locked ones, only how many cells and seeds they have."""
    files = [*(STORED / "grids").glob("*.json"), *(STORED / "locked").glob("*.json")]
    for file in (one for one in files if one.name != "lock.json"):
        (curve,), (entry,) = read_grids(file), json.loads(file.read_text())["curves"]
        cells = [seeds for by_rate in curve.cells.values() for seeds in by_rate.values()]
        settings = SelectSettings(**GRIDS[file.stem])
        assert len(cells) <= len(settings.ranks) * len(settings.learning_rates)  # diverged ones are missing
        assert len(curve.items) == sum(len(seeds) for seeds in cells)
        assert (curve.seeds == list(settings.seeds)) != entry["partial"]
        assert set(curve.checkpoints) == {0.125, 0.25, 0.5} == {float(part) for part in entry["checkpoint_items"]}
        assert set(curve.tests) <= {"trained", "truncated"} | {"recovered"} == set(entry["test_items"])


def test_package_descriptions(tmp_path: Path) -> None:
    file = tmp_path / "available"
    file.write_text(
        "Package: vim\nSection: editors\nSource: vim (2:9)\nDescription: Vi IMproved\n more of it\n\n"
        "Package: bare\nVersion: 1\n"
    )
    prompt = "Package: vim\nSection: editors\nDescription: "
    assert list(texts.packages(file)) == [{"prompt": prompt, "completion": "Vi IMproved", "group": "vim"}]


def test_glosses(tmp_path: Path) -> None:
    for part in texts.PARTS_OF_SPEECH:
        (tmp_path / f"data.{part}").write_text("  1 a licence\n")
    (tmp_path / "data.noun").write_text(
        '  1 a licence\n00001740 03 n 01 gas_lamp 0 000 | a lamp that burns gas; "the gas lamp went out"  \n'
    )
    assert list(texts.glosses(tmp_path)) == [{"prompt": "gas lamp: ", "completion": "a lamp that burns gas"}]


def test_reviews_near_zero_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "movieReviewSnippets_GroundTruth.txt").write_text("1\t-2.5\tDull.\n2\t0.1\tSo so.\n3\t1.5\tFine.\n")
    assert [row["label"] for row in texts.movies(tmp_path)] == ["negative", "positive"]


def test_newsgroups_reports_tweets_and_dialogue(tmp_path: Path) -> None:
    header = "\n".join("\t".join([part] * 12) for part in ("name", "string", "meta")) + "\n\n"
    (tmp_path / "20newsgroups-train.tab").write_text("Category\tText\nd\tstring\nclass\t\n\nsci.space\tthe moon\n")
    assert list(texts.newsgroups(tmp_path)) == [{"text": "the moon", "label": "sci.space"}]
    (tmp_path / "reuters-r52-train.tab").write_text(
        "Category\tText\nd\tstring\nclass\t\n" + 50 * "gold\tGold rose.\n" + "tin\tTin.\n"
    )
    assert list(texts.reuters(tmp_path)) == 50 * [{"text": "Gold rose.", "label": "gold"}]
    tweet = "False\t\ten\t\t\t\t\tAnn\t\tVote. https://t.co/x\t\t\n"
    (tmp_path / "election-tweets-2016.tab").write_text(header + tweet + tweet.replace("False", "True"))
    assert list(texts.tweets(tmp_path)) == [{"text": "Vote.", "label": "Ann"}]
    line = "01\t01\t0101\tOne\t{}\t {}\n"
    lines = [line.format("Ann", "Where is the cat?"), line.format("Bo", "On the red mat."), line.format("Ann", "Ah.")]
    (tmp_path / "friends-transcripts.tab").write_text(header + "".join(lines))
    prompt = "Ann: Where is the cat?\nBo: "
    assert list(texts.dialogue(tmp_path)) == [{"prompt": prompt, "completion": "On the red mat.", "group": "0101"}]


def test_ray_tunes_asha_stops_what_is_behind() -> None:
    pytest.importorskip("ray")
    values = {1: 3.0, 2: 2.0, 4: 1.0}
    cells = {rank: {1e-3: {0: value}} for rank, value in values.items()}
    curve = GridCurve("", "", False, cells, checkpoints={0.25: cells})
    assert reports(curve, (2, 1e-3)) == [(0.25, 2.0), (1.0, 2.0)]
    picks = [ray_asha(curve, 0.1, 9.0, np.random.default_rng(seed)) for seed in range(6)]
    assert {pick.rank for pick in picks} <= {4, 2, 1}
    spent = {pick.trainings for pick in picks}
    assert min(spent) < 3  # where the best came early, the others were stopped at a quarter
    assert 1.5 in spent
