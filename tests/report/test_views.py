"""Test the views of a run: progress lines, the JSON log, `status`, completion, and the length of `--help`."""

from __future__ import annotations

import io
import re
from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from rightrank.api.folders import status
from rightrank.cli import cli
from rightrank.report.format import CURVE_LINES, draw_terminal_curve
from rightrank.runs import hooks
from rightrank.runs.hooks import View
from rightrank.schema.events import SelectionPlanned, StepDone
from tests.commands import COMMANDS
from tests.report.elements import Elements
from tests.report.runs import STARTED, make_run, write_answered_run, write_journal

PLANNED = SelectionPlanned(
    started=make_run().started, expected_trials=9, steps=40, expected_trainings=6.0, trainings_at_most=9.0
)


def test_status_reports_the_run_and_changes_nothing(tmp_path: Path) -> None:
    run = write_journal(tmp_path / "run", upto=7)
    with (run / "journal.jsonl").open("a") as file:
        file.write('{"type": "trial_fin')  # another process is writing this very line
    journal_bytes = (run / "journal.jsonl").read_bytes()
    run_status = status(run)
    decision = run_status.answers.decision
    assert run_status.state == "stopped"
    assert decision is not None
    assert decision.rank is not None
    assert (run / "journal.jsonl").read_bytes() == journal_bytes
    assert [path.name for path in run.iterdir() if path.name != ".lock"] == ["journal.jsonl"]


@pytest.mark.parametrize("quiet", [True, False])
def test_plain_lines_contain_no_escape_and_quiet_prints_nothing(quiet: bool) -> None:
    stream = io.StringIO()
    records = make_run()
    with View(quiet, Console(file=stream)) as view:
        view.on_event(PLANNED)
        for outcome in records.outcomes:
            view.on_event(outcome)
    assert "\x1b" not in stream.getvalue()
    assert (stream.getvalue() == "") == quiet


def test_a_plain_view_prints_each_state_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "PLAIN_SECONDS", -1.0)
    stream = io.StringIO()
    step = StepDone(trial_id="x", step=10, steps=40, loss=3.0, seconds=1.0)
    with View(console=Console(file=stream)) as view:
        for event in (PLANNED, STARTED, step, step):
            view.on_event(event)
    assert stream.getvalue().count("step 10/40") == 1


def test_the_live_view_shows_progress_and_the_time_left() -> None:
    stream = io.StringIO()
    records = make_run()
    with View(console=Console(file=stream, force_terminal=True, width=100, height=40)) as view:
        view.on_event(PLANNED)
        for outcome in records.outcomes[:4]:
            view.on_event(outcome)
        view.on_event(STARTED)
        view.on_event(StepDone(trial_id="x", step=10, steps=40, loss=3.0, seconds=1.0))
        view._live.refresh()
        shown = stream.getvalue()
    for text in (" of about 6.0 trainings", "rank 4, learning rate 0.001", "step 10/40", "left"):
        assert text in shown


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_screen_and_ends_with_an_example(command: str) -> None:
    shown = CliRunner().invoke(cli, [command, "--help"], terminal_width=100).output.rstrip()
    lines = shown.splitlines()
    assert len(lines) <= {"select": 76, "plan": 55, "compare": 36}.get(
        command, 35
    )  # one line for each option, two for each group
    assert lines[-1].strip().startswith(("Example: rightrank", "Example: eval"))


def test_every_link_of_a_report_is_a_file_beside_it(tmp_path: Path) -> None:
    run = write_answered_run(tmp_path / "run")
    (run / "adapter").mkdir()
    (run / "exports" / "vllm").mkdir(parents=True)
    assert CliRunner().invoke(cli, ["report", str(run)]).exit_code == 0
    elements = Elements((run / "report.html").read_text(encoding="utf-8"))
    links = {attributes.get("href") or "" for tag, attributes in elements.tags if tag == "a"}
    assert {"adapter/", "exports/vllm/", "figures/learning_curves.csv", "figures/adapters.svg"} <= links
    assert [link for link in links if not (run / link).exists()] == []


TICK = re.compile(r"^ *(\S+)┤", re.MULTILINE)


@pytest.mark.parametrize(
    "values", [(10.6275, 10.6126, 10.613), (3.2, 3.1, 3.0), (-1e-7, 1e6, 4.0), (1e20, 1e20, 1e20), (0.0, 0.0, 0.0)]
)
def test_no_two_ticks_of_the_terminal_curve_have_one_text(values: tuple[float, ...]) -> None:
    drawing = "\n".join(draw_terminal_curve(list(zip((1, 4, 16), values, strict=True)), 72, label="loss"))
    ticks = TICK.findall(drawing)
    assert len(set(ticks)) == len(ticks) == 4
    steps = [high - low for low, high in pairwise(sorted(map(float, ticks)))]
    assert max(steps) < 1.1 * min(steps)


@pytest.mark.parametrize("width", [24, 40, 200])
@pytest.mark.parametrize("values", [(3.2, 3.1, 3.0), (0.5, 0.5, 0.5), (-1e-7, 1e6, 4.0)])
def test_the_terminal_curve_stays_in_its_width_and_shows_every_rank(width: int, values: tuple[float, ...]) -> None:
    points = list(zip((1, 8, 512), values, strict=True))
    label = "held-out loss, nats (lower is better)"
    lines = draw_terminal_curve(points, width, [(64, values[1])], label=label)
    assert max(map(len, lines)) <= width
    assert len(lines) == CURVE_LINES
    assert [sum(line[1:].count(sign) for line in lines[1:]) for sign in "●○"] == [3, 1]
