"""Test rows of preference pairs: their two forms, their splits, and which rows are omitted or refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from rightrank.data.forms import build_example
from rightrank.data.rows import Row
from rightrank.data.splits import DataSplits, load_data
from rightrank.schema.errors import DataError
from tests.tiny import build_small_settings, generate_sentences, write_jsonl

ROWS = [{"prompt": f"{text}: ", "chosen": "yes", "rejected": "no"} for text in sorted(set(generate_sentences(80)))]


def load_rows(tmp_path: Path, rows: list[dict[str, Any]], **changes: Any) -> DataSplits:
    return load_data(write_jsonl(tmp_path / "pairs.jsonl", rows), build_small_settings(**changes))


def make_messages(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(contents)]


def test_both_forms_are_read(tmp_path: Path) -> None:
    explicit = load_rows(tmp_path, ROWS)
    assert explicit.form == "preference"
    rows_with_prompt = [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in ROWS]
    first = next(iter(load_rows(tmp_path, rows_with_prompt).examples["train"])).content
    assert (first["chosen"], first["rejected"]) == (" yes", " no")  # the space belongs to the answers, as in TRL
    chats = [
        {"chosen": make_messages(row["prompt"], "yes"), "rejected": make_messages(row["prompt"], "no")} for row in ROWS
    ]
    for rows in (chats, [chat | {"prompt": row["prompt"]} for chat, row in zip(chats, ROWS, strict=True)]):
        content = next(iter(load_rows(tmp_path, rows).examples["train"])).content
        assert [message["role"] for message in content["prompt"]] == ["user"]
        assert content["chosen"] == [{"role": "assistant", "content": "yes"}]


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("a b c", "a b d"),
        ("a b", "a bc"),
        ("x", "y"),
        (make_messages("q", "a"), make_messages("q", "b")),
        (make_messages("q", "a"), make_messages("q")),
    ],
)
def test_the_implicit_prompt_agrees_with_trl(chosen: Any, rejected: Any) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed")
    theirs = trl.extract_prompt({"chosen": chosen, "rejected": rejected})
    row = Row({"chosen": chosen, "rejected": rejected}, "row 1")
    if not theirs["prompt"]:
        with pytest.raises(DataError, match="no common beginning"):
            build_example(row, "preference", ("chosen", "rejected"))
    else:
        assert build_example(row, "preference", ("chosen", "rejected")).content == theirs


def test_pairs_of_one_prompt_share_a_split(tmp_path: Path) -> None:
    rows = [row | {"rejected": wrong} for row in ROWS for wrong in ("no", "never", "not")]
    data = load_rows(tmp_path, rows, max_eval_examples=1000)
    prompts = {split: {example.content["prompt"] for example in examples} for split, examples in data.examples.items()}
    assert all(prompts.values())
    assert not prompts["train"] & (prompts["validation"] | prompts["test"])
    assert not prompts["validation"] & prompts["test"]


def test_equal_pairs_are_left_out_and_counted(tmp_path: Path) -> None:
    data = load_rows(tmp_path, [*ROWS, *(row | {"rejected": "yes"} for row in ROWS[:3])])
    assert data.summary.equal_pairs == 3
    assert data.summary.rows == len(ROWS) + 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, r":40: `rejected`: got nothing; give a string"),
        ({"chosen": "b", "rejected": "c"}, r":40: `prompt`: got nothing; give a string"),
        ({"prompt": "a", "chosen": 3, "rejected": "c"}, r":40: `chosen`: got an int; give a string"),
        (
            {"prompt": "a", "chosen": make_messages("b"), "rejected": "c"},
            r":40: `prompt`, `chosen` and `rejected` have diff",
        ),
        (
            {"prompt": make_messages("q"), "chosen": make_messages("b"), "rejected": make_messages("c")},
            r":40: `chosen` has no assistant turn",
        ),
        ({"prompt": "a", "chosen": [{"role": "x"}], "rejected": "c"}, r":40: `chosen`: a message needs a `role`"),
    ],
)
def test_a_broken_row_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=r"pairs\.jsonl" + message):
        load_rows(tmp_path, [*ROWS[:39], row, *ROWS[39:]])


def test_a_missing_column_is_answered_with_the_forms(tmp_path: Path) -> None:
    expected = ":1: the columns (`prompt`, `chosen`) fit no form; give `prompt`, `chosen`, `rejected`"
    with pytest.raises(DataError, match=re.escape(expected)):
        load_rows(tmp_path, [{"prompt": "a", "chosen": "b"}])


def test_a_prompt_column_with_another_name_is_found(tmp_path: Path) -> None:
    rows = [{"question": row["prompt"], "chosen": "yes", "rejected": "no"} for row in ROWS]
    data = load_rows(tmp_path, rows)
    assert data.summary.shape == "question → prompt"
    assert data.summary.renamed == {"prompt": "question"}
    assert next(iter(data.examples["train"])).content["prompt"] in {row["prompt"] for row in ROWS}
    renamed = [{"ask": row["prompt"], "good": "yes", "bad": "no"} for row in ROWS]
    splits = load_rows(tmp_path, renamed, columns=("prompt=ask", "chosen=good", "rejected=bad"))
    assert splits.fingerprint == load_rows(tmp_path, ROWS).fingerprint


def test_answers_without_a_prompt_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"pairs\.jsonl:1: `chosen` and `rejected` have no common beginning to be the prompt"
    ):
        load_rows(tmp_path, [{"chosen": "yes", "rejected": "no", "topic": row["prompt"]} for row in ROWS])


def test_too_few_pairs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"pairs\.jsonl: \d distinct examples for the .* split"):
        load_rows(tmp_path, ROWS[:4])
