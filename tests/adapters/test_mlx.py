"""Test adapters of mlx-lm, and the refusal of a folder with several adapters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rightrank import resize
from rightrank.adapters.adapter_files import open_adapter
from rightrank.adapters.adapter_folders import MLX_FILE
from rightrank.adapters.spectra import inspect_adapter
from rightrank.schema.errors import ModelError
from tests.adapters.adapters import MLX, make_adapter, make_base, write_mlx


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("adapter") / "plain")


def compute_mlx_updates(folder: Path) -> dict[str, torch.Tensor]:
    """Compute ΔW of each module as mlx-lm's `LoRALinear.fuse` does."""
    scale = json.loads((folder / "adapter_config.json").read_text())["lora_parameters"]["scale"]
    tensors = load_file(folder / MLX_FILE)
    names = {key.rpartition(".")[0] for key in tensors}
    return {name: (scale * tensors[f"{name}.lora_b"].T) @ tensors[f"{name}.lora_a"].T for name in names}


def test_an_output_folder_is_answered_with_the_adapters_in_it(adapter: Path, tmp_path: Path) -> None:
    paths = [tmp_path / "out" / name for name in ("checkpoint-100", "global_step_9/actor/lora_adapter")]
    for path in paths:
        shutil.copytree(adapter, path)
    with pytest.raises(ModelError, match=f"give one of the adapters in it: {paths[0]}, {paths[1]}$"):
        resize(tmp_path / "out", tmp_path / "small", rank=1)


def test_an_adapter_of_mlx_has_the_same_updates(base: Path, adapter: Path, tmp_path: Path) -> None:
    folder = write_mlx(tmp_path / "mlx", adapter, base)
    read, plain = open_adapter(folder), open_adapter(adapter)
    assert read.base_model == str(base)
    assert [(module.name, module.rank, module.scaling, module.rows) for module in read.modules] == [
        (module.name, module.rank, module.scaling, module.rows) for module in plain.modules
    ]
    for update, plain_update in zip(inspect_adapter(folder).modules, inspect_adapter(adapter).modules, strict=True):
        assert update == plain_update


@pytest.mark.parametrize("rank", [3, 8, 12])
def test_an_adapter_of_mlx_is_written_as_mlx_loads_it(rank: int, base: Path, adapter: Path, tmp_path: Path) -> None:
    folder = write_mlx(tmp_path / "mlx", adapter, base)
    resize(folder, tmp_path / "small", rank=rank)
    stored = json.loads((tmp_path / "small" / "adapter_config.json").read_text())
    assert stored["lora_parameters"]["rank"] == rank
    assert {name: value for name, value in stored.items() if name != "lora_parameters"} == MLX | {"model": str(base)}
    shapes = {
        tuple(tensor.shape)[1]
        for key, tensor in load_file(tmp_path / "small" / MLX_FILE).items()
        if key.endswith("lora_a")
    }
    assert shapes == {rank}
    old_updates, new_updates = compute_mlx_updates(folder), compute_mlx_updates(tmp_path / "small")
    for name, update in old_updates.items():
        exact = update if rank >= 8 else _truncate_matrix(update, rank)
        assert torch.allclose(new_updates[name], exact, atol=1e-5)


def _truncate_matrix(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    u, values, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    return ((u[:, :rank] * values[:rank]) @ vt[:rank]).float()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fine_tune_type": "dora"}, "fine_tune_type 'dora'"),
        ({"lora_parameters": {"rank": 8}}, "scale None"),
        ({"lora_parameters": {"rank": 4, "scale": 2.0}}, "rank 8 in the weights and 4"),
    ],
)
def test_what_is_not_read_of_mlx(
    changes: dict[str, Any], message: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message):
        open_adapter(write_mlx(tmp_path / "mlx", adapter, base, **changes))
