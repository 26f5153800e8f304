"""LoRA files of kohya: read and resized by us, and read by diffusers."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.kinds.images import UNET_TARGETS, make_unet, unet_output
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file

from rightrank import inspect, resize
from rightrank.models.adapter_files import open_adapter
from rightrank.schema.errors import ModelError

pytestmark = [
    pytest.mark.trains,
    pytest.mark.skipif(find_spec("diffusers") is None, reason="diffusers is not installed"),
]


def random_adapter(folder: Path, **changes: Any) -> torch.Tensor:
    """A saved adapter of the U-Net whose every tensor is random; returns the U-Net's output with it."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": UNET_TARGETS, "rank_pattern": {"conv1": 2}}
    torch.manual_seed(0)
    model: Any = get_peft_model(make_unet(), LoraConfig(**options | changes)).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(str(folder))
    return unet_output(model)


def kohya_file(folder: Path, file: Path) -> Path:
    """The adapter in kohya's keys, with an alpha for each module."""
    adapter, tensors = open_adapter(folder), {}
    for module in adapter.modules:
        name = f"lora_unet_{module.name.replace('.', '_')}"
        tensors[f"{name}.lora_down.weight"] = adapter.tensor(module.a_key).contiguous()
        tensors[f"{name}.lora_up.weight"] = adapter.tensor(module.b_key).contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(module.scaling * module.rank)
    save_file(tensors, file, {"ss_network_dim": "4"})
    return file


def loaded(file: Path) -> torch.Tensor:
    """The output of a U-Net into which diffusers loaded the file."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin as Mixin

    unet = make_unet()
    tensors, alphas = Mixin.lora_state_dict(str(file))
    Mixin.load_lora_into_unet(tensors, alphas, unet)
    return unet_output(unet)


@pytest.mark.parametrize("use_rslora", [False, True], ids=["alpha/r", "rslora"])
def test_diffusers_loads_what_is_resized(use_rslora: bool, tmp_path: Path) -> None:
    expected = random_adapter(tmp_path / "peft", use_rslora=use_rslora)
    file = kohya_file(tmp_path / "peft", tmp_path / "file.safetensors")
    folder, ours = inspect(tmp_path / "peft"), inspect(file)
    energies = [sorted(module.frobenius_norm for module in found.modules) for found in (folder, ours)]
    assert energies[1] == pytest.approx(energies[0], rel=1e-6)
    assert ours.summary.modules_to_save == []
    wide = tmp_path / "wide.safetensors"
    assert resize(file, wide, rank=4).relative_delta_error < 1e-6  # conv1 is padded
    assert torch.allclose(loaded(wide), expected, atol=1e-5)
    small = tmp_path / "small.safetensors"
    resized = resize(file, small, rank=1)
    assert {module.rank for module in open_adapter(small).modules} == {1}
    with safe_open(small, framework="pt") as opened:
        assert opened.metadata()["ss_network_dim"] == "1"
    assert resized.relative_delta_error == pytest.approx(
        resize(tmp_path / "peft", tmp_path / "s", rank=1).relative_delta_error
    )
    assert float((loaded(small) - expected).norm()) > 0


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"weight": torch.zeros(2, 2)}, "no keys of kohya"),
        ({"x.lora_down.weight": torch.zeros(2, 3), "x.dora_scale": torch.zeros(4, 1)}, "it holds x.dora_scale"),
        ({"x.lora_down.weight": torch.zeros(2, 3)}, "x has no lora_B"),
    ],
    ids=["no factors", "DoRA", "one factor"],
)
def test_other_files_are_refused_in_one_line(tensors: dict[str, torch.Tensor], said: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "file.safetensors")
    with pytest.raises(ModelError, match=said) as raised:
        inspect(tmp_path / "file.safetensors")
    assert "\n" not in str(raised.value)


def test_convolutions_in_groups_are_refused_in_one_line(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3, groups=2))
    with pytest.warns(UserWarning, match="groups > 1"):
        adapted: Any = get_peft_model(model, LoraConfig(r=2, target_modules=["0"]))
    adapted.save_pretrained(str(tmp_path / "grouped"))
    with pytest.raises(ModelError, match="convolutions in groups are not supported"):
        inspect(tmp_path / "grouped")
