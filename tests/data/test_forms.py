"""Test forms of data and layouts of rows: other column names, Alpaca, ShareGPT, preference pairs, labels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rightrank.data.forms import COMPLETION_COLUMNS, MEDIA_COLUMNS, build_example
from rightrank.data.rows import Row
from rightrank.data.splits import DataSplits, load_data
from rightrank.schema.errors import DataError
from tests.examples import limit_examples
from tests.tiny import build_small_settings, generate_sentences, write_jsonl

TEXTS = generate_sentences(100)


def load_rows(folder: Path, rows: list[dict[str, Any]], **settings: Any) -> DataSplits:
    return load_data(write_jsonl(folder / "data.jsonl", rows), build_small_settings(**settings))


def test_sharegpt_becomes_messages(tmp_path: Path) -> None:
    turns = [[{"from": "human", "value": text}, {"from": "gpt", "value": "yes"}] for text in TEXTS]
    messages = [[{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}] for text in TEXTS]
    reference = load_rows(tmp_path, [{"messages": message} for message in messages])
    roles = [[{"role": turn["from"], "content": turn["value"]} for turn in message] for message in turns]
    for rows in (
        [{"conversations": message} for message in turns],
        [{"messages": message} for message in turns],
        [{"messages": message} for message in roles],
    ):
        assert load_rows(tmp_path, rows).fingerprint == reference.fingerprint
    renamed = load_rows(tmp_path, [{"chat": message} for message in turns], columns=("messages=chat",))
    assert renamed.fingerprint == reference.fingerprint
    with pytest.raises(DataError, match="a turn is from 'robot'; allowed: human"):
        load_rows(tmp_path, [{"conversations": [{"from": "robot", "value": "hm"}]}])


def test_alpaca_gets_its_prompt(tmp_path: Path) -> None:
    rows = [{"instruction": text, "input": "" if n % 2 else "more", "output": "done"} for n, text in enumerate(TEXTS)]
    splits = load_rows(tmp_path, rows)
    assert (splits.form, splits.summary.shape) == ("prompt_completion", "alpaca")
    prompts = [example.content["prompt"] for split in splits.examples.values() for example in split]
    assert all(prompt.endswith("\n\n### Response:\n") for prompt in prompts)
    assert any("### Input:\nmore\n\n" in prompt for prompt in prompts)
    assert any("### Input:" not in prompt for prompt in prompts)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (("promt=question",), r"'promt' is not a column of any form \(did you mean 'prompt'\?\)"),
        (("prompt=missing",), "no column 'missing', which --columns names for `prompt`; its columns are `question`"),
    ],
)
def test_wrong_columns_are_named(tmp_path: Path, columns: tuple[str, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_rows(tmp_path, [{"question": "a", "answer": "b"}], columns=columns)


CHAT_ROWS = [{"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "a"}]} for text in TEXTS]


@given(
    column=st.sampled_from(["system", "context", "prompt", "text", "id", "conversations"]),
    value=st.sampled_from(["a text", 3, 0, False, ["a"], {"a": None}]),
    position=st.integers(0, len(CHAT_ROWS) - 1),
)
@limit_examples(15)
def test_a_conversation_loses_no_column_in_silence(column: str, value: Any, position: int) -> None:
    rows = [*CHAT_ROWS]
    rows[position] = rows[position] | {column: value}
    with pytest.raises(DataError, match=rf"row {position + 1}: .*`{column}`.*--set columns=ignore={column}$"):
        load_data(rows, build_small_settings())
    empty = [row | {column: None} for row in CHAT_ROWS]
    for allowed, columns in ((rows, {"ignore": [column]}), (rows, [f"ignore={column}", "ignore=other"]), (empty, ())):
        splits = load_data(allowed, build_small_settings(columns=columns))
        assert splits.fingerprint == load_data(CHAT_ROWS, build_small_settings()).fingerprint


@given(
    column=st.sampled_from(MEDIA_COLUMNS),
    position=st.integers(0, len(TEXTS) - 1),
    split=st.sampled_from(["train", "validation", None]),
)
@limit_examples(15)
def test_a_picture_in_any_row_is_refused(column: str, position: int, split: str | None) -> None:
    rows: list[dict[str, Any]] = [{"text": text, column: None} for text in TEXTS]
    plain: Any = [{"text": text} for text in generate_sentences(20, seed=3)]
    rows[position] = rows[position] | {column: b"pixels"}
    data: Any = rows if split is None else {"train": plain, "validation": plain} | {split: rows}
    with pytest.raises(DataError, match=rf"row {position + 1}: the column `{column}`: only text is read here"):
        load_data(data, build_small_settings())
    assert load_data(data, build_small_settings(columns=f"ignore={column}")).summary.rows >= len(TEXTS)


@pytest.mark.parametrize("first", [True, 1.0])
def test_labels_of_other_types_are_classes(tmp_path: Path, first: object) -> None:
    renamed = False if first is True else 0.0
    splits = load_rows(tmp_path, [{"text": text, "label": (first, renamed)[n % 2]} for n, text in enumerate(TEXTS)])
    assert splits.summary.classes == (["False", "True"] if first is True else ["0", "1"])
    with pytest.raises(DataError, match=r"`label`: got a float; give an integer or a name"):
        load_rows(tmp_path, [{"text": "a", "label": 0.5}])


@given(st.sampled_from([*COMPLETION_COLUMNS, ("prompt", "completion")]), st.sampled_from([str.title, str.upper]))
@limit_examples(15)
def test_other_names_of_prompt_and_completion_are_read_as_they_are_written(
    columns: tuple[str, str], change_case: Callable[[str], str]
) -> None:
    rows = [dict(zip(columns, (text, "yes"), strict=True)) for text in TEXTS]
    reference = load_data([{"prompt": text, "completion": "yes"} for text in TEXTS], build_small_settings())
    assert load_data(rows, build_small_settings()).fingerprint == reference.fingerprint
    cased = [{change_case(column): value for column, value in row.items()} for row in rows]
    with pytest.raises(DataError, match=r"fit no form.* --columns prompt=COLUMN,completion=COLUMN$"):
        load_data(cased, build_small_settings())


PAIRS = [{"prompt": f"{text}: ", "chosen": "yes", "rejected": "no"} for text in sorted(set(generate_sentences(80)))]


def load_pairs(tmp_path: Path, rows: list[dict[str, Any]], **changes: Any) -> DataSplits:
    return load_data(write_jsonl(tmp_path / "pairs.jsonl", rows), build_small_settings(**changes))


def make_messages(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(contents)]


def test_both_forms_are_read(tmp_path: Path) -> None:
    explicit = load_pairs(tmp_path, PAIRS)
    assert explicit.form == "preference"
    rows_with_prompt = [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in PAIRS]
    first = next(iter(load_pairs(tmp_path, rows_with_prompt).examples["train"])).content
    assert (first["chosen"], first["rejected"]) == (" yes", " no")  # the space belongs to the answers, as in TRL
    chats = [
        {"chosen": make_messages(row["prompt"], "yes"), "rejected": make_messages(row["prompt"], "no")} for row in PAIRS
    ]
    for rows in (chats, [chat | {"prompt": row["prompt"]} for chat, row in zip(chats, PAIRS, strict=True)]):
        content = next(iter(load_pairs(tmp_path, rows).examples["train"])).content
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


def test_equal_pairs_are_left_out_and_counted(tmp_path: Path) -> None:
    data = load_pairs(tmp_path, [*PAIRS, *(row | {"rejected": "yes"} for row in PAIRS[:3])])
    assert data.summary.equal_pairs == 3
    assert data.summary.rows == len(PAIRS) + 3


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
        load_pairs(tmp_path, [*PAIRS[:39], row, *PAIRS[39:]])


def test_a_prompt_column_with_another_name_is_found(tmp_path: Path) -> None:
    rows = [{"question": row["prompt"], "chosen": "yes", "rejected": "no"} for row in PAIRS]
    data = load_pairs(tmp_path, rows)
    assert data.summary.shape == "question → prompt"
    assert next(iter(data.examples["train"])).content["prompt"] in {row["prompt"] for row in PAIRS}
    renamed = [{"ask": row["prompt"], "good": "yes", "bad": "no"} for row in PAIRS]
    splits = load_pairs(tmp_path, renamed, columns=("prompt=ask", "chosen=good", "rejected=bad"))
    assert splits.fingerprint == load_pairs(tmp_path, PAIRS).fingerprint


def test_content_of_text_parts_is_joined(tmp_path: Path) -> None:
    def make_rows(content: Any) -> list[dict[str, Any]]:
        answer = {"role": "assistant", "content": "b"}
        return [{"messages": [{"role": "user", "content": content(text)}, answer]} for text in generate_sentences(80)]

    plain = load_data(make_rows(lambda text: text), build_small_settings())
    rows_with_parts = make_rows(lambda text: [{"type": "text", "text": text[:3]}, {"type": "text", "text": text[3:]}])
    assert (
        load_data(write_jsonl(tmp_path / "d.jsonl", rows_with_parts), build_small_settings()).fingerprint
        == plain.fingerprint
    )
    with pytest.raises(DataError, match=r"row 1: `messages`: .* list of text fragments"):
        load_data(make_rows(lambda text: [{"type": "image"}, {"type": "text", "text": text}]), build_small_settings())
