"""Test the command `rightrank decide`: its JSON, its exit statuses, and its output for people."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest
from click.testing import CliRunner

from rightrank import decide
from rightrank.cli import cli, main
from rightrank.cli.run_commands import EXAMPLE_FILE
from rightrank.schema.errors import ResultsError
from tests.report.runs import write_answered_run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "runs.csv"
    path.write_text("rank,eval_loss\n1,2.3\n4,2.05\n16,2.001\n64,2.0\n")
    return path


def test_json_has_exactly_the_documented_keys(table: Path) -> None:
    answer = CliRunner().invoke(cli, ["decide", str(table), "--margin", "0.005", "--json"])
    assert answer.exit_code == 0
    decision = json.loads(answer.stdout)
    assert {
        "rank",
        "verdict",
        "flags",
        "margin",
        "reference_rank",
        "staircase",
        "ranks",
        "input_notes",
    } <= decision.keys()
    assert (decision["rank"], decision["margin"], decision["reference_rank"]) == (16, 0.005, 64)
    assert {"margin", "rank"} <= decision["staircase"][0].keys()
    assert {"rank", "value", "low", "high", "non_inferior"} <= decision["ranks"][0].keys()


def test_the_table_shows_input_and_next_run(table: Path) -> None:
    answer = CliRunner().invoke(cli, ["decide", str(table), "--margin", "0.005"])
    assert answer.exit_code == 0
    for text in ("read:", "verdict: saturated", "answer:  Rank 16", "margins:", "next:", "underpowered"):
        assert text in answer.stdout


def test_the_example_holds_the_values_of_a_stored_grid() -> None:
    answer = CliRunner().invoke(cli, ["decide", "--example"])
    assert answer.exit_code == 0
    for text in ("answer:  Rank 16", str(EXAMPLE_FILE), "rightrank decide runs.csv"):
        assert text in answer.stdout
    with lzma.open(ROOT / "benchmarks" / "selection" / "seeded_grids.json.xz") as file:
        grids = {grid["id"]: grid["seed_grid"] for grid in json.load(file)["curves"]}
    lines = [
        f"{rank},{rate},{seed},{value}"
        for rank, rates in grids["glosses_long_400_steps"].items()
        for rate, seeds in rates.items()
        for seed, value in seeds.items()
    ]
    assert EXAMPLE_FILE.read_text(encoding="utf-8").split() == ["rank,lr,seed,eval_loss", *lines]
    for arguments in ([], ["runs.csv", "--example"]):
        assert "or --example alone" in str(CliRunner().invoke(cli, ["decide", *arguments]).exception)


def test_wins_against_a_fixed_reference_decide(tmp_path: Path) -> None:
    """Decide by two judgements per prompt, where a win counts 1, a tie 0.5 and a loss 0."""
    path, rows = tmp_path / "wins.csv", ["rank,seed,item,group,value"]
    for rank, wins in ((4, 0.2), (16, 0.45), (64, 0.45)):
        for prompt in range(300):
            value = 0.5 if prompt % 10 == 0 else float(prompt * 7 % 300 < wins * 300)
            rows += [f"{rank},0,{prompt}-{person},{prompt},{value}" for person in ("Ada", "Bo")]
    path.write_text("\n".join(rows) + "\n")
    answer = CliRunner().invoke(
        cli, ["decide", str(path), *["--metric", "win_rate", "--higher-is-better", "--margin", "0.05", "--json"]]
    )
    decision = json.loads(answer.stdout)
    assert (decision["rank"], decision["metric"], decision["higher_is_better"]) == (16, "win_rate", True)
    assert [row["non_inferior"] for row in decision["ranks"]] == [False, True, True]
    assert "300 groups of 600 examples" in decision["basis_note"]


def test_a_table_has_a_report(table: Path) -> None:
    page = table.with_name("page.html")
    table.write_text(
        "rank,eval_loss,lr,seed\n1,2.3,1e-3,0\n4,2.05,1e-3,0\n16,2.001,1e-3,0\n64,2.0,1e-3,0\n128,,1e-3,0\n"
    )
    command = ["decide", str(table), "--margin", "0.01", "--report", str(page), "--lower-is-better"]
    assert CliRunner().invoke(cli, command).exit_code == 0
    text = page.read_text(encoding="utf-8")
    for snippet in ("Rank 16", "runs.csv", "2.0500", "the table has no result", "Ranks other than 1, 4, 16, 64"):
        assert snippet in text, snippet
    assert f"rightrank decide {table} --margin 0.01 --lower-is-better" in text
    assert 'href="figures' not in text  # no other file is next to the report
    assert "test split" not in text.lower().split("what was not tested")[1].split("</section>")[0]


def test_scores_per_example_and_run_folders_have_reports(tmp_path: Path) -> None:
    rows = [{"rank": rank, "item": n, "value": 2 + n % 7 + 1 / rank} for rank in (1, 4, 16) for n in range(40)]
    decided = decide(rows, metric="eval_loss", margin=0.1)
    assert "variation over held-out examples" in decided.write_report(tmp_path / "page.html").read_text(
        encoding="utf-8"
    )
    run_result = decide(write_answered_run(tmp_path / "run", direct=(1, 4)))
    with pytest.raises(ResultsError, match="rightrank report RUN"):
        run_result.write_report(tmp_path / "other.html")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--margin", "0"], "margin 0 is not allowed"),
        (["--margin", "nan"], "margin nan is not allowed"),
        (["--metric", "nothing_like_it", "--columns", "value=x"], "has no column 'x'"),
        (["--columns", "rank"], "give NAME=COLUMN"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(
    table: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["decide", str(table), *arguments])
    assert ended.value.code == 2
    complaint = capsys.readouterr().err
    assert message in complaint
    assert complaint.count("\n") == 1


def test_a_metric_without_a_known_direction_is_bad_usage(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table.write_text(table.read_text().replace("eval_loss", "brier_gap"))
    with pytest.raises(SystemExit) as ended:
        main(["decide", str(table), "--metric", "brier_gap"])
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "give --higher-is-better or --lower-is-better" in captured.err
    assert captured.err.count("\n") == 1
    answer = CliRunner().invoke(cli, ["decide", str(table), "--metric", "brier_gap", "--lower-is-better", "--json"])
    assert json.loads(answer.stdout)["reference_rank"] == 64


@pytest.mark.parametrize("margin", ["1e-320", "1e308"])
def test_an_extreme_margin_gives_no_warnings(table: Path, margin: str, recwarn: pytest.WarningsRecorder) -> None:
    answer = CliRunner().invoke(cli, ["decide", str(table), "--margin", margin, "--json"])
    assert answer.exit_code == 0
    assert json.loads(answer.stdout)["rank"] == (64 if margin == "1e-320" else 1)
    assert answer.stderr == ""
    assert not recwarn.list


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Commands:\n" in err
