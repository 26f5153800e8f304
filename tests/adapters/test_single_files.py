"""Test single files of sd-scripts and diffusers: the same update is read, truncated as well as possible, and written with their keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import rightrank
from rightrank.schema.errors import InputError
from tests.commands import run

BLOCK = "down_blocks_1_attentions_0_transformer_blocks_0_attn1"
SHAPES = {
    "kohya": {
        f"lora_unet_{BLOCK}_to_q": (48, 40),
        f"lora_unet_{BLOCK}_to_out_0": (40, 48),
        "lora_unet_down_blocks_0_resnets_0_conv1": (24, 12, 3, 3),
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj": (32, 32),
    },
    "diffusers": {"transformer.blocks.0.attn.to_q": (48, 40), "transformer.blocks.10.ff.net.0.proj": (40, 30)},
}
SUFFIXES = {"kohya": ("lora_down", "lora_up"), "diffusers": ("lora_A", "lora_B")}


def write_file(path: Path, style: str, rank: int = 8, has_alpha: bool = True) -> None:
    """Write a file as `LoRAModule` of sd-scripts saves it: 16 bits, an alpha for each module, and the network's metadata."""
    torch.manual_seed(0)
    tensors = {}
    down, up = SUFFIXES[style]
    for number, (name, (rows, columns, *kernel)) in enumerate(SHAPES[style].items()):
        tensors[f"{name}.{down}.weight"] = torch.randn(rank, columns, *kernel).half()
        tensors[f"{name}.{up}.weight"] = (
            (torch.randn(rows, rank) * torch.logspace(0, -number / 2, rank))
            .reshape(rows, rank, *(1 for _ in kernel))
            .half()
        )
        if has_alpha:
            tensors[f"{name}.alpha"] = torch.tensor(4.0 + (number == 1)).half()
    save_file(tensors, path, {"ss_network_dim": str(rank), "ss_network_alpha": "4.0", "sshs_model_hash": "0"})


def compute_updates(path: Path, style: str) -> dict[str, np.ndarray]:
    """Return each update as the loaders of sd-scripts and diffusers compute it: alpha / rank · up · down, in float64."""
    tensors, (down, up) = {key: value.double() for key, value in load_file(path).items()}, SUFFIXES[style]
    return {
        name: (
            tensors[f"{name}.{up}.weight"].flatten(1)
            @ tensors[f"{name}.{down}.weight"].flatten(1)
            * (float(tensors[f"{name}.alpha"]) / len(a) if f"{name}.alpha" in tensors else 1)
        ).numpy()
        for name in SHAPES[style]
        if (a := tensors[f"{name}.{down}.weight"]) is not None
    }


@pytest.mark.parametrize(("style", "has_alpha"), [("kohya", True), ("kohya", False), ("diffusers", False)])
def test_files_are_inspected_and_truncated_with_their_keys(tmp_path: Path, style: str, has_alpha: bool) -> None:
    path, out = tmp_path / "style.safetensors", tmp_path / "small.safetensors"
    write_file(path, style, has_alpha=has_alpha)
    updates = compute_updates(path, style)
    dense = {name: np.linalg.svd(update, compute_uv=False) for name, update in updates.items()}
    spectra = {module.name: module.singular_values for module in rightrank.inspect(path).modules}
    assert spectra.keys() == dense.keys()
    for name, values in dense.items():
        assert np.allclose(spectra[name], values[:8], rtol=1e-9)

    resized = rightrank.resize(path, out, rank=3)
    smaller = compute_updates(out, style)
    dropped = {name: np.linalg.norm(values[3:]) for name, values in dense.items()}
    for name, update in updates.items():
        assert np.linalg.norm(smaller[name] - update) == pytest.approx(
            dropped[name], rel=1e-5
        )  # the least that is possible
    total = np.linalg.norm([*map(np.linalg.norm, updates.values())])
    assert resized.relative_delta_error == pytest.approx(np.linalg.norm([*dropped.values()]) / total, rel=1e-5)
    assert set(load_file(out)) == set(load_file(path))
    with safe_open(out, framework="pt") as file:
        metadata = file.metadata()
    assert not {"ss_network_dim", "sshs_model_hash"} & {*(metadata or {})}  # of the tensors before
    assert {tensor.dtype for key, tensor in load_file(out).items() if "alpha" not in key} == {torch.float16}


