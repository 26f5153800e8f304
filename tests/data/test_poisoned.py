"""Test difficult examples: they are cut, omitted or kept as docs/reference/file-formats.md says, and counted."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from rightrank.data.splits import load_data
from rightrank.evaluation.tokens import EncodedData, encode_splits
from rightrank.report.answer import build_answers
from rightrank.report.html import render_report
from rightrank.report.progress import format_plan
from tests.commands import run
from tests.report.runs import make_run
from tests.tiny import build_small_settings, generate_sentences, make_tokenizer

HALF = "\ud800"  # half of a surrogate pair, which UTF-8 cannot encode


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def encode_rows(path: Path, rows: list[dict[str, Any]], tokenizer: Any, **settings: Any) -> EncodedData:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chosen = build_small_settings(max_eval_examples=1000, **settings)
    embeddings = SimpleNamespace(num_embeddings=len(tokenizer))
    model = SimpleNamespace(tokenizer=tokenizer, model=SimpleNamespace(get_input_embeddings=lambda: embeddings))
    return encode_splits(load_data(path, chosen), model, chosen)  # type: ignore[arg-type]


def count_examples(data: EncodedData, name: str) -> int:
    return sum(getattr(split, name) for split in data.summary.splits.values())


def make_text_rows(count: int = 120) -> list[dict[str, Any]]:
    return [{"text": f"{number} {text}"} for number, text in enumerate(generate_sentences(count))]


def test_a_line_of_a_megabyte_is_cut_and_counted(tmp_path: Path, tokenizer: Any) -> None:
    for long in ("a" * 2**20, "the cat " * 2**17, " " * 2**20 + "a"):
        data = encode_rows(tmp_path / "d.jsonl", [*make_text_rows(), {"text": long}], tokenizer, seq_len=64)
        assert count_examples(data, "examples") == 121
        assert count_examples(data, "truncated") == 1
        assert max(example.length for examples in data.splits.values() for example in examples) == 64


FORMS: list[tuple[str, dict[str, Any]]] = [
    ("text", {"text": f"q {HALF} b"}),
    ("prompt", {"prompt": HALF, "completion": "b"}),
    ("completion", {"prompt": "q", "completion": f"b{HALF}"}),
    ("messages", {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": HALF}]}),
    ("role", {"messages": [{"role": HALF, "content": "q"}, {"role": "assistant", "content": "b"}]}),
    ("label", {"text": "q", "label": HALF}),
    ("turns", {"prompt": [{"role": "user", "content": HALF}], "completion": [{"role": "assistant", "content": "b"}]}),
]


@pytest.mark.parametrize("row", [row for _, row in FORMS], ids=[name for name, _ in FORMS])
def test_lone_surrogates_are_removed_and_counted(tmp_path: Path, row: dict[str, Any]) -> None:
    repaired = json.dumps(row).replace("\\ud800", "x")
    good = [
        json.loads(
            repaired.replace('"q', f'"{number} q').replace('"b', f'"{number} b').replace('"x"', f'"x{number % 2}"')
        )
        for number in range(120)
    ]
    data = load_data(write_rows(tmp_path / "d.jsonl", [row, *good, row]), build_small_settings())
    assert data.summary.unreadable == 2
    data.summary.model_dump_json()


def test_lone_surrogates_in_other_columns_are_harmless(tmp_path: Path, tokenizer: Any) -> None:
    rows = [row | {"group": f"{HALF}{number % 50}", "note": HALF} for number, row in enumerate(make_text_rows())]
    data = encode_rows(tmp_path / "d.jsonl", rows, tokenizer)
    assert data.summary.unreadable == 0
    assert count_examples(data, "examples") == 120


def test_a_surrogate_pair_is_a_character(tmp_path: Path, tokenizer: Any) -> None:
    data = encode_rows(
        tmp_path / "d.jsonl", [row | {"text": row["text"] + " \U0001f600"} for row in make_text_rows()], tokenizer
    )
    assert data.summary.unreadable == 0


def test_empty_completions_are_dropped_and_counted(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": f"say {number}", "completion": "" if number % 4 == 0 else "x"} for number in range(200)]
    data = encode_rows(tmp_path / "d.jsonl", rows, tokenizer)
    assert count_examples(data, "dropped") == 50
    assert count_examples(data, "examples") == 150


def test_the_counts_are_shown(tmp_path: Path) -> None:
    records = make_run()
    data = records.started.data.model_copy(update={"unreadable": 3})
    started = records.started.model_copy(update={"data": data})
    assert "3 rows skipped because of lone surrogates" in format_plan(started, 10)
    records.started = started
    page = render_report(records, build_answers(records, None))
    assert "3 rows skipped because of lone surrogates" in page


def make_row(form: str, prompt: str, text: str) -> dict[str, Any]:
    match form:
        case "text":
            return {"text": f"{prompt} {text}" if text else ""}
        case "label":
            return {"text": f"{prompt} {text}" if text else "", "label": len(prompt) % 2}
        case "messages":
            return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]}
    return {"prompt": prompt, "completion": text}


def make_poisoned_rows(form: str, with_halves: bool) -> list[dict[str, Any]]:
    """Make 90 good rows, one of a megabyte, three with bells, four empty ones, and optionally two with lone surrogates."""
    rows = [make_row(form, f"q{number}", text) for number, text in enumerate(generate_sentences(90))]
    rows += [make_row(form, "long", "the cat " * 2**17)]
    rows += [make_row(form, f"bell {number}", "a\x07b") for number in range(3)]
    rows += [make_row(form, f"empty {number}", "") for number in range(4)]
    return rows + [make_row(form, f"half {number}", HALF) for number in range(2)] * with_halves


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text(
            "".join(json.dumps(row) + "\n" for row in rows) if path.suffix == ".jsonl" else json.dumps(rows)
        )
    return path


@pytest.mark.parametrize(("form", "suffix"), [("label", ".csv"), ("completion", ".jsonl"), ("messages", ".parquet")])
def test_a_selection_continues_and_counts_problems(
    form: str, suffix: str, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    halves = suffix.startswith(".json")  # other types cannot contain them
    data, out = write_rows(tmp_path / f"data{suffix}", make_poisoned_rows(form, halves)), tmp_path / "run"
    status, _, err = run(
        ["select", str(model_folder), str(data), "--out", str(out), "--strategy", "grid", "--ranks", "1,2",
         "--learning-rates", "1e-2", "--max-steps", "1", "--batch-size", "2", "--seq-len", "64", "--max-eval-examples", "100",
         "--set", "num_evaluations=1", "--device", "cpu", "--quiet"], capsys,
    )  # fmt: skip
    assert status == 0, err
    summary = json.loads((out / "journal.jsonl").read_text().splitlines()[0])["data"]
    assert summary["unreadable"] == 2 * halves
    assert sum(split["truncated"] for split in summary["splits"].values()) == 1
    empty = {"completion": 4, "messages": 0}.get(
        form, 1
    )  # a template adds an end token to an empty answer, which is learned
    assert sum(split["dropped"] for split in summary["splits"].values()) == empty
    assert "Traceback" not in err
