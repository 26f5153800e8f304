"""Convert a model folder that MLX quantized into weights that PyTorch reads: w = scale · q + bias in groups of values of a row.

Each q has a few bits. The values are packed into words of 32 bits, the lowest bits first.
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

from rightrank.bases.model_sources import is_mlx_quantized
from rightrank.bases.safetensors_files import find_shards
from rightrank.data.files import read_json_object
from rightrank.schema.errors import ModelError

SUPPORTED_BITS = (2, 4, 8)  # bits of a value; of another number, values cross the words


@contextmanager
def ensure_torch_format(model: str) -> Iterator[str]:
    """Yield the location of a model that PyTorch reads: the given one, or a temporary copy with dequantized matrices if MLX quantized the folder."""
    if not is_mlx_quantized(Path(model)):
        yield model
        return
    folder = Path(model)
    config = read_json_object(folder / "config.json")
    settings = config.pop("quantization")
    config.pop("quantization_config", None)
    tensors = {key: value for shard in find_shards(folder) for key, value in load_file(shard).items()}
    with tempfile.TemporaryDirectory(prefix="rightrank-") as name:
        copy = Path(name) / folder.name
        copy.mkdir()
        for file in folder.iterdir():
            if file.is_file() and file.suffix != ".safetensors" and not file.name.endswith(".index.json"):
                shutil.copy2(file, copy)
        (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
        save_file(_dequantize(folder, tensors, settings), copy / "model.safetensors", {"format": "pt"})
        yield str(copy)


def _dequantize(
    folder: Path, tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """Return the tensors with every quantized matrix multiplied out.

    Raises:
        ModelError: The mode is not `affine`, values cross the words, or some matrices have their own settings.
    """
    mode, bits, size = settings.get("mode", "affine"), int(settings["bits"]), int(settings["group_size"])
    unsupported = [
        f"matrices with their own number of bits ({name}, …)"
        for name, module_settings in settings.items()
        if isinstance(module_settings, dict)
    ]
    unsupported += [f"mode {mode!r}"] * (mode != "affine") + [f"{bits} bits"] * (bits not in SUPPORTED_BITS)
    if unsupported:
        raise ModelError(
            f"{folder}: MLX quantized it with {unsupported[0]}, which is not supported; convert it with the defaults of mlx_lm.convert"
        )
    unpacked: dict[str, torch.Tensor] = {}
    for key, value in tensors.items():
        name = key.removesuffix(".weight")
        if key.endswith((".scales", ".biases")) and f"{key.rsplit('.', 1)[0]}.weight" in tensors:
            continue
        if f"{name}.scales" in tensors and value.dtype == torch.uint32:
            scales, biases = (tensors[f"{name}.{suffix}"].float()[..., None] for suffix in ("scales", "biases"))
            q = (value.long()[..., None] >> torch.arange(0, 32, bits)) & (2**bits - 1)
            value = (q.reshape(*scales.shape[:-1], size) * scales + biases).reshape(len(value), -1)
        unpacked[key] = value.contiguous()
    return unpacked
