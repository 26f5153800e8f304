"""Test the command `rightrank decide`: its JSON, its exit statuses, and its output for people."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest
from click.testing import CliRunner

from rightrank.cli import cli, main
from rightrank.cli.run_commands import EXAMPLE_FILE
from tests.commands import run

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


def test_the_example_holds_the_values_of_a_stored_grid() -> None:
    answer = CliRunner().invoke(cli, ["decide", "--example"])
    assert answer.exit_code == 0
    for text in ("saturated:  Rank 16", str(EXAMPLE_FILE), "rightrank decide runs.csv"):
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


def test_a_table_has_a_report(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = table.parent / "new" / "page.html"
    table.write_text(
        "rank,eval_loss,lr,seed\n1,2.3,1e-3,0\n4,2.05,1e-3,0\n16,2.001,1e-3,0\n64,2.0,1e-3,0\n128,,1e-3,0\n"
    )
    command = ["decide", str(table), "--margin", "0.01", "--report", str(page), "--lower-is-better"]
    assert run(command, capsys)[0] == 0
    text = page.read_text(encoding="utf-8")
    for snippet in ("Rank 16", "runs.csv", "2.0500", "the table has no result"):
        assert snippet in text, snippet
    assert f"rightrank decide {table} --margin 0.01 --report {page} --lower-is-better" in text
    assert 'href="figures' not in text  # no other file is next to the report


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--margin", "0"], "margin: got '0'; give a share of the gain such as 1%"),
        (["--margin", "nan"], "margin: got 'nan'; give a share of the gain such as 1%"),
        (["--metric", "nothing_like_it", "--columns", "value=x"], "has no column 'x'"),
        (["--columns", "rank"], "give NAME=COLUMN"),
        (["--report", "page.pdf"], "give a path that ends in .html"),
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


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Commands:\n" in err
