"""Test that exported files work from their own folder after a selection in any folder, also with other column names."""

from __future__ import annotations

import json
import os
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import yaml

from rightrank import export, select_rank
from rightrank.interop.exports import TARGETS, write_export
from rightrank.interop.recipe import Recipe, build_recipe
from rightrank.runs.folder import RunFolder
from rightrank.schema.events import RunStarted
from rightrank.schema.trials import TrialFinished
from tests.commands import run_forked
from tests.tiny import build_small_settings

pytestmark = pytest.mark.trains


@pytest.fixture(scope="module")
def home(model_folder: Path, completion_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with a run whose model and data were given as relative paths."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "model").symlink_to(model_folder)
    (folder / "data.jsonl").symlink_to(completion_file)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        settings = build_small_settings(max_steps=2, goal="adapter", target_modules=("q_proj", "v_proj"))
        select_rank("./model", "data.jsonl", "run", settings=settings)
        for target in TARGETS:
            export("run", target)
    return folder


@pytest.fixture(scope="module")
def recipe(home: Path) -> Recipe:
    journal = RunFolder(home / "run").journal.read()
    started = next(record for record in journal if isinstance(record, RunStarted))
    finished = [record for record in journal if isinstance(record, TrialFinished)]
    return build_recipe(started, finished[-1], home / "run" / "adapter", finished)


def test_no_file_names_a_place_relative_to_where_the_selection_ran(home: Path) -> None:
    model, data = (home / "model").resolve(), (home / "data.jsonl").resolve()
    for target in TARGETS:
        folder = home / "run" / "exports" / target
        text = "".join(path.read_text() for path in folder.iterdir() if path.suffix in (".py", ".yaml", ".sh", ".json"))
        assert "./model" not in text
        assert str(model) in text
        assert '"data.jsonl"' not in text.replace(str(data), "")


def test_an_export_from_another_folder_names_the_same_places(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = export(home / "run", "trl", tmp_path / "elsewhere")
    settings = yaml.safe_load((result.folder / "trl_sft.yaml").read_text())
    assert settings["model_name_or_path"] == str((home / "model").resolve())
    assert settings["datasets"][0]["data_files"] == str((home / "data.jsonl").resolve())


def run_trl_sft(folder: Path) -> None:
    """Run `trl sft --config trl_sft.yaml` in this process, with TRL's own parser and script."""
    warnings.simplefilter("ignore")
    os.chdir(folder)
    sys.argv = ["sft", "--config", "trl_sft.yaml", "--max_steps", "1", "--report_to", "none", "--use_cpu", "true"]
    from trl.scripts.sft import main, make_parser

    main(*make_parser().parse_args_and_config(return_remaining_strings=True)[:4])


def test_trl_runs_from_the_exported_folder(home: Path, tmp_path: Path) -> None:
    folder = home / "run" / "exports" / "trl"
    status, err = run_forked(partial(run_trl_sft, folder), tmp_path / "log").end()
    assert status == 0, err[-3000:]
    config = json.loads((folder / "trl-output" / "adapter_config.json").read_text())
    assert config["r"] == yaml.safe_load((folder / "trl_sft.yaml").read_text())["lora_r"]


def test_unsloth_gets_bare_names(recipe: Recipe, tmp_path: Path) -> None:
    full_name_recipe = replace(
        recipe, target_modules=("model.layers.1.self_attn.q_proj", "model.layers.2.self_attn.q_proj")
    )
    write_export("unsloth", full_name_recipe, tmp_path / "out")
    assert "target_modules=['q_proj']" in (tmp_path / "out" / "unsloth_lora.py").read_text()


@pytest.mark.parametrize("shape", ["alpaca", "sharegpt", "ask → prompt, reply → completion"])
def test_trainers_read_the_columns_that_the_file_has(recipe: Recipe, shape: str) -> None:
    renamed = {"prompt": "ask, then → wait", "completion": "reply"} if "→" in shape else {}
    renamed_recipe = replace(recipe, shape=shape, columns=renamed)
    dataset = yaml.safe_load(TARGETS["axolotl"](renamed_recipe).files["axolotl.yaml"])["datasets"][0]
    entry = json.loads(TARGETS["llamafactory"](renamed_recipe).files["dataset_info.json"])["rightrank_data"]
    if shape == "alpaca":
        assert dataset["type"] == "alpaca"
        assert entry["columns"]["query"] == "input"
    elif shape == "sharegpt":
        assert dataset["field_messages"] == entry["columns"]["messages"] == "conversations"
    else:
        assert dataset["type"]["field_instruction"] == entry["columns"]["prompt"] == "ask, then → wait"
    assert any(shape in note for note in TARGETS["trl"](renamed_recipe).notes)
