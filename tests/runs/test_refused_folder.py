"""A selection that is refused leaves its folder as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from rightrank import SelectSettings, select_rank
from rightrank.schema.errors import InputError, RunFolderError
from tests.tiny import small_settings

pytestmark = pytest.mark.trains


def select(model: Path, data: Path, out: Path, settings: SelectSettings) -> None:
    select_rank(str(model), data, out, settings=settings)


@pytest.mark.parametrize("metric", ["accuracy", "reward_margin"])
@pytest.mark.parametrize("exists", [False, True])
def test_a_metric_that_the_data_cannot_have_leaves_the_folder_as_it_was(
    metric: str, exists: bool, model_folder: Path, completion_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    if exists:
        out.mkdir()
    with pytest.raises(InputError, match="give metric 'loss'"):
        select(model_folder, completion_file, out, small_settings(metric=metric))
    assert out.exists() == exists
    assert not exists or {path.name for path in out.iterdir()} <= {".lock"}


def test_a_refused_selection_does_not_block_its_folder(
    model_folder: Path, completion_file: Path, tmp_path: Path
) -> None:
    """Ranks that no matrix of the model has are refused once the data has been encoded in the folder."""
    out = tmp_path / "run"
    with pytest.raises(InputError):
        select(model_folder, completion_file, out, small_settings(ranks=(1, 4096)))
    assert not out.exists()
    select(model_folder, completion_file, out, small_settings(max_steps=2, eval_points=1, eval_items=8))
    assert (out / "report.html").is_file()


def test_a_folder_with_other_files_is_refused_and_gets_none(
    model_folder: Path, completion_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "mine").write_text("mine")
    with pytest.raises(RunFolderError, match="holds files but no journal"):
        select(model_folder, completion_file, tmp_path, small_settings())
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["cache", "cache/mine"]
