"""Test figures by reading the artists on their axes. Files are only tested to be images."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

import rightrank
from rightrank import Selected, plots
from rightrank.api.folders import write_report
from rightrank.decision.run_answers import compare_run_adapters, decide_run
from rightrank.report.answer import build_answers
from rightrank.report.figures import Figure, build_rank_figure
from rightrank.report.html import build_figures
from rightrank.schema.errors import MissingExtraError, ResultsError, SettingsError
from rightrank.schema.events import Records
from rightrank.schema.results import Decision
from tests.report.elements import Elements
from tests.report.runs import make_answered_run, make_run, write_answered_run, write_journal, write_records

Points: TypeAlias = dict[float, tuple[float, float, float]]  # x → value, lower and upper end of the whisker


@pytest.fixture(autouse=True)
def closed_figures() -> Iterator[None]:
    yield
    pyplot.close("all")


def draw(figure: Figure) -> Axes:
    return figure.plot(Canvas().subplots())


def draw_run(name: str, records: Records, decision: Decision | None = None) -> Axes:
    return draw(next(figure for figure in build_figures(records, decision) if figure.name == name))


def read_series(ax: Axes) -> dict[str, Points]:
    """Read the points of each labelled series with their whiskers."""
    series: dict[str, Points] = {}
    for container in ax.containers:
        line, _, bars = container.lines
        points = list(zip(*line.get_data(), strict=True))
        segments = bars[0].get_segments() if bars else [[(x, y), (x, y)] for x, y in points]
        ends = [(y, segment[0][1], segment[1][1]) for (_, y), segment in zip(points, segments, strict=True)]
        series[str(container.get_label())] = dict(zip([x for x, _ in points], ends, strict=True))
    for line in ax.lines:
        if not line.get_label().startswith("_"):
            series[str(line.get_label())] = {x: (y, y, y) for x, y in zip(*line.get_data(), strict=True)}
    return series


def find_series(ax: Axes, start: str) -> Points:
    return next(points for label, points in read_series(ax).items() if label.startswith(start))


def read_band(ax: Axes) -> tuple[float, float]:
    (patch,) = ax.patches
    low, high = patch.get_extents().transformed(ax.transData.inverted()).intervaly
    return float(low), float(high)


def list_ring_ranks(ax: Axes, start: str) -> list[float]:
    return [x for label, points in read_series(ax).items() if label.startswith(start) for x in points]


def test_the_rank_curve_is_the_decision() -> None:
    decision = decide_run(make_run())
    ax = draw(build_rank_figure(decision))
    points = find_series(ax, "best learning rate")
    trained = {e.rank: e for e in decision.ranks if e.rank > 0}
    assert {rank: value for rank, (value, _, _) in points.items()} == {rank: e.value for rank, e in trained.items()}
    reference = trained[decision.reference_rank].value
    low, high = read_band(ax)
    assert (low, high) == pytest.approx((reference, reference + decision.margin))
    # A rank is enough if its whisker ends inside the band.
    assert {rank: end < high for rank, (_, _, end) in points.items()} == {r: e.non_inferior for r, e in trained.items()}
    assert list_ring_ranks(ax, "chosen") == [decision.rank]
    (ring,) = (line for line in ax.lines if line.get_markerfacecolor() == "none")
    assert ring.get_zorder() < ax.containers[0].lines[0].get_zorder()  # it hides no point
    assert ax.get_xlabel() == "LoRA rank"
    base = next(e.value for e in decision.ranks if e.rank == 0)
    (shares,) = ax.child_axes  # 100% at the reference, 0% at the base
    to_share = shares._functions[0]
    assert [to_share(reference), to_share(base)] == pytest.approx([100, 0])


def test_adapters_are_drawn_by_method_with_their_paired_bounds() -> None:
    records = make_answered_run(direct=(1, 4, 16))
    ax = draw_run("adapters", records)
    series = {label.split()[0]: points for label, points in read_series(ax).items()}
    assert sorted(series["trained"]) == [1, 4, 16, 64]
    assert sorted(series["truncated"]) == [4, 8, 16, 32]
    compared = {(a.rank, a.method): a for a in compare_run_adapters(records)}
    high = read_band(ax)[1]
    inside = {(rank, method): series[method][rank][2] < high for rank, method in compared}
    assert inside == {key: adapter.is_within_margin for key, adapter in compared.items()}
    assert set(inside.values()) == {True, False}
    adapter, reference = compared[16, "truncated"], compared[64, "trained"]
    assert adapter.difference_low is not None
    assert adapter.difference_high is not None
    ends = reference.value + adapter.difference_low, reference.value + adapter.difference_high
    assert series["truncated"][16] == pytest.approx((adapter.value, *ends))
    answer = records.adapters[-1].answer
    assert list_ring_ranks(ax, f"exported: rank {answer.rank}, {answer.method}") == [answer.rank]


@pytest.mark.parametrize("name", plots.__all__)
def test_a_plot_takes_a_folder_or_a_result_and_draws_on_the_given_axes(name: str, tmp_path: Path) -> None:
    plot: Callable[..., Axes] = getattr(rightrank.plots, name)
    run = write_answered_run(tmp_path / "run", direct=(4, 16))
    records = make_answered_run(direct=(4, 16))
    top = next(trial for trial in records.list_finished() if trial.rank == 64)
    records.outcomes += [top.model_copy(update={"trial_id": "other", "learning_rate": 1e-3})]
    write_records(tmp_path / "two", [records.started, *records.outcomes, *records.adapters])
    selected = Selected(tmp_path / "two", None, None, run, build_answers(records, None, "adapter"))
    sources: Sequence[Any] = [str(tmp_path / "two"), selected]
    for source in sources:
        ax = Canvas().subplots()
        assert plot(source, ax=ax) is ax
        assert ax.get_title()
        assert plot(source) is not ax
    with pytest.raises(
        SettingsError, match=r"^int cannot be plotted; give a run folder, or the result of select_rank$"
    ):
        plot(3)
    with pytest.raises(ResultsError, match="there is nothing to plot yet"):
        plot(write_journal(tmp_path / "empty", upto=0))


TICKS = re.compile(r"text-anchor: end[^>]*>([^<]*)</text>")  # the numbers of the y axis


@pytest.mark.parametrize("low", [-1e9, 0.0, 10.6125, 1e13])
@pytest.mark.parametrize("span", [1e-7, 0.0015, 700.0, 3e9])
def test_no_two_ticks_of_an_axis_have_one_text(low: float, span: float) -> None:
    y = (low, low + max(span, 1e-12 * abs(low)))
    figure = Figure("ticks", "t", "x", "y", (), [], lambda ax: ax.plot((1, 4), y))
    texts = TICKS.findall(figure.svg)
    assert len(set(texts)) == len(texts) > 2


def test_names_from_outside_cannot_break_a_drawing() -> None:
    decision = decide_run(make_run()).model_copy(update={"metric": "a$b$ <script>\x07 & 'c' 字"})
    text = build_rank_figure(decision).svg
    shown = "".join(element.text or "" for element in ET.fromstring(text).iter())
    assert "<script" not in text
    assert "a$b$ <script>␇ & 'c' 字" in shown


def test_without_matplotlib_the_report_has_its_tables_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run = write_answered_run(tmp_path / "run", direct=(4, 16))
    hint = "figures need matplotlib; install it with: pip install 'rightrank[plots]'"
    elements = Elements(write_report(run).read_text(encoding="utf-8"))
    assert hint.capitalize() in elements.text
    assert "img" not in {tag for tag, _ in elements.tags}
    assert elements.text.count("Numbers and files") == len(list((run / "figures").iterdir())) > 2
    assert {path.suffix for path in (run / "figures").iterdir()} == {".csv"}
    links = [attributes.get("href") or "" for tag, attributes in elements.tags if tag == "a"]
    assert [link for link in links if link.startswith("figures") and not (run / link).exists()] == []
    with pytest.raises(MissingExtraError, match=re.escape(hint)):
        plots.rank_curve(run)
