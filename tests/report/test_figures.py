"""Figures are checked as data; what is drawn from them is only checked to be an image."""

from __future__ import annotations

import csv
import xml.etree.ElementTree as ET
from io import StringIO
from pathlib import Path

import pytest

from rightrank.decision.run import decide_run, decision_so_far
from rightrank.report.curves import MAX_POINTS, MAX_TRAININGS, averaged, learning_figure, smoothed, training_loss_figure
from rightrank.report.figure import Figure, HeatMap, log_ticks, to_csv
from rightrank.report.figures import (
    diminishing_rank,
    figures_of,
    learning_rate_map,
    margin_steps,
    memory_figure,
    rank_at,
    rank_figure,
)
from rightrank.report.svg import inline_svg, svg_file, write_figures
from rightrank.schema.decision import Decision
from tests.report.runs import made_up_run


def decision() -> Decision:
    return decide_run(made_up_run())


def test_rank_figure_is_the_decision() -> None:
    made = decision()
    figure = rank_figure(made)
    values = {e.rank: e.value for e in made.ranks if e.rank > 0}
    assert dict(zip(figure.series[0].x, figure.series[0].y, strict=True)) == values
    reference = values[made.reference_rank]
    assert (figure.bands[0].low, figure.bands[0].high) == (reference, reference + made.margin)
    chosen = [mark for mark in figure.marks if mark.label.startswith("chosen")]
    assert [mark.x for mark in chosen] == [made.rank]


def test_a_whisker_inside_the_band_is_a_rank_that_is_enough() -> None:
    made = decision()
    figure = rank_figure(made)
    inside = {x: high < figure.bands[0].high for x, high in zip(figure.series[0].x, figure.series[0].high, strict=True)}
    assert inside == {e.rank: e.non_inferior for e in made.ranks if e.rank > 0}


def test_steps_agree_with_the_rule_at_every_margin_of_the_staircase() -> None:
    made = decision()
    steps = margin_steps(made)
    assert len({rank for _, rank in steps}) > 1
    for step in made.staircase:
        assert rank_at(steps, step.margin) == step.rank


def test_diminishing_rank_is_where_doublings_stop_to_pay() -> None:
    # 3 + 0.2/r: from 1 to 4 a doubling gains 0.075, from 4 to 16 0.019, from 16 on less
    assert diminishing_rank(decision()) == 4


def test_learning_rate_map_marks_the_best_and_the_cells_without_result() -> None:
    found = learning_rate_map(made_up_run(diverged=[(64, 3e-3)]))
    assert found is not None
    assert found.best == (1, 1, 1, 0)
    assert found.values[3][1] is None
    assert found.notes[3][1] == "no result"
    assert found.shade(min(v for row in found.values for v in row if v is not None)) == 1


def test_memory_draws_like_beside_like() -> None:
    """On CUDA the plan beside the measurement; on a CPU the measurement is of the process, and the plan is among the numbers."""
    records = made_up_run()
    records.outcomes = [
        outcome.model_copy(update={"predicted_peak_bytes": 2**31}) if outcome.rank == 4 else outcome
        for outcome in records.outcomes
    ]
    figure = memory_figure(records)
    assert figure is not None
    assert figure.title == "Peak memory of a training, whole process"
    assert [series.label for series in figure.series] == ["measured"]
    assert figure.y.limits is not None
    assert figure.y.limits[0] == 0
    assert "planned, tensors only, MiB" in figure.columns
    assert 2048.0 in {row[2] for row in figure.rows}
    environment = records.started.environment | {"device": "cuda"}
    records.started = records.started.model_copy(update={"environment": environment})
    on_cuda = memory_figure(records)
    assert on_cuda is not None
    assert [series.label for series in on_cuda.series] == ["measured", "planned"]
    assert on_cuda.series[1].y == (2048.0,)


def test_a_truncation_and_a_stopped_training_are_not_among_the_trainings() -> None:
    records = made_up_run((4, 16), (1e-3,))
    parent = records.finished()[-1]
    truncated = parent.model_copy(
        update={"trial_id": "truncated", "rank": 1, "steps": 0, "truncate_from": parent.trial_id, "value": 9.0}
    )
    early = parent.model_copy(update={"trial_id": "early", "learning_rate": 3e-3, "stop_at": 5})
    records.outcomes += [truncated, early]
    found = learning_rate_map(records)
    assert found is not None
    assert found.row_names == ("4", "16")
    assert found.notes[1] == ("", "stopped at step 5")
    memory = memory_figure(records)
    assert memory is not None
    assert memory.series[0].x == (4, 16)


def test_training_losses_are_averaged_over_groups_and_smoothed() -> None:
    assert averaged([3.0, 2.0, 1.0]) == {1.0: 3.0, 2.0: 2.0, 3.0: 1.0}
    curve = averaged([float(step) for step in range(1, 251)])
    assert len(curve) == 84 <= MAX_POINTS
    assert (curve[2.0], curve[5.0]) == (2.0, 5.0)  # steps 1 to 3, 4 to 6
    mean = smoothed({float(step): float(step == 20) for step in range(40)}, 4)
    assert [place for place, value in mean.items() if value > 0] == [18, 19, 20, 21, 22]
    assert mean[20] == pytest.approx(1 / 5)
    assert smoothed({}, 4) == {}


