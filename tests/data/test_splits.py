"""Test how examples are divided into splits: by groups, by content, as the data states, and which rows are left out."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rightrank.data.rows import sample_indices
from rightrank.data.splits import HELD_OUT, SPLITS, DataSplits, load_data, load_held_out, number_groups
from rightrank.schema.errors import DataError
from tests.examples import limit_examples
from tests.tiny import build_small_settings, generate_sentences, write_jsonl

TEXT_ROWS: list[dict[str, Any]] = [{"text": text} for text in sorted(set(generate_sentences(120)))]
LARGE: dict[str, Any] = {"max_eval_examples": 1000, "validation_fraction": 0.3, "test_fraction": 0.2}
Rows = Sequence[dict[str, Any]]
TEXTS = generate_sentences(100)


def load_rows(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> DataSplits:
    return load_data(write_jsonl(folder / "data.jsonl", rows), build_small_settings(**changes))


def make_conversation(group: int, turns: int) -> dict[str, Any]:
    """Return the first turns of the conversation of a group."""
    pairs = [
        ({"role": "user", "content": f"{group} {turn}"}, {"role": "assistant", "content": "yes"})
        for turn in range(turns)
    ]
    return {"messages": [{"role": "system", "content": "You help."}, *(turn for pair in pairs for turn in pair)]}


# By what groups the rows: a function of the group and of the row's number in it.
GROUPINGS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "doc": lambda group, number: {"text": f"text {group} {number}", "doc": f"d{group}"},
    "day": lambda group, number: {"text": f"text {group} {number}", "day": group},
    "array": lambda group, number: {"text": f"text {group} {number}", "array": np.arange(4000) == group},
    "group": lambda group, number: {"text": f"text {group} {number}", "group": f"g{group}"},
    "prompt": lambda group, number: {"prompt": f"question {group}", "completion": f"answer {number}"},
    "messages": lambda group, number: make_conversation(group, number + 1),
    "pairs": lambda group, number: {"prompt": f"question {group}", "chosen": "yes", "rejected": f"no {number}"},
}


def get_ids(splits: DataSplits) -> dict[str, set[str]]:
    return {split: {example.example_id for example in splits.examples[split]} for split in SPLITS}


@given(
    grouping=st.sampled_from(sorted(GROUPINGS)),
    num_groups=st.integers(40, 60),
    rows_per_group=st.integers(2, 4),
    given_split=st.sampled_from([None, "validation", "test"]),
    shuffle=st.randoms(use_true_random=False),
)
@limit_examples(20)
def test_a_group_is_in_one_split_whatever_the_other_rows_and_their_order(
    grouping: str, num_groups: int, rows_per_group: int, given_split: str | None, shuffle: random.Random
) -> None:
    """Duplicates are in the same split, since the same content has the same group."""
    rows = [GROUPINGS[grouping](group, number) for group in range(num_groups) for number in range(rows_per_group)]
    others = [GROUPINGS[grouping](1000 + group, number) for group in range(20) for number in range(2)]
    column = {"columns": [f"group={grouping}"]} if grouping in ("doc", "day", "array") else {}
    chosen = build_small_settings(**column, **LARGE)

    def load(rows: Rows) -> DataSplits:
        return load_data(rows if given_split is None else {"train": rows, given_split: others}, chosen)

    splits = load(rows)
    derived = [split for split in SPLITS if split != given_split]
    groups = {split: {example.group for example in splits.examples[split]} for split in derived}
    assert sum(map(len, groups.values())) == len(set.union(*groups.values())) == num_groups
    assert all(groups.values())
    assert splits.summary.grouped_by == {"messages": "prompt", "pairs": "prompt"}.get(grouping, grouping)
    assert splits.summary.duplicates_across_splits == splits.summary.groups_across_splits == 0
    for split in HELD_OUT:
        numbers = number_groups(splits.examples[split]) or [0]
        assert numbers[0] == 0
        assert set(numbers) == set(range(max(numbers) + 1))
    shuffled = [*rows, *rows[:50]]
    shuffle.shuffle(shuffled)
    assert get_ids(load(shuffled)) == get_ids(splits)
    larger = get_ids(load([*others, *rows] if given_split is None else rows + rows))
    assert all(ids <= larger[split] for split, ids in get_ids(splits).items())


@pytest.mark.parametrize(
    "make_row",
    [
        lambda text: {"prompt": "Write a sentence.", "completion": text},  # the same instruction in all rows
        lambda text: {"prompt": text, "completion": text},
        lambda text: {"messages": [{"role": "assistant", "content": "Hi."}, {"role": "user", "content": text}]},
    ],
)
def test_rows_without_a_question_in_common_are_independent(make_row: Any) -> None:
    splits = load_data([make_row(row["text"]) for row in TEXT_ROWS], build_small_settings())
    assert splits.summary.grouped_by is None


GROUPED_TEXTS = generate_sentences(160)


def make_document_rows(documents: int, **extra_columns: Any) -> list[dict[str, Any]]:
    return [
        {"text": text, "doc": f"d{number % documents}", **extra_columns} for number, text in enumerate(GROUPED_TEXTS)
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            make_document_rows(40, doc=None),
            r"row 1: the row has no value in column 'doc', which --columns names for `group`; its columns are text, doc. Name",
        ),
        (
            [{"text": text} for text in GROUPED_TEXTS],
            r"row 1: the row has no value in column 'doc'.* its columns are text\. Name",
        ),
        (
            [*make_document_rows(40)[:50], {"text": "x", "doc": float("nan")}],
            r"row 51: the row has no value in column 'doc'",
        ),
        (
            make_document_rows(1),
            r"all rows share a value of 'doc', which --columns names for `group`; name a column in which several",
        ),
        (make_document_rows(160), r"no two rows share a value of 'doc', which --columns names for `group`"),
    ],
)
def test_a_column_that_groups_nothing_gets_one_line(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError, match=message) as refused:
        load_data(rows, build_small_settings(columns=["group=doc"]))
    assert "\n" not in str(refused.value)


def test_too_few_groups_for_the_splits_are_named() -> None:
    with pytest.raises(DataError, match=r"0 distinct examples for the .* split.* from 160 rows in 3 groups; give more"):
        load_data(make_document_rows(3), build_small_settings(columns=["group=doc"]))


def test_rows_that_differ_in_any_value_are_different_examples() -> None:
    make_rows = []
    for number in range(40):
        note = np.zeros(5000)
        note[2500] = number
        user = {"role": "user", "content": "look", "note": note if number % 2 else torch.tensor(note)}
        make_rows.append({"messages": [user, {"role": "assistant", "content": "yes"}]})
    splits = load_data(
        {"train": make_rows[:20], "validation": make_rows[20:30], "test": make_rows[30:]}, build_small_settings()
    )
    assert splits.summary.duplicates_across_splits == splits.summary.repeated == 0


SPACES = st.text(" \t\n\r\f\v\x1c\x85\u00a0\u2003", max_size=3)


@given(before=SPACES, between=SPACES, after=SPACES, change_case=st.sampled_from([str.upper, str.lower, str.title]))
@limit_examples(20)
def test_held_out_rows_that_differ_in_space_or_case_from_training_rows_are_found(
    before: str, between: str, after: str, change_case: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    rows = [{"prompt": f"Frage {number}:\nÄpfel", "completion": f"yes {number}"} for number in range(60)]
    similar = [row | {"prompt": before + change_case(row["prompt"]).replace("\n", between) + after} for row in rows]
    leaked = [row for row in similar[:7] if row not in rows]
    splits = {"train": rows[:40], "validation": [*leaked, *rows[7:10], *rows[40:50]], "test": rows[50:]}
    summary = load_data(splits, build_small_settings(max_eval_examples=1000)).summary
    assert (summary.duplicates_across_splits, summary.near_duplicates_across_splits) == (3, len(leaked))
    held_out = load_held_out(write_jsonl(tmp_path_factory.mktemp("held") / "d.jsonl", similar), build_small_settings())
    trained = load_data({**splits, "validation": rows[40:50]}, build_small_settings()).examples["train"]
    unseen = held_out.exclude_training_examples(trained, Path("d.jsonl")).examples["test"]
    assert {example.content["completion"] for example in unseen} == {f"yes {number}" for number in range(40, 60)}


def test_given_splits_are_kept_and_duplicates_across_them_counted(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", TEXT_ROWS[:80])
    write_jsonl(tmp_path / "validation.jsonl", TEXT_ROWS[78:100])
    write_jsonl(tmp_path / "test-00.jsonl", TEXT_ROWS[100:])
    splits = load_data(tmp_path, build_small_settings(max_eval_examples=1000))
    assert splits.summary.splits_given
    assert splits.summary.duplicates_across_splits == 2
    assert len(splits.examples["validation"]) == 22


def test_a_label_that_train_lacks(tmp_path: Path) -> None:
    write_jsonl(
        tmp_path / "train.jsonl", [{"text": text, "label": n % 2} for n, text in enumerate(generate_sentences(60))]
    )
    write_jsonl(tmp_path / "validation.jsonl", [{"text": f"v {n}", "label": 7} for n in range(10)])
    with pytest.raises(DataError, match="label 7 is none of the 2 labels of the classifier or of the train split"):
        load_data(tmp_path, build_small_settings())


@pytest.mark.parametrize("file_names", ["test", "validation"])
def test_missing_splits_are_taken_from_train(tmp_path: Path, file_names: str) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"text": text} for text in TEXTS])
    write_jsonl(tmp_path / f"{file_names}.jsonl", [{"text": text} for text in generate_sentences(20, seed=5)])
    splits = load_data(tmp_path, build_small_settings(max_eval_examples=1000))
    assert all(len(examples) >= 2 for examples in splits.examples.values())
    assert not {message.example_id for message in splits.examples["train"]} & {
        message.example_id for message in splits.examples["test"]
    }


def test_no_test_split(tmp_path: Path) -> None:
    splits = load_rows(tmp_path, [{"text": text} for text in TEXTS], test_fraction=0.0, max_eval_examples=1000)
    assert len(splits.examples["test"]) == 0
    assert len(splits.examples["train"]) + len(splits.examples["validation"]) == len(set(TEXTS))


def test_a_sample_has_every_row_at_most_once() -> None:
    assert sorted(sample_indices(50, 50)) == sorted(sample_indices(50, 80)) == list(range(50))
    assert sample_indices(50, 50) != list(range(50))
    sample = sample_indices(10**9, 1000)
    assert len(set(sample)) == 1000
    assert sample_indices(0, 10) == []


def test_a_sample_does_not_depend_on_global_generators() -> None:
    first = sample_indices(1000, 20)
    np.random.seed(1)
    random.seed(1)
    torch.manual_seed(1)
    state = np.random.get_state()[1].tolist(), random.getstate(), torch.get_rng_state().tolist()
    assert sample_indices(1000, 20) == first
    assert (np.random.get_state()[1].tolist(), random.getstate(), torch.get_rng_state().tolist()) == state
