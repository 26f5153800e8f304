"""Test figures as data. Drawings are only tested to be images."""

from __future__ import annotations

import csv
import re
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest

from rightrank.api.folders import write_report
from rightrank.decision.records import Records, decide_if_possible, decide_run
from rightrank.report.figure import Axis, Figure, Series, compute_log_ticks
from rightrank.report.figures import build_figures, build_margin_steps, build_rank_figure
from rightrank.report.svg import render_inline_svg, render_svg_file, write_figures
from rightrank.schema.decision import Decision
from rightrank.schema.errors import MissingExtraError, SettingsError
from tests.report.runs import make_answered_run, make_run, write_answered_run


def make_decision() -> Decision:
    return decide_run(make_run())


def find_figure(name: str, records: Records, decision: Decision | None = None) -> Figure:
    return next(figure for figure in build_figures(records, decision) if figure.name == name)


def test_rank_figure_is_the_decision() -> None:
    decision = make_decision()
    figure = build_rank_figure(decision)
    values = {e.rank: e.value for e in decision.ranks if e.rank > 0}
    assert dict(zip(figure.series[0].x, figure.series[0].y, strict=True)) == values
    reference = values[decision.reference_rank]
    assert (figure.bands[0].low, figure.bands[0].high) == (reference, reference + decision.margin)
    chosen = [mark for mark in figure.marks if mark.label.startswith("chosen")]
    assert [mark.x for mark in chosen] == [decision.rank]


def test_a_whisker_inside_the_band_is_a_rank_that_is_enough() -> None:
    decision = make_decision()
    figure = build_rank_figure(decision)
    inside = {x: high < figure.bands[0].high for x, high in zip(figure.series[0].x, figure.series[0].high, strict=True)}
    assert inside == {e.rank: e.non_inferior for e in decision.ranks if e.rank > 0}


def test_steps_agree_with_the_rule_at_every_margin_of_the_staircase() -> None:
    decision = make_decision()
    steps = build_margin_steps(decision)
    assert len({rank for _, rank in steps}) > 1
    for step in decision.staircase:
        assert [rank for needed, rank in steps if needed <= step.margin][-1] == step.rank


def test_diminishing_rank_is_where_doublings_stop_to_pay() -> None:
    # 3 + 0.2/r: from 1 to 4 a doubling gains 0.075, from 4 to 16 0.019, from 16 on less
    marks = {mark.label: mark.x for mark in build_rank_figure(make_decision()).marks}
    assert marks["doubling gains less than the margin"] == 4


def test_memory_draws_like_beside_like() -> None:
    """Draw the plan next to the measurement on CUDA, but not on a CPU, where the measurement covers the entire process."""
    records = make_run()
    records.outcomes = [
        outcome.model_copy(update={"predicted_peak_bytes": 2**31}) if outcome.rank == 4 else outcome
        for outcome in records.outcomes
    ]
    figure = find_figure("memory", records)
    assert figure.title == "Peak memory of a training, entire process"
    assert [series.label for series in figure.series] == ["measured"]
    assert figure.y.limits is not None
    assert figure.y.limits[0] == 0
    assert "planned, tensors only, MiB" in figure.columns
    assert 2048.0 in {row[2] for row in figure.rows}
    environment = records.started.environment | {"device": "cuda"}
    records.started = records.started.model_copy(update={"environment": environment})
    on_cuda = find_figure("memory", records)
    assert [series.label for series in on_cuda.series] == ["measured", "planned"]
    assert on_cuda.series[1].y == (2048.0,)


def test_a_truncation_and_a_stopped_training_are_not_among_the_trainings() -> None:
    records = make_run((4, 16), (1e-3,))
    parent = records.list_finished()[-1]
    truncated = parent.model_copy(
        update={"trial_id": "truncated", "rank": 1, "steps": 0, "truncate_from": parent.trial_id, "value": 9.0}
    )
    early = parent.model_copy(update={"trial_id": "early", "learning_rate": 3e-3, "stop_at": 5})
    records.outcomes += [truncated, early]
    memory = find_figure("memory", records)
    assert memory.series[0].x == (4, 16)


def test_learning_curves_have_the_training_loss_between_evaluations() -> None:
    records = make_run()
    figure = find_figure("learning_curves", records, decide_run(records))
    held_out, training = (next(s for s in figure.series if s.dashed == dashed) for dashed in (False, True))
    assert held_out.x == (0, 10, 20, 40)
    assert training.x == (10, 20, 40)
    assert figure.title == "Learning curves (training dashed)"


def test_a_training_loss_of_one_evaluation_is_in_the_table_of_the_learning_curves_alone() -> None:
    records = make_run((4,), (1e-3,))
    trial = records.list_finished()[-1]
    records.outcomes[-1] = trial.model_copy(update={"points": trial.points[-1:]})
    figure = find_figure("learning_curves", records)
    assert [series.dashed for series in figure.series] == [False]
    assert figure.title == "Learning curves"
    assert figure.rows[-1][-1] == trial.points[-1].train_value


def test_learning_curves_have_the_values_at_which_a_training_was_stopped() -> None:
    records = make_run((4,), (1e-3,))
    trial = records.list_finished()[-1]
    first = trial.model_copy(update={"trial_id": "first", "stop_at": 3, "metrics": {"loss": 4.0}, "points": []})
    second = first.model_copy(
        update={"trial_id": "second", "stop_at": 5, "continue_from": "first", "metrics": {"loss": 3.9}}
    )
    resumed = trial.model_copy(update={"continue_from": "second"})
    records.outcomes[-1:] = [first, second, resumed]
    figure = find_figure("learning_curves", records)
    assert figure.series[0].x == (0, 3, 5, 10, 20, 40)
    assert figure.series[0].y[1:3] == (4.0, 3.9)


