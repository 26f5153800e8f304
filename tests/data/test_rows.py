"""Test files and objects that are read as rows: types, damage, and refusals of invalid ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow
import pyarrow.parquet
import pytest

from rightrank.data.splits import load_data
from rightrank.schema.errors import DataError
from tests.tiny import build_small_settings, generate_sentences, write_jsonl

TEXT_ROWS: list[dict[str, Any]] = [{"text": text} for text in generate_sentences(120)]
PAIR_ROWS = [{"prompt": row["text"], "completion": f"answer {row['text']}, truly"} for row in TEXT_ROWS]


def write_file(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        delimiter = {".csv": ",", ".tsv": "\t", ".CSV": ";"}[path.suffix]  # a spreadsheet writes semicolons
        pandas.DataFrame(rows).to_csv(path, sep=delimiter, index=False)
    return path


@pytest.mark.parametrize("kind", [".csv", ".tsv", ".CSV", ".parquet", ".json", "dataset", "data frame", "list"])
def test_every_kind_of_source_gives_the_same_examples(tmp_path: Path, kind: str) -> None:
    reference = load_data(write_jsonl(tmp_path / "r.jsonl", PAIR_ROWS), build_small_settings())
    source: Any = {"list": PAIR_ROWS, "data frame": pandas.DataFrame(PAIR_ROWS)}.get(kind)
    if kind == "dataset":
        source = datasets.Dataset.from_list(PAIR_ROWS)
    if source is None:
        source = write_file(tmp_path / f"data{kind}", PAIR_ROWS)
    assert load_data(source, build_small_settings()).fingerprint == reference.fingerprint


def test_a_missing_cell_of_a_data_frame_is_nothing() -> None:
    with pytest.raises(DataError, match=r"row 121: `completion`: got nothing"):
        load_data(pandas.DataFrame([*PAIR_ROWS, {"prompt": "a", "completion": None}]), build_small_settings())


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    frame = pandas.DataFrame([["a", "b"]] * 100, columns=["text", "text"])
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"] * 100), pyarrow.array(["b"] * 100)], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "twice.parquet")
    for data in (frame, tmp_path / "twice.parquet"):
        with pytest.raises(DataError, match="two columns are named 'text'; rename one of them, or remove it"):
            load_data(data, build_small_settings())


BAD_FILES: list[tuple[str, bytes, str]] = [
    ("empty.jsonl", b"", r"empty\.jsonl: the file is empty"),
    ("blank.jsonl", b"\n\n", r"blank\.jsonl: no rows"),
    ("picture.png", b"\x89PNG", r"files of type '\.png' are not supported"),
    ("half.csv", b"text\nthe \xed\xa0\x80 cat\n", r"half\.csv.*: not UTF-8 text"),
    ("latin.jsonl", b'{"text": "caf\xe9"}\n', r"not UTF-8 text"),
    ("broken.jsonl", b'{"text": "a"}\n{"text": \n', r"broken\.jsonl:2: not JSON"),
    ("list.jsonl", b"[1, 2]\n", r"list\.json|give one JSON object a line|entry 1"),
    ("columns.jsonl", b'{"body": "a", "title": "b"}\n', r"the columns \(`body`, `title`\) fit no form"),
    ("number.jsonl", b'{"text": 3}\n' * 30, r"number\.jsonl:1: `text`: got an int; give a string"),
    ("null.jsonl", b'{"text": "a"}\n{"text": null}\n', r"null\.jsonl:2: `text`: got nothing"),
    ("roles.jsonl", b'{"messages": [{"role": "user"}]}\n', r"a message needs a `role` and a `content`"),
    ("few.jsonl", b'{"text": "a"}\n{"text": "b"}\n', r"distinct examples for the \w+ split, at least \d+ needed"),
    ("wide.csv", b"text\na,b,c\n", r"wide\.csv:2: more cells than the header"),
    ("twice.csv", b"text,text\na,b\n", r"twice\.csv: two columns are named 'text'; rename one of them, or remove it"),
    ("twice.jsonl", b'{"text": "a", "text": "b"}\n', r"twice\.jsonl:1: .*two columns are named 'text'"),
    ("twice.json", b'[{"text": "a", "text": "b"}]', r"twice\.json:1: .*two columns are named 'text'"),
    ("bad.parquet", b"not parquet at all", r"not a readable Parquet file"),
    (
        "one.jsonl",
        b"".join(b'{"text": "t%d", "label": 1}\n' % n for n in range(100)),
        r"the train split has only the label '1'",
    ),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES, ids=[case[0] for case in BAD_FILES])
def test_bad_files_are_one_clear_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_data(path, build_small_settings())
    assert "\n" not in str(caught.value)


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rightrank.data.rows.MAX_LINE_CHARACTERS", 10_000)
    with pytest.raises(DataError, match=r"d\.jsonl:121: a line of over 10,000 characters; give one object a line"):
        load_data(write_jsonl(tmp_path / "d.jsonl", [*TEXT_ROWS, {"text": "a" * 20_000}]), build_small_settings())


@pytest.mark.parametrize(
    ("files", "path", "message"),
    [
        ((), "nothing.jsonl", "no such file or folder"),
        ((), ".", "contains no data file"),
        (("state.json", "train.jsonl"), ".", "`datasets` saved"),
        (("train.jsonl", "more.jsonl"), ".", r"more\.jsonl belongs to no split"),
    ],
)
def test_a_path_without_data_is_refused(tmp_path: Path, files: tuple[str, ...], path: str, message: str) -> None:
    for name in files:
        write_jsonl(tmp_path / name, TEXT_ROWS)
    with pytest.raises(DataError, match=message):
        load_data(tmp_path / path, build_small_settings())
