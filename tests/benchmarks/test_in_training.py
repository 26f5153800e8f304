"""Test the picture of the end of a training."""

from __future__ import annotations

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
