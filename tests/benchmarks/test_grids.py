"""The families of grids: that texts are read right, that stored files are whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.results import read_json
from benchmarks.selection import texts
from benchmarks.selection.judge_wide import FOLDER, read_grid
from benchmarks.selection.long_grids import GRIDS
from benchmarks.selection.tables import read_grids

from rightrank.schema.settings import SelectSettings

pytestmark = pytest.mark.trains

STORED = Path(texts.__file__).parent


@pytest.mark.parametrize(
    ("name", "grids", "cells", "seeds"),
    [("planted", 64, 20, 2), ("planted_new", 40, 20, 3), ("linear", 36, 24, 2)],
)
def test_stored_grids_are_whole(name: str, grids: int, cells: int, seeds: int) -> None:
    curves = read_grids(STORED / f"{name}_grids.json.xz")
    assert len({curve.name for curve in curves}) == len(curves) == grids
    assert {curve.size for curve in curves} == {cells}
    assert {len(curve.seeds) for curve in curves} == {seeds}


def test_wide_grids_are_whole() -> None:
    """Each has six seeds, and the values of 4,096 test examples under every adapter."""
    files = sorted(FOLDER.glob("*.json.xz"))
    assert len(files) == 8
    for file in files:
        grid = read_grid(file)
        (curve,) = read_grids(file)
        assert curve.seeds == list(range(6))
        assert grid.ranks == curve.ranks
        assert len(grid.weights) == 4096
        assert {len(values) for values in grid.values.values()} == {4096}
        cells = {
            (rank, rate, seed) for rank, by_rate in curve.cells.items() for rate, row in by_rate.items() for seed in row
        }
        assert cells == set(grid.values)


def test_long_grids_are_whole() -> None:
    """Of locked ones, only how many cells and seeds they have."""
    files = [*(STORED / "grids").glob("*.json.xz"), *(STORED / "locked").glob("*.json.xz")]
    assert len(files) == 9
    for file in files:
        (curve,), (entry,) = read_grids(file), read_json(file)["curves"]
        cells = [seeds for by_rate in curve.cells.values() for seeds in by_rate.values()]
        settings = SelectSettings(**GRIDS[file.name.partition(".")[0]])
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
