"""Test where a model is, and that a truncation loads whatever the initialization of its adapter was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from rightrank import resize
from rightrank.bases.model_sources import find_model
from rightrank.demo import find_model_file
from rightrank.schema.errors import ModelError
from tests.adapters.adapters import edit_config, load_base, load_strictly, make_adapter, make_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "init",
    [True, False, "gaussian", "Gaussian", "orthogonal", "eva", "mica", "MiCA", "pissa", "pissa_niter_2", "olora", "OLoRA", "corda", "loftq"],
)  # fmt: skip
def test_an_adapter_is_truncated_unless_peft_changes_the_base(base: Path, tmp_path: Path, init: Any) -> None:
    """Compare the refusal with what PEFT does to the base, and load the truncation to an odd rank."""
    adapter = make_adapter(base, tmp_path / "adapter")
    edit_config(adapter, init_lora_weights=init)
    try:
        model = PeftModel.from_pretrained(load_base(base), str(adapter)).get_base_model()
        initial_weights = load_base(base).state_dict()
        weights = {name.replace(".base_layer.", "."): value for name, value in model.state_dict().items()}
        is_kept = all(torch.equal(value, weights[name]) for name, value in initial_weights.items())
    except (ValueError, TypeError, AttributeError):  # an initialization that needs data or another configuration
        is_kept = False
    if not is_kept:
        with pytest.raises(ModelError, match=f"init_lora_weights is '{init}'"):
            resize(adapter, tmp_path / "odd", rank=7)
        return
    resize(adapter, tmp_path / "odd", rank=7)
    load_strictly(base, tmp_path / "odd")


def test_a_gguf_file_is_loaded_from_its_folder() -> None:
    path = find_model_file()
    assert find_model(str(path)) == (str(path.parent), {"gguf_file": path.name})
