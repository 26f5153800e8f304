"""Test groups of rows: by a column, by the prompt, or none; each in one split, and numbered if held out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rightrank.api.runs import DecisionResult, decide
from rightrank.data.splits import SPLITS, DataSplits, load_data, number_groups
from rightrank.schema.errors import DataError, ResultsError
from tests.tiny import build_small_settings, generate_sentences

TEXTS = generate_sentences(160)
LARGE: dict[str, Any] = {"max_eval_examples": 1000, "validation_fraction": 0.3, "test_fraction": 0.2}


def make_rows(documents: int, **extra_columns: Any) -> list[dict[str, Any]]:
    return [{"text": text, "doc": f"d{number % documents}", **extra_columns} for number, text in enumerate(TEXTS)]


def make_prompt_row(prompt: str, answer: str) -> dict[str, Any]:
    return {"prompt": prompt, "completion": answer}


def make_message_row(prompt: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def require_complete_groups(splits: DataSplits, groups: int) -> None:
    """Require that each group is in one split, and that the held-out groups are numbered without gaps."""
    groups_by_split = {split: {example.group for example in splits.examples[split]} for split in SPLITS}
    assert sum(map(len, groups_by_split.values())) == len(set.union(*groups_by_split.values())) == groups
    numbers = number_groups(splits.examples["validation"])
    assert numbers is not None
    assert numbers[0] == 0
    assert sorted(set(numbers)) == list(range(len(groups_by_split["validation"])))


@pytest.mark.parametrize("kind", ["text", "day", "array"])
def test_a_column_groups_rows(kind: str) -> None:
    cell = {
        "text": lambda doc: doc,
        "day": lambda doc: int(doc[1:]),
        "array": lambda doc: np.arange(4000) == int(doc[1:]),
    }
    rows = [row | {"doc": cell[kind](row["doc"])} for row in make_rows(40)]
    splits = load_data(rows, build_small_settings(columns=["group=doc"], **LARGE))
    require_complete_groups(splits, 40)
    assert splits.summary.grouped_by == "doc"
    assert load_data(rows, build_small_settings(**LARGE)).summary.grouped_by is None


@pytest.mark.parametrize("row", [make_prompt_row, make_message_row])
def test_rows_with_the_same_prompt_are_a_group(row: Any) -> None:
    rows = [row(f"question {number % 40}", text) for number, text in enumerate(TEXTS)]
    splits = load_data(rows, build_small_settings(**LARGE))
    require_complete_groups(splits, 40)
    assert splits.summary.grouped_by == "prompt"
    same_prompt = [row("Write a sentence.", text) for text in TEXTS]  # the same instruction in all rows
    assert load_data(same_prompt, build_small_settings()).summary.grouped_by is None
    unique_prompts = [row(text, text) for text in TEXTS]
    assert load_data(unique_prompts, build_small_settings()).summary.grouped_by is None


def test_a_conversation_that_grows_by_turns_stays_in_one_split() -> None:
    rows = []
    for number in range(40):
        turns = [{"role": "system", "content": "You help."}]
        for turn in range(4):
            turns = [*turns, {"role": "user", "content": f"{number} {turn}"}, {"role": "assistant", "content": "yes"}]
            rows.append({"messages": turns})
    require_complete_groups(load_data(rows, build_small_settings(**LARGE)), 40)
    opened = [{"messages": row["messages"][:1] + row["messages"][2:3] + row["messages"][1:]} for row in rows]
    assert (
        load_data(opened, build_small_settings(**LARGE)).summary.grouped_by is None
    )  # no user turn comes before the answer


def test_groups_that_are_in_given_splits_too_are_counted() -> None:
    rows = make_rows(40)
    splits = load_data(
        {"train": rows[:80], "validation": rows[80:100], "test": rows[100:]},
        build_small_settings(columns=["group=doc"], **LARGE),
    )
    assert splits.summary.groups_across_splits == 40
    single_file = load_data(rows, build_small_settings(columns=["group=doc"], **LARGE))
    assert single_file.summary.groups_across_splits == 0


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            make_rows(40, doc=None),
            r"row 1: the row has no value in column 'doc', which --columns names for `group`; its columns are text, doc. Name",
        ),
        (
            [{"text": text} for text in TEXTS],
            r"row 1: the row has no value in column 'doc'.* its columns are text\. Name",
        ),
        ([*make_rows(40)[:50], {"text": "x", "doc": float("nan")}], r"row 51: the row has no value in column 'doc'"),
        (
            make_rows(1),
            r"all rows share a value of 'doc', which --columns names for `group`; name a column in which several",
        ),
        (make_rows(160), r"no two rows share a value of 'doc', which --columns names for `group`"),
    ],
)
def test_a_column_that_groups_nothing_gets_one_line(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError, match=message) as refused:
        load_data(rows, build_small_settings(columns=["group=doc"]))
    assert "\n" not in str(refused.value)


def test_too_few_groups_for_the_splits_are_named() -> None:
    with pytest.raises(DataError, match=r"0 distinct examples for the .* split.* from 160 rows in 3 groups; give more"):
        load_data(make_rows(3), build_small_settings(columns=["group=doc"]))


def make_table(documents: int) -> list[dict[str, Any]]:
    """Make rows of two ranks on 40 examples, where the smaller rank is worse on half of the documents."""
    return [
        {
            "rank": rank,
            "seed": seed,
            "item": f"{example:02}",
            "doc": example % documents,
            "value": 1 + seed / 100 + worse,
        }
        for rank in (4, 16)
        for seed in (0, 1)
        for example in range(40)
        if (worse := 0.01 * (rank == 4) * (example % documents % 2) * (1 + seed / 10)) >= 0
    ]


def decide_rows(rows: list[dict[str, Any]], group: str | None = None) -> DecisionResult:
    return decide(rows, metric="loss", margin=0.02, columns={"group": group} if group else None)


def test_decide_reads_the_groups_of_a_table() -> None:
    alone, grouped = decide_rows(make_table(8)), decide_rows(make_table(8), "doc")
    width = [
        result.decision.ranks[0].difference_high - result.decision.ranks[0].difference for result in (alone, grouped)
    ]  # type: ignore[operator]
    assert width[1] > 1.9 * width[0]
    assert "group from column doc" in grouped.input_notes
    rows_with_group = [row | {"group": row["doc"]} for row in make_table(8)]
    assert decide_rows(rows_with_group).decision == grouped.decision
    by_training = [
        row | {"group": f"sweep {row['rank']}"} for row in make_table(8)
    ]  # a W&B group of trainings, not of examples
    assert decide_rows(by_training).decision == alone.decision


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (make_table(1), "all examples share one"),
        (make_table(40), "no two examples share one"),
        ([row | {"doc": row["rank"]} for row in make_table(8)], "example 00 has two"),
        (
            [{"rank": rank, "value": 1.0 + rank / 100, "doc": 1} for rank in (4, 16)],
            "there is no column that identifies examples",
        ),
        ([{key: value for key, value in row.items() if key != "doc"} for row in make_table(8)], "has no column 'doc'"),
    ],
)
def test_a_table_whose_column_groups_nothing_gets_one_line(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ResultsError, match=message) as refused:
        decide_rows(rows, "doc")
    assert "\n" not in str(refused.value)