def test_ticks_of_a_logarithmic_axis() -> None:
    assert compute_log_ticks(0.0009, 0.2) == (0.001, 0.01, 0.1)
    assert compute_log_ticks(0.003, 0.06) == (0.005, 0.01, 0.02, 0.05)


@pytest.mark.parametrize("ranks", [(), (4,), (4, 8)])
def test_few_trials_give_the_figures_that_there_are(ranks: tuple[int, ...]) -> None:
    records = make_run(ranks)
    names = {figure.name for figure in build_figures(records, decide_if_possible(records))}
    assert ("rank_curve" in names) == (len(ranks) == 2)
    assert ("time" in names) == bool(ranks)


def test_every_figure_is_written_as_svg_and_csv(tmp_path: Path) -> None:
    records = make_run()
    figures = build_figures(records, decide_run(records))
    write_figures(tmp_path, figures)
    for figure in figures:
        ET.parse(tmp_path / f"{figure.name}.svg")
        rows = list(csv.reader(StringIO((tmp_path / f"{figure.name}.csv").read_text())))
        assert rows[0] == list(figure.columns)
        assert len(rows) == len(figure.rows) + 1
    assert render_svg_file(figures[0]) == render_svg_file(figures[0])


def test_further_formats_of_every_figure(tmp_path: Path) -> None:
    run = write_answered_run(tmp_path / "run")
    write_report(run, ["pdf", "png"])
    names = {path.stem for path in (run / "figures").glob("*.svg")}
    assert names
    for ending, begins in (("pdf", b"%PDF-"), ("png", b"\x89PNG")):
        files = list((run / "figures").glob(f"*.{ending}"))
        assert {path.stem for path in files} == names
        assert all(path.read_bytes().startswith(begins) for path in files)
    with pytest.raises(SettingsError, match=r"not a supported figure format; give pdf, png or both"):
        write_report(run, ["gif"])


def test_a_format_without_its_extra_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'rightrank\[figures\]'"):
        write_report(write_answered_run(tmp_path / "run"), ["pdf"])


NUMBERS = re.compile(r'<text [^>]*text-anchor="end"[^>]*>([^<]*)</text>')  # those of the y axis


@pytest.mark.parametrize("low", [-1e9, -3.0, 0.0, 0.012345, 10.6125, 123456.0, 1e9, 1e13])
@pytest.mark.parametrize("span", [1e-7, 0.0015, 0.02, 1.0, 700.0, 2e6, 3e9])
def test_no_two_ticks_of_an_axis_have_one_text(low: float, span: float) -> None:
    y = (low, low + max(span, 1e-12 * abs(low)))
    figure = replace(
        build_rank_figure(make_decision()), y=Axis("y", limits=y), series=(Series("s", (1, 4), y),), marks=(), bands=()
    )
    texts = NUMBERS.findall(render_inline_svg(replace(figure, levels=())))
    assert len(texts) > 2
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("metric", ["loss", "accuracy"])
def test_the_axis_of_a_metric_says_which_direction_is_better(metric: str) -> None:
    records = make_answered_run(direct=(4, 16))
    higher = metric == "accuracy"
    records.started = records.started.model_copy(update={"metric": metric, "higher_is_better": higher})
    changes = {"metrics": {metric: 0.5, "loss": 3.0}}
    records.outcomes = [outcome.model_copy(update=changes) for outcome in records.outcomes]
    decision = decide_run(records)
    assert decision.higher_is_better == higher
    figures = {figure.name: figure for figure in build_figures(records, decision)}
    for name in ("rank_curve", "adapters", "learning_curves"):
        assert figures[name].y.label.endswith("(higher is better)" if higher else "(lower is better)")
        assert f">{figures[name].y.label}</text>" in render_inline_svg(figures[name])


def test_learning_curves_of_another_metric_have_the_direction_of_that_metric() -> None:
    records = make_run((4, 16), (1e-3,))
    by_loss = {"metric": "accuracy", "higher_is_better": True, "points_metric": "loss"}
    records.started = records.started.model_copy(update=by_loss)
    assert find_figure("learning_curves", records).y.label == "held-out loss, nats (lower is better)"


def test_a_ring_hides_neither_a_point_nor_another_ring() -> None:
    figure = build_rank_figure(make_decision())
    first = figure.marks[0]
    drawing = render_inline_svg(replace(figure, marks=(first, replace(first, label="another", tone="second"))))
    kinds = [group.get("class", "").split()[0] for group in ET.fromstring(drawing).iter("g") if group.get("data-label")]
    assert kinds.index("series") > max(index for index, kind in enumerate(kinds) if kind == "ring")
    radii = [group[0].get("r") for group in ET.fromstring(drawing).iter("g") if "ring" in group.get("class", "")]
    assert len(set(radii)) == len(radii) == 2


def test_names_from_outside_can_not_break_a_drawing() -> None:
    decision = make_decision().model_copy(update={"metric": "a$b$ <script>\x07 & 'c'"})
    text = render_inline_svg(build_rank_figure(decision))
    ET.fromstring(text)
    assert "<script" not in text
    assert "a$b$ &lt;script&gt;␇ &amp; &#x27;c&#x27;" in text


def test_drawings_of_one_page_share_no_id() -> None:
    records = make_run()
    figures = build_figures(records, decide_run(records))
    ids = [
        element.get("id")
        for figure in figures
        for element in ET.fromstring(render_inline_svg(figure)).iter()
        if element.get("id")
    ]
    assert len(ids) == len(set(ids))
