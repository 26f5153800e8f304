"""Test the loss without a part of an adapter: it is that of an adapter whose B is zero there, and of the adapter without the part."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rightrank import compare, inspect, resize
from rightrank.adapters.adapter_reader import open_adapter
from rightrank.adapters.parts import group_modules
from rightrank.schema.errors import InputError
from rightrank.schema.settings import SelectSettings
from tests.adapters.adapters import load_strictly, load_tensors, make_adapter, write_tensors
from tests.commands import run
from tests.tiny import write_completions

SETTINGS = SelectSettings(seq_len=32, batch_size=4)


@pytest.mark.trains
@pytest.mark.parametrize("kind", ["plain", "dora"])
def test_the_loss_without_a_part(
    model_folder: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, data = make_adapter(model_folder, tmp_path / "a", kind), tmp_path / "rows.jsonl"
    write_completions(data, 12)
    tensors = load_tensors(adapter)
    removed_keys = {key for key in tensors if ".q_proj." in key}
    shutil.copytree(adapter, tmp_path / "zeroed")
    # PEFT's initial values, in which DoRA's magnitude is the norm of the base's rows
    write_tensors(
        tmp_path / "zeroed", {k: v * 0 if k in removed_keys and "lora_B" in k else v for k, v in tensors.items()}
    )

    inspection = inspect(adapter, data=data, settings=SETTINGS)
    values = {value.part: value for value in inspection.parts}
    kinds = {"q_proj", "v_proj", "down_proj"}
    blocks = [value for name, value in values.items() if name.startswith("layer")]
    assert values.keys() == kinds | {block.part for block in blocks}
    assert sum(values[name].parameters for name in kinds) == sum(block.parameters for block in blocks)
    queries = values["q_proj"]
    assert queries.worse_by_low <= queries.worse_by <= queries.worse_by_high

    resized = resize(adapter, tmp_path / "out", without=["q_proj"], data=data, settings=SETTINGS)
    assert resized.removed == queries
    assert load_tensors(tmp_path / "out").keys() == tensors.keys() - removed_keys
    load_strictly(model_folder, tmp_path / "out")
    written = compare(adapter, tmp_path / "out", model=str(model_folder), data=data, settings=SETTINGS)
    assert written.difference == pytest.approx(queries.worse_by, abs=1e-6)
    if kind == "plain":
        zeroed = compare(adapter, tmp_path / "zeroed", model=str(model_folder), data=data, settings=SETTINGS)
        assert zeroed.difference == pytest.approx(queries.worse_by, abs=1e-6)
        status, table, _ = run(["inspect", str(adapter), "--data", str(data)], capsys)
        assert status == 0
        assert re.search(r"^q_proj +3 .* to ", table, re.MULTILINE)


NAMES = (
    *(f"model.visual.blocks.{layer}.attn.qkv" for layer in range(2)),
    "model.visual.merger.mlp.0",
    *(f"model.language_model.layers.{layer}.self_attn.q_proj" for layer in range(6)),
)


def write_named_file(path: Path) -> Path:
    factors = {"lora_A": torch.ones(2, 4), "lora_B": torch.ones(6, 2)}
    save_file({f"{name}.{factor}.weight": value.clone() for name in NAMES for factor, value in factors.items()}, path)
    return path


def test_parts_of_a_vision_language_model(tmp_path: Path) -> None:
    parts = group_modules(open_adapter(write_named_file(tmp_path / "x.safetensors")).modules)
    assert {name: len(modules) for name, modules in parts.items()} == {
        **{"mlp": 1, "q_proj": 6, "qkv": 2},
        **{"layer 0": 1, "layers 1–2": 2, "layer 3": 1, "layers 4–5": 2},
        **{"language model": 6, "projector": 1, "vision tower": 2},
    }


def test_parts_of_a_single_file_are_removed(tmp_path: Path) -> None:
    path = write_named_file(tmp_path / "x.safetensors")
    resized = resize(path, tmp_path / "y.safetensors", without=[r"model\.visual\..*"])
    remaining = {module.name for module in open_adapter(tmp_path / "y.safetensors").modules}
    assert remaining == {name for name in NAMES if "visual" not in name}
    assert resized.relative_delta_error == pytest.approx((3 / 9) ** 0.5)
    assert resized.parameters_after == 6 * 2 * 10


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"without": ["o_proj"]},
            "--without o_proj matches no module; give the ends of their names, such as 0, q_proj, qkv",
        ),
        ({"without": ["q_proj", "qkv", "0"]}, "--without matches every module"),
        ({"without": ["q_proj"], "rank": 1}, "--rank given; give exactly one"),
    ],
)
def test_bad_patterns_are_one_line(tmp_path: Path, options: dict[str, object], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        resize(write_named_file(tmp_path / "x.safetensors"), tmp_path / "y.safetensors", **options)  # type: ignore[arg-type]
