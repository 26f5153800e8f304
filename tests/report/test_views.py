"""Test the views of a run: progress lines, the JSON log, `status`, completion, and the length of `--help`."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from filelock import FileLock
from rich.console import Console

import rightrank
from rightrank import TrialResult, TrialTask
from rightrank.api.folders import status
from rightrank.cli import cli
from rightrank.report.terminal import format_plan
from rightrank.report.terminal_curve import CURVE_LINES, draw_terminal_curve
from rightrank.runs.process import JsonLog, ProgressFile
from rightrank.runs.terminal_view import LiveView, View, make_view
from rightrank.schema.events import Notice, SelectionPlanned, StepDone
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
    assert (run_status.state, run_status.trials_ended) == ("stopped", 7)
    assert run_status.rank is not None
    assert [rank for rank, _ in run_status.curve] == [1, 4, 16, 64]
    assert (run / "journal.jsonl").read_bytes() == journal_bytes
    assert [path.name for path in run.iterdir() if path.name != ".lock"] == ["journal.jsonl"]


def test_while_a_process_works_status_shows_its_progress(tmp_path: Path) -> None:
    run = write_journal(tmp_path / "run")
    file = ProgressFile(run)
    file.on_event(PLANNED)
    file.on_event(STARTED)
    file.on_event(StepDone(trial_id="x", step=10, steps=40, loss=3.0, seconds=1.0))
    with FileLock(run / ".lock"):
        run_status = status(run)
    assert run_status.state == "running"
    assert run_status.running == "r=4 lr=0.001 seed=0"
    assert run_status.progress is not None
    assert "step 10/40" in run_status.progress
    assert status(run).progress is None  # the process is gone, its last report does not count
    file.__exit__(None, None, None)
    assert not (run / "progress.json").exists()


def test_status_on_the_command_line(tmp_path: Path) -> None:
    run = write_journal(tmp_path / "run")
    shown = CliRunner().invoke(cli, ["status", str(run)])
    assert shown.exit_code == 0
    assert shown.output.startswith(f"{run}: stopped\nTrain at rank ")
    assert "8 trainings so far." in shown.output
    assert f"resume:  rightrank select --out {run}" in shown.output
    answer = json.loads(CliRunner().invoke(cli, ["status", str(run), "--json"]).stdout)
    assert answer["trials_ended"] == 9


@pytest.mark.parametrize("command", ["status", "report"])
def test_a_folder_without_a_run_is_one_line(tmp_path: Path, command: str) -> None:
    completed = subprocess.run(
        [sys.executable, "-m", "rightrank", command, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert completed.returncode == 2
    assert completed.stdout == ""
    assert completed.stderr.startswith("rightrank: ")
    assert completed.stderr.count("\n") == 1


def test_the_log_is_one_json_object_a_line() -> None:
    stream = io.StringIO()
    records = make_run()
    log = JsonLog(stream)
    log.on_event(PLANNED)
    log.on_event(STARTED)
    for step in range(1, 41):
        log.on_event(StepDone(trial_id="x", step=step, steps=40, loss=3.0, seconds=1.0))
    log.on_event(records.outcomes[1])
    log.on_event(Notice(text="a\nb"))
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    names = [line["event"] for line in lines]
    assert names[:4] == ["plan", "cost", "cost_limit", "trial_started"]
    assert names[-2:] == ["trial_finished", "notice"]
    assert names.count("step_done") < 40
    assert [line["step"] for line in lines if line["event"] == "step_done"][-1] == 40
    assert all("at" in line and "example_losses" not in line for line in lines)


def test_a_live_view_needs_a_terminal_with_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert isinstance(make_view(False, Console(file=io.StringIO(), force_terminal=True)), LiveView)
    assert type(make_view(True, Console(file=io.StringIO(), force_terminal=True))) is View
    assert type(make_view(False, Console(file=io.StringIO()))) is View
    monkeypatch.setenv("NO_COLOR", "1")
    assert type(make_view(False, Console(file=io.StringIO(), force_terminal=True))) is View


@pytest.mark.parametrize("quiet", [True, False])
def test_plain_lines_contain_no_escape_and_quiet_prints_nothing(quiet: bool) -> None:
    stream = io.StringIO()
    records = make_run()
    with View(Console(file=stream), quiet) as view:
        view.on_event(PLANNED)
        for outcome in records.outcomes:
            view.on_event(outcome)
    assert "\x1b" not in stream.getvalue()
    assert (stream.getvalue() == "") == quiet


def test_the_live_view_shows_progress_the_best_and_the_time_left() -> None:
    stream = io.StringIO()
    records = make_run()
    with LiveView(Console(file=stream, force_terminal=True, width=100, height=40)) as view:
        view.on_event(PLANNED)
        for outcome in records.outcomes[:4]:
            view.on_event(outcome)
        view.on_event(STARTED)
        view.on_event(StepDone(trial_id="x", step=10, steps=40, loss=3.0, seconds=1.0))
        view._live.refresh()
        shown = stream.getvalue()
    for text in (
        " of about 6.0 trainings",
        "rank 4, learning rate 0.001",
        "step 10/40",
        "left",
        "best so far: rank",
        "GiB",
    ):
        assert text in shown


def test_the_validation_split_of_older_records_has_its_name() -> None:
    started = make_run().started
    splits = {"train": started.data.splits["train"], "validation": started.data.splits["train"]}
    shown = format_plan(started.model_copy(update={"data": started.data.model_copy(update={"splits": splits})}), 40)
    assert shown.startswith("examples: 30 train, 30 validation; ")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_screen_and_ends_with_an_example(command: str) -> None:
    shown = CliRunner().invoke(cli, [command, "--help"], terminal_width=100).output.rstrip()
    lines = shown.splitlines()
    assert len(lines) <= {"select": 76, "plan": 55, "compare": 36}.get(
        command, 35
    )  # one line for each option, two for each group
    assert lines[-1].strip().startswith(("Example: rightrank", "Example: eval"))


def test_the_commands_have_few_options() -> None:
    parameters = [parameter for command in COMMANDS.values() for parameter in command.params]
    assert sum(isinstance(parameter, click.Option) for parameter in parameters) <= 110


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


def test_a_truncation_at_the_place_of_a_trained_adapter_is_seen() -> None:
    legend, *rows, _ = draw_terminal_curve([(1, 3.2), (16, 3.0)], 72, [(4, 3.1), (16, 3.0)], label="loss")
    assert ["".join(rows).count(sign) for sign in "●○◉"] == [1, 1, 1]
    assert legend == "loss; ● trained, ○ truncated, ◉ both"


def test_every_terminal_curve_says_which_direction_is_better(tmp_path: Path) -> None:
    label = "\nheld-out loss, nats (lower is better)"
    run = write_journal(tmp_path / "run")
    assert label in CliRunner().invoke(cli, ["status", str(run)]).output
    assert label in CliRunner().invoke(cli, ["decide", str(run)]).output
    stream, records = io.StringIO(), make_run()
    higher = records.started.model_copy(update={"metric": "accuracy", "higher_is_better": True})
    with LiveView(Console(file=stream, force_terminal=True, width=100, height=40)) as view:
        view.on_event(PLANNED.model_copy(update={"started": higher}))
        for outcome in records.outcomes:
            view.on_event(outcome)
    assert "held-out accuracy (higher is better)" in stream.getvalue()


def test_ranks_have_a_logarithmic_axis_in_the_terminal() -> None:
    line = draw_terminal_curve([(1, 3.2), (4, 3.1), (64, 3.0)], 72, label="loss")[-1]
    columns = [line.index(f" {rank}") for rank in ("1", "4", "64")]
    share = (columns[1] - columns[0]) / (columns[2] - columns[0])
    assert share == pytest.approx(2 / 6, abs=0.05)  # log2: 0, 2, 6


@pytest.mark.parametrize("width", [24, 40, 200])
@pytest.mark.parametrize("values", [(3.2, 3.1, 3.0), (0.5, 0.5, 0.5), (-1e-7, 1e6, 4.0)])
def test_the_terminal_curve_stays_in_its_width_and_shows_every_rank(width: int, values: tuple[float, ...]) -> None:
    points = list(zip((1, 8, 512), values, strict=True))
    label = "held-out loss, nats (lower is better)"
    lines = draw_terminal_curve(points, width, [(64, values[1])], label=label)
    assert max(map(len, lines)) <= width
    assert len(lines) == CURVE_LINES
    assert [sum(line[1:].count(sign) for line in lines[1:]) for sign in "●○"] == [3, 1]


def test_scores_of_a_custom_trainer_stand_below_the_metric_that_they_are_of(tmp_path: Path) -> None:
    def train(task: TrialTask) -> TrialResult:
        scores = [number / task.rank for number in range(20)]
        return TrialResult(metrics={"accuracy": 0.5, "loss": sum(scores) / 20}, example_scores=scores)

    selected = rightrank.select_rank_with(train, tmp_path / "run", ranks=(1, 4), learning_rates=(1e-3,))
    table = selected.to_pandas(examples=True)
    assert "accuracy" not in table.columns
    assert list(table[table["rank"] == 4].loss) == [number / 4 for number in range(20)]
    assert set(selected.to_pandas().accuracy) == {0.5}


def test_the_table_of_a_folder_and_of_what_select_returns(tmp_path: Path) -> None:
    run = write_answered_run(tmp_path / "run")
    table = rightrank.to_pandas(run)
    assert list(table.columns[:7]) == ["trial_id", "stage", "rank", "learning_rate", "lora_alpha", "seed", "steps"]
    assert any(stage.startswith("truncated") for stage in table.stage)
    of_examples = rightrank.to_pandas(run, examples=True)
    assert set(of_examples.trial_id) == set(table[table.status == "finished"].trial_id)
