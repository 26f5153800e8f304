"""The weights of a checkpoint folder, tensor by tensor, shard by shard, from safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from rightrank.errors import ModelError

INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class WeightFolder:
    """Names, files and shapes; a tensor is read when asked for, and its file closed again."""

    path: Path
    files: Mapping[str, Path]
    shapes: Mapping[str, tuple[int, ...]]

    def tensor(self, name: str) -> torch.Tensor:
        # The file is opened for each tensor: closing it gives its mapped pages back, so that memory stays at one tensor.
        with safe_open(self.files[name], framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor

    def weight_of(self, module: str) -> str | None:
        """The name of a module's weight here; models saved without their head's prefix are found too."""
        parts = module.split(".")
        candidates = (f"{'.'.join(parts[start:])}.weight" for start in range(min(2, len(parts))))
        return next((name for name in candidates if name in self.files), None)


def open_weights(path: Path) -> WeightFolder:
    """The tensors of a model folder, from headers alone.

    Raises:
        ModelError: no such folder, no safetensors, pickled weights, or a shard that is missing or damaged.
    """
    if not path.is_dir():
        raise ModelError(f"{path}: no such folder; give a model folder that save_pretrained wrote")
    shards = _shards(path)
    files: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for shard in shards:
        try:
            with safe_open(shard, framework="pt") as file:
                for name in list(file.keys()):
                    files[name] = shard
                    shapes[name] = tuple(file.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{shard}: not a readable safetensors file ({error}); copy it again") from None
    return WeightFolder(path, files, shapes)


def _shards(path: Path) -> list[Path]:
    index = path / INDEX_FILE
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError, UnicodeDecodeError):
            raise ModelError(f"{index}: not a shard index; save the model again") from None
        missing = [name for name in names if not (path / name).exists()]
        if missing:
            raise ModelError(f"{path}: shard {missing[0]} is missing ({len(missing)} of {len(names)}); copy it too")
        return [path / name for name in names]
    found = sorted(file for file in path.glob("*.safetensors") if file.name != "adapter_model.safetensors")
    if found:
        return found
    if next(path.glob("*.bin"), None) is not None:
        raise ModelError(
            f"{path}: only pickled weights (*.bin), which are not read; re-save with save_pretrained(safe_serialization=True)"
        )
    raise ModelError(f"{path}: no weights (*.safetensors) in the folder; give a folder that save_pretrained wrote")
