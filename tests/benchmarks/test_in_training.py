"""Test the picture of the end of a training."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.in_training import picture
from matplotlib.figure import Figure as Canvas


def test_the_picture_is_that_of_the_stored_results() -> None:
    """Check that the picture is drawn only from `results.jsonl`, whichever version of matplotlib drew the file."""
    result = picture.read_result()
    ax = picture.build_figure(result).plot(Canvas().subplots())
    (points,) = ax.containers
    drawn = {int(rank): value for rank, value in zip(*points.lines[0].get_data(), strict=True)}
    assert drawn == {int(rank): values[1] for rank, values in result["candidates"].items()}
    text = picture.IMAGE.read_text(encoding="utf-8")
    for line in [*ax.get_title().splitlines(), ax.get_ylabel(), *ax.get_legend_handles_labels()[1]]:
        assert f">{line}</text>" in text


@pytest.mark.trains
def test_the_right_document_of_a_query_is_the_first_candidate(tmp_path: Path) -> None:
    rerankers = pytest.importorskip("benchmarks.in_training.rerankers", exc_type=ImportError)
    text = "".join(
        f"Package: p{number}\nSource: s{number} (1)\nDescription-en: plots {word} curves\n {'A library for ' * 8}{word}.\n .\n More.\n\n"
        for number, word in enumerate(("blue", "red", "green"))
    )
    (tmp_path / "packages.txt").write_text(text, encoding="utf-8")
    pairs = rerankers.read_pairs(tmp_path / "packages.txt")
    assert [query for query, _ in pairs] == ["plots blue curves", "plots red curves", "plots green curves"]
    candidates = list(rerankers.list_candidates(pairs, 2))
    assert [documents[0] for documents in candidates] == [document for _, document in pairs]
    assert all(len(set(documents)) == 2 for documents in candidates)
    assert rerankers.summarize_ranks([1, 2]) == {"mrr": 0.75, "ndcg": round((1 + 1 / 1.58496) / 2, 4)}
