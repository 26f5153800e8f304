"""Test forms of data, splits and groups of rows, and refusals of invalid data."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rightrank.api.runs import DecisionResult, decide
from rightrank.data.groups import number_groups
from rightrank.data.rows import read_rows
from rightrank.data.sampling import sample_indices
from rightrank.data.splits import SPLITS, DataSplits, load_data, load_held_out
from rightrank.report.terminal import describe_data_issues
from rightrank.schema.errors import DataError, ResultsError
from rightrank.schema.settings import EVAL_SUBSET_SIZE
from tests.tiny import build_small_settings, generate_sentences, write_jsonl

TEXT_ROWS: list[dict[str, Any]] = [{"text": text} for text in generate_sentences(120)]


def get_ids(splits: Any, split: Any) -> set[str]:
    return {example.example_id for example in splits.examples[split]}


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
def test_the_form_is_detected_from_the_columns(tmp_path: Path, row: dict[str, Any], form: str) -> None:
    make_rows = [json.loads(json.dumps(row).replace('"a"', json.dumps(f"text {n}"))) for n in range(100)]
    splits = load_data(write_jsonl(tmp_path / "d.jsonl", make_rows), build_small_settings())
    assert splits.form == form
    assert all(splits.examples[split] for split in SPLITS)


def test_additional_rows_do_not_move_examples_between_splits(tmp_path: Path) -> None:
    settings = build_small_settings(max_eval_examples=1000)
    small = load_data(write_jsonl(tmp_path / "small.jsonl", TEXT_ROWS[:80]), settings)
    large = load_data(write_jsonl(tmp_path / "large.jsonl", TEXT_ROWS[::-1]), settings)
    for split in SPLITS:
        assert get_ids(small, split) <= get_ids(large, split)


def test_duplicates_are_in_one_split(tmp_path: Path) -> None:
    splits = load_data(write_jsonl(tmp_path / "d.jsonl", TEXT_ROWS * 3), build_small_settings(max_eval_examples=1000))
    assert splits.summary.duplicates_across_splits == 0
    assert not get_ids(splits, "train") & (get_ids(splits, "validation") | get_ids(splits, "test"))


@pytest.mark.parametrize("split_source", ["file", "folder", "validation", "test", "memory"])
def test_groups_stay_together_in_every_split(tmp_path: Path, split_source: str) -> None:
    make_rows = [row | {"group": f"g{number % 60}"} for number, row in enumerate(TEXT_ROWS)]
    other_rows = [{"text": f"other {number}"} for number in range(20)]
    settings, source = build_small_settings(max_eval_examples=1000), tmp_path / "train.jsonl"
    write_jsonl(source, make_rows)
    if split_source == "validation":
        settings = build_small_settings(
            max_eval_examples=1000, validation=str(write_jsonl(tmp_path / "other.jsonl", other_rows))
        )
    if split_source == "test":
        write_jsonl(tmp_path / "test.jsonl", other_rows)
    splits = load_data(
        {"train": make_rows}
        if split_source == "memory"
        else source
        if split_source in ("file", "validation")
        else tmp_path,
        settings,
    )
    group_by_text = {row["text"]: row.get("group", "other") for row in [*make_rows, *other_rows]}
    groups = {split: {group_by_text[example.content["text"]] for example in splits.examples[split]} for split in SPLITS}
    splits_with_groups = [split for split in SPLITS if groups[split] != {"other"}]
    assert len(splits_with_groups) == (2 if split_source in ("validation", "test") else 3)
    assert sum(len(groups[split]) for split in splits_with_groups) == 60  # each group is in one split
    one_file = load_data(source, build_small_settings(max_eval_examples=1000))
    if len(splits_with_groups) == 3:
        assert splits.fingerprint == one_file.fingerprint


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


@pytest.mark.parametrize("has_given_splits", [True, False])
def test_held_out_rows_that_differ_in_space_or_case_from_training_rows_are_counted(
    tmp_path: Path, has_given_splits: bool
) -> None:
    make_rows = [{"prompt": f"Frage {number}:\nÄpfel", "completion": f"yes {number}"} for number in range(200)]
    similar_rows = [
        {"prompt": row["prompt"].upper().replace("\n", " \u00a0 "), "completion": row["completion"]}
        for row in make_rows
    ]
    if has_given_splits:
        write_jsonl(tmp_path / "train.jsonl", make_rows[:150])
        write_jsonl(tmp_path / "validation.jsonl", [*similar_rows[:7], *make_rows[7:10], *make_rows[150:180]])
        write_jsonl(tmp_path / "test.jsonl", make_rows[180:])
        summary = load_data(tmp_path, build_small_settings(max_eval_examples=1000)).summary
        assert (summary.duplicates_across_splits, summary.near_duplicates_across_splits) == (3, 7)
        assert any(line.startswith("7 held-out examples differ") for line in describe_data_issues(summary))
    else:
        prepared = load_data(
            write_jsonl(tmp_path / "d.jsonl", [*make_rows, *similar_rows]), build_small_settings(max_eval_examples=1000)
        ).summary
        assert prepared.near_duplicates_across_splits > 0
        alone = load_data(
            write_jsonl(tmp_path / "d.jsonl", make_rows), build_small_settings(max_eval_examples=1000)
        ).summary
        assert alone.near_duplicates_across_splits == 0


def test_rows_that_an_adapter_was_trained_on_are_recognized_whatever_their_space_and_case(tmp_path: Path) -> None:
    trained = load_data(TEXT_ROWS[:90], build_small_settings()).examples["train"]
    rows = [{"text": f"  {row['text'].upper()}\t\n"} for row in TEXT_ROWS]
    splits, _ = load_held_out(write_jsonl(tmp_path / "d.jsonl", rows), build_small_settings())
    unseen = {
        " ".join(example.content["text"].split())
        for example in splits.exclude_training_examples(trained, tmp_path).examples["test"]
    }
    seen = {example.content["text"].upper() for example in trained}
    assert unseen
    assert not seen & unseen


def test_given_splits_are_kept_and_duplicates_across_them_counted(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", TEXT_ROWS[:80])
    write_jsonl(tmp_path / "validation.jsonl", TEXT_ROWS[78:100])
    write_jsonl(tmp_path / "test-00.jsonl", TEXT_ROWS[100:])
    splits = load_data(tmp_path, build_small_settings(max_eval_examples=1000))
    assert splits.summary.splits_given
    assert splits.summary.duplicates_across_splits == 2
    assert len(splits.examples["validation"]) == 22


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", ".json"])
def test_other_file_types_give_the_same_examples(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"d{suffix}"
    if suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(TEXT_ROWS), path)
    elif suffix == ".json":
        path.write_text(json.dumps(TEXT_ROWS))
    else:
        path.write_text("text\n" + "".join(f"{row['text']}\n" for row in TEXT_ROWS))
    reference = load_data(write_jsonl(tmp_path / "r.jsonl", TEXT_ROWS), build_small_settings())
    splits = load_data(path, build_small_settings())
    assert splits.fingerprint == reference.fingerprint


def test_saved_and_in_memory_datasets(tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_list(TEXT_ROWS)
    dataset.save_to_disk(str(tmp_path / "saved"))
    reference = load_data(write_jsonl(tmp_path / "r.jsonl", TEXT_ROWS), build_small_settings()).fingerprint
    assert load_data(tmp_path / "saved", build_small_settings()).fingerprint == reference
    assert load_data(dataset, build_small_settings()).fingerprint == reference
    assert load_data(TEXT_ROWS, build_small_settings()).fingerprint == reference


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_damaged_saved_dataset_is_refused_or_read(
    data: st.DataObject, saved_dataset: Path, tmp_path_factory: Any
) -> None:
    """Change or cut off bytes of one of its files. Nothing else than a `DataError` is raised."""
    folder = tmp_path_factory.mktemp("damaged") / "saved"
    shutil.copytree(saved_dataset, folder)
    file = data.draw(st.sampled_from(sorted(path for path in folder.rglob("*") if path.is_file())))
    content = bytearray(file.read_bytes())
    for position, value in data.draw(st.dictionaries(st.integers(0, len(content) - 1), st.integers(0, 255))).items():
        content[position] = value
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with contextlib.suppress(DataError):
        assert sum(len(list(rows)) for rows in read_rows(folder).values()) <= len(TEXT_ROWS)


@pytest.fixture(scope="module")
def saved_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    rows = [{"messages": [{"role": "user", "content": row["text"]}]} for row in TEXT_ROWS]
    splits = {"train": datasets.Dataset.from_list(rows[:100]), "test": datasets.Dataset.from_list(rows[100:])}
    datasets.DatasetDict(splits).save_to_disk(str(folder))
    return folder


def test_all_broken_lines_are_named_at_once(tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in TEXT_ROWS]
    lines[3], lines[10], lines[50] = '{"text": ', "[1]", "nonsense"
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"d\.jsonl:4: not JSON \(.*\) \(2 more: 11, 51\); give one JSON object"):
        load_data(tmp_path / "d.jsonl", build_small_settings())


BAD_FILES: list[tuple[str, bytes, str]] = [
    ("empty.jsonl", b"", r"empty\.jsonl: the file is empty"),
    ("blank.jsonl", b"\n\n", r"blank\.jsonl: no rows"),
    ("picture.png", b"\x89PNG", r"files of type '\.png' are not supported"),
    ("latin.jsonl", b'{"text": "caf\xe9"}\n', r"not UTF-8 text"),
    ("broken.jsonl", b'{"text": "a"}\n{"text": \n', r"broken\.jsonl:2: not JSON"),
    ("list.jsonl", b"[1, 2]\n", r"list\.json|give one JSON object a line|entry 1"),
    ("columns.jsonl", b'{"body": "a", "title": "b"}\n', r"the columns \(`body`, `title`\) fit no form"),
    ("number.jsonl", b'{"text": 3}\n' * 30, r"number\.jsonl:1: `text`: got an int; give a string"),
    ("null.jsonl", b'{"text": "a"}\n{"text": null}\n', r"null\.jsonl:2: `text`: got nothing"),
    ("roles.jsonl", b'{"messages": [{"role": "user"}]}\n', r"a message needs a `role` and a `content`"),
    ("few.jsonl", b'{"text": "a"}\n{"text": "b"}\n', r"distinct examples for the \w+ split, at least \d+ needed"),
    ("wide.csv", b"text\na,b,c\n", r"wide\.csv:2: more cells than the header"),
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


def test_a_label_that_train_lacks(tmp_path: Path) -> None:
    write_jsonl(
        tmp_path / "train.jsonl", [{"text": text, "label": n % 2} for n, text in enumerate(generate_sentences(60))]
    )
    write_jsonl(tmp_path / "validation.jsonl", [{"text": f"v {n}", "label": 7} for n in range(10)])
    with pytest.raises(DataError, match="label 7 of the validation split does not occur in train"):
        load_data(tmp_path, build_small_settings())


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


@pytest.mark.parametrize("order", ["alternating", "sorted", "by random", "by numpy", "by numpy's global", "by torch"])
def test_a_sample_has_rows_of_every_source(order: str) -> None:
    """Sample from interleaved sources, consecutive sources, and rows that were shuffled with the seed of the sample."""
    make_rows = list(range(2000)) if order == "alternating" else [*range(0, 2000, 2), *range(1, 2000, 2)]
    if order == "by random":
        random.Random(0).shuffle(make_rows)
    elif order == "by numpy":
        make_rows = [make_rows[index] for index in np.random.default_rng(0).permutation(2000)]
    elif order == "by numpy's global":
        make_rows = [make_rows[index] for index in np.random.RandomState(0).permutation(2000)]
    elif order == "by torch":
        make_rows = [make_rows[index] for index in torch.randperm(2000, generator=torch.Generator().manual_seed(0))]
    for count in (100, 500, 1000):
        odd = sum(make_rows[index] % 2 for index in sample_indices(2000, count))
        assert abs(odd - count / 2) < 2 * count**0.5  # four standard deviations


@pytest.mark.parametrize("order", ["alternating", "sorted"])
def test_held_out_examples_are_of_every_source(tmp_path: Path, order: str) -> None:
    """Check the examples that a selection evaluates, and the first of them, which it evaluates during a training."""
    first_texts, second_texts = ([f"{source} {number}" for number in range(2000)] for source in ("one", "two"))
    texts = (
        [text for pair in zip(first_texts, second_texts, strict=True) for text in pair]
        if order == "alternating"
        else [*first_texts, *second_texts]
    )
    for given_splits in ("splits", "none"):
        source = write_jsonl(tmp_path / f"{given_splits}.jsonl", [{"text": text} for text in texts])
        if given_splits == "splits":
            (tmp_path / "data").mkdir()
            source.rename(tmp_path / "data" / "validation.jsonl")
            write_jsonl(tmp_path / "data" / "train.jsonl", [{"text": f"three {number}"} for number in range(100)])
            source = tmp_path / "data"
        settings = build_small_settings(max_eval_examples=250, validation_fraction=0.2)
        validation_examples = load_data(source, settings).examples["validation"]
        for examples in (validation_examples, validation_examples[:EVAL_SUBSET_SIZE]):
            share = sum(str(example.content["text"]).startswith("one") for example in examples) / len(examples)
            assert 0.35 < share < 0.65


GROUPED_TEXTS = generate_sentences(160)
LARGE: dict[str, Any] = {"max_eval_examples": 1000, "validation_fraction": 0.3, "test_fraction": 0.2}


def make_document_rows(documents: int, **extra_columns: Any) -> list[dict[str, Any]]:
    return [
        {"text": text, "doc": f"d{number % documents}", **extra_columns} for number, text in enumerate(GROUPED_TEXTS)
    ]


def make_prompt_row(prompt: str, answer: str) -> dict[str, Any]:
    return {"prompt": prompt, "completion": answer}


def make_message_row(prompt: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def require_complete_groups(splits: DataSplits, groups: int) -> None:
    """Require that each group is in one split, and that the held-out groups are numbered without gaps."""
    groups_by_split = {split: {example.group for example in splits.examples[split]} for split in SPLITS}
    assert sum(map(len, groups_by_split.values())) == len(set.union(*groups_by_split.values())) == groups
    numbers = number_groups(splits.examples["validation"])
    assert numbers[0] == 0
    assert sorted(set(numbers)) == list(range(len(groups_by_split["validation"])))


@pytest.mark.parametrize("kind", ["text", "day", "array"])
def test_a_column_groups_rows(kind: str) -> None:
    cell = {
        "text": lambda doc: doc,
        "day": lambda doc: int(doc[1:]),
        "array": lambda doc: np.arange(4000) == int(doc[1:]),
    }
    rows = [row | {"doc": cell[kind](row["doc"])} for row in make_document_rows(40)]
    splits = load_data(rows, build_small_settings(columns=["group=doc"], **LARGE))
    require_complete_groups(splits, 40)
    assert splits.summary.grouped_by == "doc"
    assert load_data(rows, build_small_settings(**LARGE)).summary.grouped_by is None


@pytest.mark.parametrize("row", [make_prompt_row, make_message_row])
def test_rows_with_the_same_prompt_are_a_group(row: Any) -> None:
    rows = [row(f"question {number % 40}", text) for number, text in enumerate(GROUPED_TEXTS)]
    splits = load_data(rows, build_small_settings(**LARGE))
    require_complete_groups(splits, 40)
    assert splits.summary.grouped_by == "prompt"
    same_prompt = [row("Write a sentence.", text) for text in GROUPED_TEXTS]  # the same instruction in all rows
    assert load_data(same_prompt, build_small_settings()).summary.grouped_by is None
    unique_prompts = [row(text, text) for text in GROUPED_TEXTS]
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
    rows = make_document_rows(40)
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


@pytest.mark.parametrize(
    ("files", "path", "message"),
    [
        ((), "nothing.jsonl", "no such file or folder"),
        ((), ".", "contains no data file"),
        (("train.jsonl", "more.jsonl"), ".", r"more\.jsonl belongs to no split"),
    ],
)
def test_a_path_without_data_is_refused(tmp_path: Path, files: tuple[str, ...], path: str, message: str) -> None:
    for name in files:
        write_jsonl(tmp_path / name, TEXT_ROWS)
    with pytest.raises(DataError, match=message):
        load_data(tmp_path / path, build_small_settings())
