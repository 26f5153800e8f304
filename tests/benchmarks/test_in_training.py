"""Test README's picture of the end of a training."""

from __future__ import annotations

from benchmarks.in_training import picture


def test_the_picture_is_that_of_the_stored_results() -> None:
    """Check that the picture is drawn only from `results.jsonl`."""
    assert picture.IMAGE.read_text(encoding="utf-8") == picture.render_figure()
