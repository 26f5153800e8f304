"""Test single files of sd-scripts and ComfyUI: the same update is read, truncated as well as possible, and written with their keys."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import rightrank
from rightrank.schema.errors import InputError
from tests.commands import run

ROOT = Path(__file__).parents[2]
BLOCK = "down_blocks_1_attentions_0_transformer_blocks_0_attn1"
SHAPES = {
    "kohya": {
        f"lora_unet_{BLOCK}_to_q": (48, 40),
        f"lora_unet_{BLOCK}_to_out_0": (40, 48),
        "lora_unet_down_blocks_0_resnets_0_conv1": (24, 12, 3, 3),
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj": (32, 32),
    },
    "comfy": {"diffusion_model.blocks.0.self_attn.q": (48, 40), "diffusion_model.blocks.10.ffn.0": (40, 30)},
}
SUFFIXES = {"kohya": ("lora_down", "lora_up"), "comfy": ("lora_A", "lora_B")}


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
    """Return each update as the loaders of sd-scripts and ComfyUI compute it: alpha / rank · up · down, in float64."""
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


@pytest.mark.parametrize(("style", "has_alpha"), [("kohya", True), ("comfy", True), ("comfy", False)])
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
    assert metadata["ss_network_dim"] == "3"
    assert "sshs_model_hash" not in metadata
    assert {tensor.dtype for key, tensor in load_file(out).items() if "alpha" not in key} == {torch.float16}


def test_the_page_compares_the_errors_and_the_time_with_those_of_sd_scripts() -> None:
    page = (ROOT / "docs" / "how-to" / "resize.md").read_text(encoding="utf-8")
    rows = json.loads((ROOT / "benchmarks" / "consumers" / "sd_scripts.json").read_text(encoding="utf-8"))["rows"]
    for row in rows:
        assert row["rightrank"]["error"] == pytest.approx(row["sd-scripts"]["error"], rel=1e-6)
        assert f"{row['rightrank']['error']:.4f}" in page
    ours, theirs = (max(row[program]["seconds"] for row in rows) for program in ("rightrank", "sd-scripts"))
    assert f"in {ours:.2f} s of processor time instead of {theirs:.2f}" in page


def test_ranks_by_energy_differ_in_a_file(tmp_path: Path) -> None:
    path, out = tmp_path / "style.safetensors", tmp_path / "small.safetensors"
    write_file(path, "kohya")
    ranks = {module.name: module.rank for module in rightrank.resize(path, out, energy=0.6).modules}
    assert len(set(ranks.values())) > 1
    assert {name: len(load_file(out)[f"{name}.lora_down.weight"]) for name in ranks} == ranks
    updates, smaller = compute_updates(path, "kohya"), compute_updates(out, "kohya")
    for name, update in updates.items():
        assert np.linalg.norm(smaller[name] - update) < np.sqrt(0.41) * np.linalg.norm(update)


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("lora_unet_x.hada_w1_a", "only LoRA is read"),
        ("base_model.model.x.lora_A.weight", "layouts that can be read are folders of PEFT"),
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
    assert "choose by --rank or --energy" in message
