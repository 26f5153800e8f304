"""Data sets of the hub by name, from a cache of `datasets` and without a network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest

from rightrank import select_rank
from rightrank.api.runs import load_run_config
from rightrank.data.hub import HubData, parse_hub_name, pin_revision
from rightrank.data.rows import read_rows
from rightrank.data.splits import load_data
from rightrank.schema.errors import DataError
from tests.tiny import build_small_settings, generate_sentences, write_jsonl

OLD, NEW = "a" * 40, "b" * 40  # revisions
ROWS = [{"prompt": f"{text} : ", "completion": " ".join(text.split()[:3])} for text in generate_sentences(120, seed=2)]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use an empty cache, and no network."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return folder


def store(
    cache: Path, name: str, revision: str, splits: dict[str, list[dict[str, Any]]], config: str = "default"
) -> None:
    """Store a data set in the cache as a download of it does."""
    files = {split: str(write_jsonl(cache.parent / f"{split}.jsonl", rows)) for split, rows in splits.items()}
    datasets.load_dataset("json", data_files=files, cache_dir=str(cache.parent / "made"))
    (made,) = (cache.parent / "made" / "json").glob("*/*/*/dataset_info.json")
    folder = cache / name.replace("/", "___") / config / "0.0.0" / revision
    shutil.copytree(made.parent, folder)
    shutil.rmtree(cache.parent / "made")
    stem, info = name.split("/")[1], json.loads((folder / "dataset_info.json").read_text())
    info |= {"dataset_name": stem, "config_name": config}
    for split, entry in info["splits"].items():
        (folder / f"json-{split}.arrow").rename(folder / f"{stem}-{split}.arrow")
        entry["dataset_name"] = stem
    (folder / "dataset_info.json").write_text(json.dumps(info))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("owner/name", HubData("owner/name")),
        ("owner/name:train_sft", HubData("owner/name", None, "train_sft")),
        ("owner/name:train[:50%]", HubData("owner/name", None, "train[:50%]")),
        (f"owner/name@{OLD}:test", HubData("owner/name", OLD, "test")),
        ("name", None),
        ("a/b/c", None),
        ("/owner/name", None),
        ("../name", None),
        ("./name", None),
    ],
)
def test_a_name_has_an_owner_and_may_have_a_revision_and_a_split(text: str, expected: HubData | None) -> None:
    assert parse_hub_name(text) == expected
    assert expected is None or str(expected) == text


def test_a_missing_file_is_no_name_of_the_hub(cache: Path) -> None:
    (cache.parent / "rows").mkdir()
    for name in ("owner/rows.jsonl", "rows/owner"):
        with pytest.raises(DataError, match="no such file or folder"):
            read_rows(Path(name))


def test_the_splits_of_a_data_set_are_those_of_the_run(cache: Path) -> None:
    rows = {"train": ROWS[:80], "validation": ROWS[80:100], "test": ROWS[100:]}
    store(cache, "owner/name", OLD, rows)
    splits = load_data(Path("owner/name"), build_small_settings())
    assert splits.summary.splits_given
    assert splits.fingerprint == load_data(rows, build_small_settings()).fingerprint
    one = load_data(Path("owner/name:train"), build_small_settings())
    assert (one.summary.splits_given, one.summary.rows) == (False, 80)


def test_a_data_set_with_one_split_is_split_as_a_file_is(cache: Path) -> None:
    store(cache, "owner/name", OLD, {"train": ROWS})
    by_name = load_data(Path("owner/name"), build_small_settings())
    by_file = load_data(write_jsonl(cache.parent / "rows.jsonl", ROWS), build_small_settings())
    assert by_name.fingerprint == by_file.fingerprint


def test_a_configuration_is_named_by_a_setting(cache: Path) -> None:
    store(cache, "owner/name", OLD, {"train": ROWS}, "small")
    store(cache, "owner/name", OLD, {"train": ROWS[:60]}, "tiny")
    for config, count in [("small", 120), ("tiny", 60)]:
        assert load_data(Path("owner/name"), build_small_settings(data_config=config)).summary.rows == count
    with pytest.raises(DataError, match=r"owner/name: .*cannot load it from the hub"):
        load_data(Path("owner/name"), build_small_settings(data_config="large"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("owner/other", r"^owner/other: no file or folder .*; data sets in the cache: owner/name; --data-config names"),
        ("owner/name:dev", r"^owner/name:dev: `datasets` cannot read it \(Unknown split"),
        (f"owner/name@{NEW}", f"the hub cannot be reached, and the cache has revision {OLD}"),
    ],
)
def test_what_cannot_be_read_is_one_line(cache: Path, name: str, message: str) -> None:
    store(cache, "owner/name", OLD, {"train": ROWS})
    with pytest.raises(DataError, match=message) as caught:
        load_data(Path(name), build_small_settings())
    assert "\n" not in str(caught.value)


def test_splits_with_names_of_their_own_are_chosen_by_name(cache: Path) -> None:
    store(cache, "owner/name", OLD, {"train_sft": ROWS, "train_gen": ROWS[:5]})
    with pytest.raises(
        DataError, match=r"^owner/name: name a split, such as owner/name:train; unknown split 'train_\w+'"
    ):
        load_data(Path("owner/name"), build_small_settings())
    assert load_data(Path("owner/name:train_sft"), build_small_settings()).summary.rows == 120


def test_the_revision_is_that_of_the_run_that_began(cache: Path) -> None:
    store(cache, "owner/name", NEW, {"train": ROWS})
    assert pin_revision("owner/name:train", "") == f"owner/name@{NEW}:train"
    assert pin_revision("owner/name:train", "", f"owner/name@{OLD}:train") == f"owner/name@{OLD}:train"
    assert pin_revision("owner/name", "", f"owner/name@{OLD}:train") == f"owner/name@{NEW}"
    assert pin_revision(f"owner/name@{OLD}", "") == f"owner/name@{OLD}"
    assert pin_revision("rows.jsonl", "") == "rows.jsonl"


@pytest.mark.trains
def test_a_selection_records_the_revision_and_resumes_with_it(model_folder: Path, cache: Path, tmp_path: Path) -> None:
    store(cache, "owner/name", OLD, {"train": ROWS})
    settings, run = build_small_settings(goal="adapter", strategy="bracket"), tmp_path / "run"
    first = select_rank(str(model_folder), "owner/name", run, settings=settings)
    assert load_run_config(run)["data"] == f"owner/name@{OLD}"
    journal = (run / "journal.jsonl").read_bytes()
    for data in ("owner/name", f"owner/name@{OLD}"):
        again = select_rank(str(model_folder), data, run, settings=settings)
        assert again.answers.adapter == first.answers.adapter
    assert (run / "journal.jsonl").read_bytes().startswith(journal)
