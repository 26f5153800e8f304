"""A model folder that MLX quantised, read as PyTorch reads: w = scale · q + bias in groups of values of a row.

q has a few bits, and is packed into words of 32 bits, the lowest bits first.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from rightrank.data.files import read_json_object
from rightrank.models.model_sources import is_mlx
from rightrank.models.safetensors_files import safe_shards
from rightrank.schema.errors import ModelError

WITHIN_WORDS = (2, 4, 8)  # bits of a value; of another number, values cross the words


@contextmanager
def torch_folder(place: str) -> Iterator[str]:
    """The model's place itself; of a folder that MLX quantised, in the block a copy whose matrices are those that MLX computes with."""
    if not is_mlx(Path(place)):
        yield place
        return
    folder = Path(place)
    config = read_json_object(folder / "config.json")
    settings = config.pop("quantization")
    config.pop("quantization_config", None)
    tensors = {key: value for shard in safe_shards(folder) for key, value in load_file(shard).items()}
    with tempfile.TemporaryDirectory(prefix="rightrank-") as name:
        copy = Path(name) / folder.name
        copy.mkdir()
        for file in folder.iterdir():
            if file.is_file() and file.suffix != ".safetensors" and not file.name.endswith(".index.json"):
                shutil.copy2(file, copy)
        (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
        save_file(_unpacked(folder, tensors, settings), copy / "model.safetensors", {"format": "pt"})
        yield str(copy)


def _unpacked(
    folder: Path, tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """The tensors with every quantised matrix as the product of its scales.

    Raises:
        ModelError: another way of quantising than `affine`, bits that cross the words, or matrices with settings of their own.
    """
    mode, bits, size = settings.get("mode", "affine"), int(settings["bits"]), int(settings["group_size"])
    unread = [f"matrices with bits of their own ({name}, …)" for name, own in settings.items() if isinstance(own, dict)]
    unread += [f"mode {mode!r}"] * (mode != "affine") + [f"{bits} bits"] * (bits not in WITHIN_WORDS)
    if unread:
        raise ModelError(
            f"{folder}: quantised by MLX with {unread[0]}, which is not read here; give one of mlx_lm.convert's defaults"
        )
    unpacked: dict[str, torch.Tensor] = {}
    for key, value in tensors.items():
        name = key.removesuffix(".weight")
        if key.endswith((".scales", ".biases")) and f"{key.rsplit('.', 1)[0]}.weight" in tensors:
            continue
        if f"{name}.scales" in tensors and value.dtype == torch.uint32:
            scales, biases = (tensors[f"{name}.{part}"].float()[..., None] for part in ("scales", "biases"))
            q = (value.long()[..., None] >> torch.arange(0, 32, bits)) & (2**bits - 1)
            value = (q.reshape(*scales.shape[:-1], size) * scales + biases).reshape(len(value), -1)
        unpacked[key] = value.contiguous()
    return unpacked
