"""The model card: its front matter, and the plot, in the folder that is pushed."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from rightrank import Selected, export, select_rank
from tests.tiny import small_settings

pytestmark = pytest.mark.trains


@pytest.fixture(scope="module")
def selected(model_folder: Path, completion_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Selected:
    settings = small_settings(max_steps=2, eval_points=1)
    return select_rank(str(model_folder), completion_file, tmp_path_factory.mktemp("card") / "run", settings=settings)


def test_the_card_names_the_base(selected: Selected, model_folder: Path) -> None:
    assert selected.adapter is not None
    card = ModelCard.load(selected.adapter.path / "README.md")  # the hub's own reader
    values = card.data.to_dict()
    assert values["library_name"] == "peft"
    assert values["base_model"] == str(model_folder)


def test_the_plot_goes_where_the_card_goes(selected: Selected) -> None:
    folder = export(selected.run, "peft").folder
    assert "](rank_curve.svg)" in (folder / "README.md").read_text(encoding="utf-8")
    assert (folder / "rank_curve.svg").read_bytes() == (selected.run / "figures" / "rank_curve.svg").read_bytes()
    assert (folder / "rank_curve.svg").read_bytes().startswith(b"<svg")