def test_training_loss_is_shown_for_every_training() -> None:
    records = made_up_run()
    trials = [trial for trial in records.finished() if trial.rank > 0]
    stopped = trials[-1].model_copy(update={"trial_id": "stopped", "stop_at": 10, "train_losses": [5.0] * 10})
    longer = stopped.model_copy(
        update={"trial_id": "longer", "stop_at": 20, "continue_from": "stopped", "train_losses": [5.0] * 20}
    )
    copy = stopped.model_copy(update={"trial_id": "copy", "anneal_from": 8, "continue_from": "longer"})
    recovered = stopped.model_copy(update={"trial_id": "r", "stop_at": None, "truncate_from": trials[-1].trial_id})
    records.outcomes += [stopped, longer, copy, recovered]
    figure = training_loss_figure(records)
    assert figure is not None
    assert len(figure.series) == len(trials) + 1 == len({series.label for series in figure.series})
    assert [max(series.x) for series in figure.series if series.dashed] == [20]
    assert {series.tone for series in figure.series if "rank 4 " in series.label} == {1}
    assert figure.columns[-2:] == ("training loss", "running mean")
    assert len(figure.rows) == 40 * len(trials) + 20


def test_of_many_trainings_the_best_of_each_rank_are_shown() -> None:
    figure = training_loss_figure(made_up_run((1, 2, 4, 8, 16), (1e-4, 1e-3, 1e-2), (0, 1)))
    assert figure is not None
    assert figure.title.endswith(f"({MAX_TRAININGS} of 30 trainings)")
    labels = [series.label for series in figure.series]
    assert len(labels) == MAX_TRAININGS
    assert sum("at 0.001," in label for label in labels) == 10  # both seeds of the best learning rate


def test_learning_curves_have_the_training_loss_of_every_step() -> None:
    records = made_up_run()
    figure = learning_figure(records, decide_run(records))
    assert figure is not None
    held, training = (next(s for s in figure.series if s.dashed == dashed) for dashed in (False, True))
    assert held.x == (0, 10, 20, 40)
    assert len(training.x) == 40
    without = [o.model_copy(update={"train_losses": []}) for o in records.finished()]
    records.outcomes = list(without)  # an older run: the mean since the last evaluation
    older = learning_figure(records, None)
    assert older is not None
    assert next(s for s in older.series if s.dashed).x == (10, 20, 40)
    assert training_loss_figure(records) is None


def test_learning_curves_have_the_values_at_which_a_training_was_stopped() -> None:
    records = made_up_run((4,), (1e-3,))
    whole = records.finished()[-1]
    first = whole.model_copy(update={"trial_id": "first", "stop_at": 3, "metrics": {"loss": 4.0}, "points": []})
    second = first.model_copy(
        update={"trial_id": "second", "stop_at": 5, "continue_from": "first", "metrics": {"loss": 3.9}}
    )
    resumed = whole.model_copy(update={"continue_from": "second"})
    records.outcomes[-1:] = [first, second, resumed]
    figure = learning_figure(records, None)
    assert figure is not None
    assert figure.series[0].x == (0, 3, 5, 10, 20, 40)
    assert figure.series[0].y[1:3] == (4.0, 3.9)


def test_ticks_of_a_logarithmic_axis() -> None:
    assert log_ticks(0.0009, 0.2) == (0.001, 0.01, 0.1)
    assert log_ticks(0.003, 0.06) == (0.005, 0.01, 0.02, 0.05)


@pytest.mark.parametrize("ranks", [(), (4,), (4, 8)])
def test_few_trials_give_the_figures_that_there_are(ranks: tuple[int, ...]) -> None:
    records = made_up_run(ranks)
    names = {figure.name for figure in figures_of(records, decision_so_far(records))}
    assert ("rank_curve" in names) == (len(ranks) == 2)
    assert ("time" in names) == bool(ranks)


def test_every_figure_is_written_as_svg_and_csv(tmp_path: Path) -> None:
    records = made_up_run()
    figures = figures_of(records, decide_run(records))
    write_figures(tmp_path, figures)
    for figure in figures:
        ET.parse(tmp_path / f"{figure.name}.svg")
        rows = list(csv.reader(StringIO((tmp_path / f"{figure.name}.csv").read_text())))
        assert rows[0] == list(figure.columns)
        assert len(rows) == len(figure.rows) + 1
    assert svg_file(figures[0]) == svg_file(figures[0])


def test_names_from_outside_can_not_break_a_drawing() -> None:
    made = decision().model_copy(update={"metric": "a$b$ <script>\x07 & 'c'"})
    text = inline_svg(rank_figure(made))
    ET.fromstring(text)
    assert "<script" not in text
    assert "a$b$ &lt;script&gt;␇ &amp; &#x27;c&#x27;" in text


def test_drawings_of_one_page_share_no_id() -> None:
    records = made_up_run()
    figures = [f for f in figures_of(records, decide_run(records)) if isinstance(f, Figure)]
    ids = [
        element.get("id")
        for figure in figures
        for element in ET.fromstring(inline_svg(figure)).iter()
        if element.get("id")
    ]
    assert len(ids) == len(set(ids))


def test_csv_of_a_map_has_a_column_per_learning_rate() -> None:
    found = learning_rate_map(made_up_run())
    assert isinstance(found, HeatMap)
    assert to_csv(found).splitlines()[0] == "rank,0.001,0.003"