@pytest.fixture(scope="module")
def pipeline_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Save one adapter of a U-Net as diffusers does: with its own keys and configuration, and with PEFT's keys and neither."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils import convert_state_dict_to_diffusers

    unet = make_unet()
    torch.manual_seed(0)
    options = {"rank_pattern": {"to_out.0": 2}, "alpha_pattern": {"to_k": 3}, "use_rslora": True}
    unet.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k", "to_out.0"], **options))
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    layers, root = get_peft_model_state_dict(unet), tmp_path_factory.mktemp("pipeline")
    save = diffusers.StableDiffusionPipeline.save_lora_weights
    save(root / "own", convert_state_dict_to_diffusers(layers), **_collate_lora_metadata({"unet": unet}))
    save(root / "peft", layers)
    return {name: root / name / "pytorch_lora_weights.safetensors" for name in ("own", "peft")}


def make_unet() -> Any:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(1)
    return diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=8, cross_attention_dim=32, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def load_by_diffusers(path: Path) -> dict[str, np.ndarray]:
    """Return each update as diffusers loads it into the U-Net."""
    unet = make_unet()
    state, alphas, metadata = read_state(path)
    unet.load_lora_adapter(state, prefix="unet", network_alphas=alphas, metadata=metadata)
    return {
        f"unet.{name}": module.get_delta_weight(next(iter(module.lora_A))).detach().double().numpy()
        for name, module in unet.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def read_state(path: Path) -> tuple[Any, Any, Any]:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.lora_state_dict(path.parent, weight_name=path.name, return_lora_metadata=True)  # type: ignore[no-any-return]


@pytest.mark.trains
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["own", "peft"])
def test_files_of_diffusers_are_truncated_and_loaded_by_diffusers(
    kind: str, pipeline_files: dict[str, Path], tmp_path: Path
) -> None:
    path, out = pipeline_files[kind], tmp_path / "small.safetensors"
    updates = load_by_diffusers(path)
    spectra = {module.name: module.singular_values for module in rightrank.inspect(path).modules}
    assert spectra.keys() == updates.keys()
    dense = {name: np.linalg.svd(update, compute_uv=False) for name, update in updates.items()}
    assert all(np.allclose(values, dense[name][: len(values)], rtol=1e-4) for name, values in spectra.items())
    rightrank.resize(path, out, rank=1)
    assert set(load_file(out)) == set(load_file(path))
    for name, smaller in load_by_diffusers(out).items():
        dropped = np.linalg.norm(dense[name][1:])
        assert np.linalg.norm(smaller - updates[name]) == pytest.approx(dropped, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "not readable as JSON"),
        ('{"unet.lora_alpha": "x"}', r"unet has the alphas \['x'\]"),
        ('{"unet.lora_alpha": 1, "unet.alpha_pattern": []}', "no LoRA factors|has no lora_B"),
    ],
)
def test_damaged_configurations_of_diffusers_are_one_line(tmp_path: Path, text: str, sentence: str) -> None:
    save_file(
        {"unet.x.lora.down.weight": torch.ones(2, 2)}, tmp_path / "x.safetensors", {"lora_adapter_metadata": text}
    )
    with pytest.raises(InputError, match=sentence):
        rightrank.inspect(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("lora_unet_x.hada_w1_a", "only LoRA is read"),
        ("base_model.model.x.lora_A.weight", "layouts that can be read are folders of PEFT"),
        ("diffusion_model.x.lora_A.weight", "or it has ComfyUI's layout"),
        ("lora_unet_x.lora_down.weight", "has no lora_B"),
        ("x.weight", "no LoRA factors"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path: Path, key: str, sentence: str) -> None:
    save_file({key: torch.ones(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=sentence):
        rightrank.inspect(tmp_path / "x.safetensors")


def test_a_file_is_not_loaded_onto_a_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_file(tmp_path / "style.safetensors", "kohya")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    options = [str(tmp_path / "style.safetensors"), str(tmp_path / "out"), "--data", str(tmp_path / "rows.jsonl")]
    status, _, message = run(["resize", *options, "--base", "model"], capsys)
    assert status == 2
    assert "choose by --rank" in message
