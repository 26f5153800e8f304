"""Judging a run: blind pairs, a program that judges, choices from the page, and judgements of a custom trainer's run."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rightrank import TrialTask, select_rank, select_rank_with
from rightrank.plugins.judge.hook import JudgedBy
from rightrank.schema.errors import ResultsError
from tests.commands import run
from tests.tiny import small_settings

pytestmark = pytest.mark.trains

ORACLE = """\
import json, sys
for line in open(sys.argv[1]):
    pair = json.loads(line)
    assert sorted(pair) == ["a", "b", "id", "prompt"]
    lengths = len(pair["a"]), len(pair["b"])
    outcome = "tie" if lengths[0] == lengths[1] else "a" if lengths[0] < lengths[1] else "b"
    print(json.dumps({"id": pair["id"], "outcome": outcome}))
"""


@pytest.fixture(scope="module")
def finished(model_folder: Path, completion_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("judged") / "run"
    settings = small_settings(device="cpu", max_new_tokens=8)
    select_rank(str(model_folder), completion_file, out, settings=settings)
    return out


def test_pairs_are_blind_and_a_program_judges_them(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = run(["judge", str(finished), "--prompts", "8", "--json"], capsys)
    made = json.loads(out)
    assert status == 0
    assert made["judgements"] is None
    shown = Path(made["pairs"]).read_text()
    assert "rank" not in shown
    page = Path(made["page"]).read_text()
    assert "default-src 'none'" in page
    assert "rank_a" not in page
    key = json.loads((finished / "judging" / "key.json").read_text())
    assert len(key["pairs"]) == 8
    assert made["count"] == len(shown.splitlines()) == sum("same" not in one for one in key["pairs"].values())

    (tmp_path / "oracle.py").write_text(ORACLE)
    command = f"{sys.executable} {tmp_path / 'oracle.py'} {{file}}"
    status, out, err = run(
        ["judge", str(finished), "--command", command, "--judge", "oracle", "--margin", "0.4", "--json"], capsys
    )
    assert status == 0, err
    found = json.loads(out)
    assert found["metric"] == "win_rate"
    assert found["understood"] == ["8 judgements of 8 prompts by 1 judge"]
    rows = [json.loads(line) for line in Path(found["judgements"]).read_text().splitlines()]
    assert {row["judge"] for row in rows} == {"oracle"}
    status, out, _ = run(["decide", found["judgements"], "--margin", "0.4", "--json"], capsys)
    assert json.loads(out)["ranks"] == found["ranks"]

    choices = {name: "a" for name, pair in key["pairs"].items() if "same" not in pair}
    (tmp_path / "choices.json").write_text(json.dumps({"judge": "Ada", "choices": choices}))
    status, out, err = run(["judge", str(finished), "--collect", str(tmp_path / "choices.json"), "--json"], capsys)
    assert status == 0, err
    assert json.loads(out)["understood"] == ["16 judgements of 8 prompts by 2 judges"]


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"judge": "Ada", "choices": {"nosuchpair": "a"}}, "pair 'nosuchpair' is not one of this run's"),
        ({"choices": {}}, "no `judge` and `choices` in it"),
        ({"judge": "Ada", "choices": "a"}, "no `judge` and `choices` in it"),
    ],
)
def test_choices_that_cannot_be_used(
    choices: dict[str, Any], message: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(["judge", str(finished), "--prompts", "8"], capsys)
    file = tmp_path / "choices.json"
    file.write_text(json.dumps(choices))
    status, out, err = run(["judge", str(finished), "--collect", str(file)], capsys)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def train(task: TrialTask) -> dict[str, float]:
    (task.folder / "adapter.txt").write_text(str(task.rank))
    return {"loss": 1 / task.rank}


def oracle(folders: Mapping[int, Path]) -> list[dict[str, object]]:
    """Rank 4 answers as well as rank 16, rank 1 does not."""
    assert {(folder / "adapter.txt").read_text() for folder in folders.values()} == {"1", "4", "16"}
    even = [{"prompt": n, "rank_a": 4, "rank_b": 16, "outcome": "ab"[n % 2], "judge": "o"} for n in range(200)]
    return even + [{"prompt": n, "rank_a": 16, "rank_b": 1, "outcome": "a", "judge": "o"} for n in range(200)]


def test_judgements_decide_on_a_custom_trainers_run(tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "ranks": (1, 4, 16),
        "learning_rates": (1e-3,),
        "callbacks": [JudgedBy(oracle, margin=0.1)],
    }
    found = select_rank_with(train, tmp_path / "run", **given)
    assert (found.decision.rank, found.decision.metric, found.decision.verdict) == (4, "win_rate", "saturated")
    assert all(one.trial_ids for one in found.decision.ranks)
    assert json.loads((tmp_path / "run" / "decision.json").read_text())["rank"] == 4


def test_judgements_of_a_rank_that_was_not_trained_are_refused(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "rank_a": 8, "rank_b": 16, "outcome": "a"}]
    with pytest.raises(ResultsError, match="rank_a is 8, which was not trained; there are 4, 16"):
        select_rank_with(train, tmp_path / "run", ranks=(4, 16), learning_rates=(1e-3,), callbacks=[JudgedBy(rows)])
