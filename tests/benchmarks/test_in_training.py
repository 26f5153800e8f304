"""README's picture of a training's end."""

from __future__ import annotations

from benchmarks.in_training import picture


def test_the_picture_is_that_of_the_stored_results() -> None:
    """README's picture is drawn from `results.jsonl` and nothing else."""
    assert picture.IMAGE.read_text(encoding="utf-8") == picture.drawing()
