"""Judging a run: blind pairs, and the choices of the page or a program."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rightrank import select_rank
from rightrank.plugins.judge.pairs import promptable_examples
from rightrank.train.generation import answers, write_completion
from tests.commands import run
from tests.helpers import make_runtime
from tests.tiny import small_settings

pytestmark = pytest.mark.trains


@pytest.fixture(scope="module")
def finished(model_folder: Path, completion_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("judged") / "run"
    settings = small_settings(device="cpu", max_new_tokens=8)
    select_rank(str(model_folder), completion_file, out, settings=settings)
    return out


def test_pairs_are_blind_and_judged(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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

    choices = {}
    for pair in map(json.loads, shown.splitlines()):
        assert sorted(pair) == ["a", "b", "id", "prompt"]
        lengths = len(pair["a"]), len(pair["b"])
        choices[pair["id"]] = "tie" if lengths[0] == lengths[1] else "a" if lengths[0] < lengths[1] else "b"
    (tmp_path / "oracle.json").write_text(json.dumps({"judge": "oracle", "choices": choices}))
    status, out, err = run(
        ["judge", str(finished), "--collect", str(tmp_path / "oracle.json"), "--margin", "0.4", "--json"], capsys
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


def test_a_sample_is_the_answer_within_max_new_tokens(
    model_folder: Path, completion_file: Path, tmp_path: Path
) -> None:
    runtime = make_runtime(model_folder, completion_file, small_settings(max_new_tokens=12), tmp_path / "cache")
    examples = promptable_examples(runtime, 3)
    by_id = {answer.item_id: answer.completion for answer in answers(runtime, "test")}
    assert [write_completion(runtime, example) for example in examples] == [by_id[e.item_id] for e in examples]
