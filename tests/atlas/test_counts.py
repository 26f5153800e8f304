"""Test `expect`: similar sweeps are counted, with their addresses, and nothing is invented."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import rightrank
from rightrank.atlas.counts import RANKS, load_atlas
from rightrank.cli import cli
from rightrank.schema.errors import SettingsError

ROOT = Path(__file__).parents[2]
AT_ONCE = """
import sys, time
sys.path[:0] = [sys.argv[1] + "/src"]
from rightrank.cli import cli
cli(["expect", "Qwen/Qwen2.5-1.5B", "--task", "language"], standalone_mode=False)
print([n for n in ("torch", "transformers", "numpy", "pandas") if n in sys.modules], time.process_time())
"""


def test_every_count_is_of_sweeps_that_agree_in_all_that_is_asked() -> None:
    answer = rightrank.expect("1.5B", task="language", metric="eval_loss", rows=1000)
    assert answer.next_command == "rightrank select MODEL DATA"
    like = [
        sweep
        for sweep in load_atlas().sweeps
        if sweep.family == "language"
        and sweep.kind == "loss"
        and sweep.parameters
        and 1 / 4 <= 1.5e9 / sweep.parameters <= 4
        and sweep.rows
        and 1 / 10 <= 1000 / sweep.rows <= 10
    ]
    assert answer.sweeps == len(like) == sum(answer.sources.values()) > 0
    assert [rank["rank"] for rank in answer.ranks] == list(RANKS)
    for count in answer.ranks:
        verdicts = [is_enough for sweep in like if (is_enough := sweep.is_enough(count["rank"])) is not None]
        assert (count["enough_in"], count["of"]) == (sum(verdicts), len(verdicts))
    addresses = {source["address"] for source in load_atlas().sources.values()}
    assert answer.sources.keys() <= addresses


def test_a_divergence_curve_is_never_counted() -> None:
    assert any(row.diverges for row in load_atlas().sweeps)
    assert rightrank.expect().sweeps == sum(not row.diverges for row in load_atlas().sweeps)


def test_where_nothing_is_like_it_less_is_asked_and_a_note_says_so() -> None:
    expectation = rightrank.expect(task="vision", rows=10**12)
    assert expectation.like == "vision"
    assert expectation.sweeps == rightrank.expect(task="vision").sweeps
    assert any(
        "no sweep of the atlas matches the question (vision, about 1e+03B rows)" in note for note in expectation.notes
    )
    unknown = rightrank.expect("my-own-net")
    assert unknown.sweeps == rightrank.expect().sweeps
    assert any("the size of my-own-net is unknown" in note for note in unknown.notes)


@pytest.mark.parametrize(
    ("inputs", "complaint"),
    [
        ({"rows": 0}, "rows is 0"),
        ({"ranks": (0, 4)}, "rank 0 is not valid; give ranks of at least 1"),
        ({"task": "poems"}, "'poems' is not a task family of the atlas; allowed families: language"),
        ({"data": "nowhere.jsonl"}, r"nowhere\.jsonl does not exist"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_cannot_be_is_refused_in_one_line(inputs: dict[str, object], complaint: str) -> None:
    with pytest.raises(SettingsError, match=complaint) as refused:
        rightrank.expect(**inputs)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "model", "like", "command"),
    [
        ("rows.jsonl", ["bert-base-uncased"], ", about 110M parameters", "bert-base-uncased rows.jsonl"),
        ("rows.csv", ["bert-base-uncased"], ", about 110M parameters", "bert-base-uncased rows.csv"),
        ("rows.jsonl", [], "", "MODEL rows.jsonl"),
    ],
)
def test_data_give_rows_and_family(
    name: str, model: list[str], like: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    row = json.dumps({"text": "word", "label": 1}) if name.endswith("jsonl") else "word,1"
    header = "" if name.endswith("jsonl") else "text,label\n"
    Path(name).write_text(header + f"{row}\n" * 5000, encoding="utf-8")
    shown = CliRunner().invoke(cli, ["expect", *model, name, "--ranks", "4,16,64", "--json"])
    assert shown.exit_code == 0, shown.output
    answer = json.loads(shown.output)
    assert answer["like"] == f"classification{like}, about 5k rows"
    assert [rank["rank"] for rank in answer["ranks"]] == [4, 16, 64]
    assert answer["sources"]
    assert answer["next_command"] == f"rightrank select {command}"


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"no json\n", b"[1, 2]\n"])
def test_a_file_that_is_no_rows_is_refused(content: bytes, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_bytes(content)
    with pytest.raises(SettingsError, match=r"rows\.jsonl.*give a \.jsonl or \.csv file"):
        rightrank.expect(data=data)


def test_the_answer_comes_at_once_and_without_torch() -> None:
    last = subprocess.run(
        [sys.executable, "-c", AT_ONCE, str(ROOT)], capture_output=True, text=True, check=True
    ).stdout.splitlines()[-1]
    heavy, seconds = last.split(" ")
    assert heavy == "[]"
    assert float(seconds) < 2
