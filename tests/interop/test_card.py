"""The model card: the base's licence where the base names one, and the plot, in the folder that is pushed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from rightrank import Selected, export, select_rank
from rightrank.models.weights import Licence, licence_of
from tests.tiny import small_settings

pytestmark = pytest.mark.trains

FRONT = """---
license: other
license_name: some-licence
license_link: https://example.org/"licence"
---
# A model
"""


@pytest.fixture(scope="module")
def selected(model_folder: Path, completion_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Selected:
    """A run on a base whose card names a licence of its own."""
    folder = tmp_path_factory.mktemp("card")
    shutil.copytree(model_folder, folder / "model")
    (folder / "model" / "README.md").write_text(FRONT)
    settings = small_settings(max_steps=2, eval_points=1)
    return select_rank(str(folder / "model"), completion_file, folder / "run", settings=settings)


def test_the_card_names_licence_and_base(selected: Selected) -> None:
    assert selected.adapter is not None
    card = ModelCard.load(selected.adapter.path / "README.md")  # the hub's own reader
    values = card.data.to_dict()
    assert values["license"] == "other"
    assert values["license_name"] == "some-licence"
    assert values["license_link"] == 'https://example.org/"licence"'
    assert values["library_name"] == "peft"
    assert values["base_model"] == str(selected.run.parent / "model")
    assert "some-licence" in card.text


def test_the_plot_goes_where_the_card_goes(selected: Selected) -> None:
    folder = export(selected.run, "peft").folder
    assert "](rank_curve.svg)" in (folder / "README.md").read_text(encoding="utf-8")
    assert (folder / "rank_curve.svg").read_bytes() == (selected.run / "figures" / "rank_curve.svg").read_bytes()
    assert (folder / "rank_curve.svg").read_bytes().startswith(b"<svg")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("---\nlicense: mit\n---\n", Licence("mit")),
        ("---\nlicense: [mit, other]\n---\n", Licence("mit")),
        ("---\ntags: [a]\n---\n", None),
        ("---\nlicense: {a: b}\n---\n", None),
        ("---\n: : :\n---\n", None),
        ("# no front matter --- at all --- here", None),
        ("", None),
    ],
)
def test_the_licence_of_a_card(text: str, found: Licence | None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    assert licence_of(str(tmp_path)) == found


def test_a_model_without_a_card_has_no_licence(tmp_path: Path) -> None:
    assert licence_of(str(tmp_path)) is None
    assert licence_of("some/model") is None  # offline
    assert licence_of("in memory (LlamaForCausalLM)") is None
    assert licence_of(None) is None


def test_a_gguf_file_s_header_is_read(tmp_path: Path) -> None:
    gguf: Any = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_license("apache-2.0")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert licence_of(str(tmp_path / "model.gguf")) == Licence("apache-2.0")
