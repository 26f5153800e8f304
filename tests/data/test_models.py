"""Test how a model is located without loading it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rightrank.demo import find_model_file
from rightrank.models.model_sources import ModelSource, find_model
from rightrank.schema.errors import ModelError


def test_a_gguf_file_is_loaded_from_its_folder() -> None:
    path = find_model_file()
    assert find_model(str(path)) == ModelSource(str(path.parent), path.name)


def test_a_folder_of_gguf_files_names_the_file_to_give(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ModelError, match=r"no config\.json in the folder; give the file: .*model\.gguf"):
        find_model(str(tmp_path))


def test_a_name_with_one_slash_is_a_hub_name() -> None:
    assert find_model("HuggingFaceTB/SmolLM2-135M") == ModelSource("HuggingFaceTB/SmolLM2-135M", None)
