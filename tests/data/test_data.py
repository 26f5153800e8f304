"""Forms, splits, and every way in which data can be wrong."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rightrank.data.splits import SPLITS, load_data, sample_indices
from rightrank.report.terminal import left_out
from rightrank.schema.errors import DataError
from rightrank.schema.settings import LOOK_ITEMS
from tests.tiny import sentences, small_settings, write_jsonl

TEXT_ROWS: list[dict[str, Any]] = [{"text": text} for text in sentences(120)]


def ids(splits: Any, split: Any) -> set[str]:
    return {item.item_id for item in splits.examples[split]}


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"text": "a"}, "text"),
        ({"prompt": "a", "completion": "b"}, "prompt_completion"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "messages"),
        (
            {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
            "prompt_completion",
        ),
    ],
)
def test_the_form_is_told_by_the_columns(tmp_path: Path, row: dict[str, Any], form: str) -> None:
    rows = [json.loads(json.dumps(row).replace('"a"', json.dumps(f"text {n}"))) for n in range(100)]
    splits = load_data(write_jsonl(tmp_path / "d.jsonl", rows), small_settings())
    assert splits.form == form
    assert all(splits.examples[split] for split in SPLITS)


def test_growing_the_data_moves_nothing(tmp_path: Path) -> None:
    settings = small_settings(eval_items=1000)
    small = load_data(write_jsonl(tmp_path / "small.jsonl", TEXT_ROWS[:80]), settings)
    large = load_data(write_jsonl(tmp_path / "large.jsonl", TEXT_ROWS[::-1]), settings)
    for split in SPLITS:
        assert ids(small, split) <= ids(large, split)


def test_duplicates_fall_on_one_side(tmp_path: Path) -> None:
    splits = load_data(write_jsonl(tmp_path / "d.jsonl", TEXT_ROWS * 3), small_settings(eval_items=1000))
    assert splits.summary.duplicates_across_splits == 0
    assert not ids(splits, "train") & (ids(splits, "selection") | ids(splits, "test"))


@pytest.mark.parametrize("given", ["file", "folder", "validation", "test", "memory"])
def test_groups_stay_together_wherever_a_split_is_taken(tmp_path: Path, given: str) -> None:
    rows = [row | {"group": f"g{number % 60}"} for number, row in enumerate(TEXT_ROWS)]
    others = [{"text": f"other {number}"} for number in range(20)]
    settings, source = small_settings(eval_items=1000), tmp_path / "train.jsonl"
    write_jsonl(source, rows)
    if given == "validation":
        settings = small_settings(eval_items=1000, validation=str(write_jsonl(tmp_path / "other.jsonl", others)))
    if given == "test":
        write_jsonl(tmp_path / "test.jsonl", others)
    splits = load_data(
        {"train": rows} if given == "memory" else source if given in ("file", "validation") else tmp_path, settings
    )
    where = {row["text"]: row.get("group", "other") for row in [*rows, *others]}
    groups = {split: {where[item.content["text"]] for item in splits.examples[split]} for split in SPLITS}
    taken = [split for split in SPLITS if groups[split] != {"other"}]
    assert len(taken) == (2 if given in ("validation", "test") else 3)
    assert sum(len(groups[split]) for split in taken) == 60  # each group is in one split
    one_file = load_data(source, small_settings(eval_items=1000))
    if len(taken) == 3:
        assert splits.fingerprint == one_file.fingerprint


def test_rows_that_differ_in_any_value_are_not_the_same() -> None:
    rows = []
    for number in range(40):
        note = np.zeros(5000)
        note[2500] = number
        user = {"role": "user", "content": "look", "note": note if number % 2 else torch.tensor(note)}
        rows.append({"messages": [user, {"role": "assistant", "content": "yes"}]})
    splits = load_data({"train": rows[:20], "validation": rows[20:30], "test": rows[30:]}, small_settings())
    assert splits.summary.duplicates_across_splits == splits.summary.repeated == 0


def test_content_of_text_parts_is_its_text(tmp_path: Path) -> None:
    def rows(content: Any) -> list[dict[str, Any]]:
        answer = {"role": "assistant", "content": "b"}
        return [{"messages": [{"role": "user", "content": content(text)}, answer]} for text in sentences(80)]

    plain = load_data(rows(lambda text: text), small_settings())
    parts = rows(lambda text: [{"type": "text", "text": text[:3]}, {"type": "text", "text": text[3:]}])
    assert load_data(write_jsonl(tmp_path / "d.jsonl", parts), small_settings()).fingerprint == plain.fingerprint
    with pytest.raises(DataError, match=r"row 1: `messages`: .* list of text parts"):
        load_data(rows(lambda text: [{"type": "image"}, {"type": "text", "text": text}]), small_settings())


@pytest.mark.parametrize("given", [True, False])
def test_held_out_rows_that_differ_in_space_or_case_from_training_rows_are_counted(tmp_path: Path, given: bool) -> None:
    rows = [{"prompt": f"Frage {number}:\nÄpfel", "completion": f"yes {number}"} for number in range(200)]
    alike = [
        {"prompt": row["prompt"].upper().replace("\n", " \u00a0 "), "completion": row["completion"]} for row in rows
    ]
    if given:
        write_jsonl(tmp_path / "train.jsonl", rows[:150])
        write_jsonl(tmp_path / "validation.jsonl", [*alike[:7], *rows[7:10], *rows[150:180]])
        write_jsonl(tmp_path / "test.jsonl", rows[180:])
        summary = load_data(tmp_path, small_settings(eval_items=1000)).summary
        assert (summary.duplicates_across_splits, summary.near_duplicates_across_splits) == (3, 7)
        assert any(line.startswith("7 held-out examples differ") for line in left_out(summary))
    else:
        whole = load_data(write_jsonl(tmp_path / "d.jsonl", [*rows, *alike]), small_settings(eval_items=1000)).summary
        assert whole.near_duplicates_across_splits > 0
        alone = load_data(write_jsonl(tmp_path / "d.jsonl", rows), small_settings(eval_items=1000)).summary
        assert alone.near_duplicates_across_splits == 0


def test_given_splits_are_kept_and_duplicates_across_them_counted(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", TEXT_ROWS[:80])
    write_jsonl(tmp_path / "validation.jsonl", TEXT_ROWS[78:100])
    write_jsonl(tmp_path / "test-00.jsonl", TEXT_ROWS[100:])
    splits = load_data(tmp_path, small_settings(eval_items=1000))
    assert splits.summary.splits_given
    assert splits.summary.duplicates_across_splits == 2
    assert len(splits.examples["selection"]) == 22


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", ".json"])
def test_other_file_types_give_the_same_items(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"d{suffix}"
    if suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(TEXT_ROWS), path)
    elif suffix == ".json":
        path.write_text(json.dumps(TEXT_ROWS))
    else:
        path.write_text("text\n" + "".join(f"{row['text']}\n" for row in TEXT_ROWS))
    reference = load_data(write_jsonl(tmp_path / "r.jsonl", TEXT_ROWS), small_settings())
    splits = load_data(path, small_settings())
    assert splits.fingerprint == reference.fingerprint


def test_saved_and_in_memory_datasets(tmp_path: Path) -> None:
    import datasets

    dataset = datasets.Dataset.from_list(TEXT_ROWS)
    dataset.save_to_disk(str(tmp_path / "saved"))
    reference = load_data(write_jsonl(tmp_path / "r.jsonl", TEXT_ROWS), small_settings()).fingerprint
    assert load_data(tmp_path / "saved", small_settings()).fingerprint == reference
    assert load_data(dataset, small_settings()).fingerprint == reference
    assert load_data(TEXT_ROWS, small_settings()).fingerprint == reference


def test_all_broken_lines_are_named_at_once(tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in TEXT_ROWS]
    lines[3], lines[10], lines[50] = '{"text": ', "[1]", "nonsense"
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"d\.jsonl:4: not JSON \(.*\) \(2 more: 11, 51\); give one JSON object"):
        load_data(tmp_path / "d.jsonl", small_settings())


BAD_FILES: list[tuple[str, bytes, str]] = [
    ("empty.jsonl", b"", r"empty\.jsonl: the file is empty"),
    ("blank.jsonl", b"\n\n", r"blank\.jsonl: no rows"),
    ("picture.png", b"\x89PNG", r"files of type '\.png' are not read"),
    ("latin.jsonl", b'{"text": "caf\xe9"}\n', r"not UTF-8 text"),
    ("broken.jsonl", b'{"text": "a"}\n{"text": \n', r"broken\.jsonl:2: not JSON"),
    ("list.jsonl", b"[1, 2]\n", r"list\.json|give one JSON object a line|entry 1"),
    ("columns.jsonl", b'{"body": "a", "title": "b"}\n', r"no known columns: found `body`, `title`"),
    ("number.jsonl", b'{"text": 3}\n' * 30, r"number\.jsonl:1: `text`: got an int; give a string"),
    ("null.jsonl", b'{"text": "a"}\n{"text": null}\n', r"null\.jsonl:2: `text`: got nothing"),
    ("roles.jsonl", b'{"messages": [{"role": "user"}]}\n', r"a message needs a `role` and a `content`"),
    ("few.jsonl", b'{"text": "a"}\n{"text": "b"}\n', r"distinct examples for the \w+ split, at least \d+ needed"),
    ("wide.csv", b"text\na,b,c\n", r"wide\.csv:2: more cells than the header"),
    ("bad.parquet", b"not parquet at all", r"not a readable Parquet file"),
    ("one.jsonl", b"".join(b'{"text": "t%d", "label": 1}\n' % n for n in range(100)), r"one class only \('1'\)"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES, ids=[case[0] for case in BAD_FILES])
def test_bad_files_are_one_clear_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_data(path, small_settings())
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        load_data(tmp_path / "nothing.jsonl", small_settings())


def test_folder_without_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no data file"):
        load_data(tmp_path, small_settings())


def test_folder_with_an_unnamed_file_beside_splits(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", TEXT_ROWS)
    write_jsonl(tmp_path / "more.jsonl", TEXT_ROWS)
    with pytest.raises(DataError, match=r"more\.jsonl belongs to no split"):
        load_data(tmp_path, small_settings())


def test_a_label_that_train_lacks(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"text": text, "label": n % 2} for n, text in enumerate(sentences(60))])
    write_jsonl(tmp_path / "validation.jsonl", [{"text": f"v {n}", "label": 7} for n in range(10)])
    with pytest.raises(DataError, match="label 7 of the validation split does not occur in train"):
        load_data(tmp_path, small_settings())


def test_a_sample_has_every_row_at_most_once() -> None:
    assert sorted(sample_indices(50, 50)) == sorted(sample_indices(50, 80)) == list(range(50))
    assert sample_indices(50, 50) != list(range(50))
    sample = sample_indices(10**9, 1000)
    assert len(set(sample)) == 1000
    assert sample_indices(0, 10) == []


def test_a_sample_depends_on_its_seed_alone() -> None:
    first = sample_indices(1000, 20)
    np.random.seed(1)
    random.seed(1)
    torch.manual_seed(1)
    state = np.random.get_state()[1].tolist(), random.getstate(), torch.get_rng_state().tolist()
    assert sample_indices(1000, 20) == first
    assert sample_indices(1000, 20, seed=1) != first
    assert (np.random.get_state()[1].tolist(), random.getstate(), torch.get_rng_state().tolist()) == state


@pytest.mark.parametrize("order", ["alternating", "sorted", "by random", "by numpy", "by numpy's global", "by torch"])
def test_a_sample_has_rows_of_every_source(order: str) -> None:
    """Of two interleaved sources, of two that lie one behind the other, and of rows that were shuffled with the sample's own seed."""
    rows = list(range(2000)) if order == "alternating" else [*range(0, 2000, 2), *range(1, 2000, 2)]
    if order == "by random":
        random.Random(0).shuffle(rows)
    elif order == "by numpy":
        rows = [rows[index] for index in np.random.default_rng(0).permutation(2000)]
    elif order == "by numpy's global":
        rows = [rows[index] for index in np.random.RandomState(0).permutation(2000)]
    elif order == "by torch":
        rows = [rows[index] for index in torch.randperm(2000, generator=torch.Generator().manual_seed(0))]
    for count in (100, 500, 1000):
        odd = sum(rows[index] % 2 for index in sample_indices(2000, count))
        assert abs(odd - count / 2) < 2 * count**0.5  # four standard deviations


@pytest.mark.parametrize("order", ["alternating", "sorted"])
def test_held_out_examples_are_of_every_source(tmp_path: Path, order: str) -> None:
    """The examples that a selection scores, and the first of them that it scores during a training."""
    one, two = ([f"{source} {number}" for number in range(2000)] for source in ("one", "two"))
    texts = [text for pair in zip(one, two, strict=True) for text in pair] if order == "alternating" else [*one, *two]
    for given in ("splits", "none"):
        source = write_jsonl(tmp_path / f"{given}.jsonl", [{"text": text} for text in texts])
        if given == "splits":
            (tmp_path / "data").mkdir()
            source.rename(tmp_path / "data" / "validation.jsonl")
            write_jsonl(tmp_path / "data" / "train.jsonl", [{"text": f"three {number}"} for number in range(100)])
            source = tmp_path / "data"
        settings = small_settings(eval_items=250, validation_fraction=0.2)
        scored = load_data(source, settings).examples["selection"]
        for examples in (scored, scored[:LOOK_ITEMS]):
            share = sum(str(example.content["text"]).startswith("one") for example in examples) / len(examples)
            assert 0.35 < share < 0.65
