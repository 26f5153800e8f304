"""Safetensors files: their headers, and the shards of a model folder."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from rightrank.data.files import UnreadableError, detect_path_kind, read_json_object
from rightrank.schema.errors import ModelError

INDEX_FILE = "model.safetensors.index.json"


def read_header(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Read the names and shapes of a file's tensors, and its metadata.

    Raises:
        ModelError: The file is not a readable safetensors file.
    """
    if detect_path_kind(path) != "file":  # a pipe would be waited for
        raise ModelError(f"{path}: not a regular file; copy or save it again")
    try:
        with safe_open(path, framework="np") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in list(file.keys())}
            return shapes, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: not a readable safetensors file ({error}); copy or save it again") from None


def read_sizes(path: Path) -> dict[str, tuple[int, str]]:
    """Read the bytes and the type of each tensor of a file from its header.

    Raises:
        ModelError: The file is not a readable safetensors file.
    """
    try:
        with safe_open(path, framework="np") as file:
            slices = {key: file.get_slice(key) for key in list(file.keys())}
            return {key: (_count_bytes(value), str(value.get_dtype())) for key, value in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: not a readable safetensors file ({error}); copy or save it again") from None


def _count_bytes(tensor: Any) -> int:
    bits = int(re.findall(r"\d+", tensor.get_dtype())[0]) if tensor.get_dtype() != "BOOL" else 8
    return int(math.prod(tensor.get_shape())) * bits // 8


def find_shards(path: Path) -> list[Path]:
    """Return the safetensors files of a model folder: those in its index if it has one, else all.

    Raises:
        ModelError: There are no safetensors files, the index is damaged or names files outside the folder, or a shard is missing.
    """
    index = path / INDEX_FILE
    if index.exists():
        try:
            listed = read_json_object(index)["weight_map"].values()
        except (UnreadableError, KeyError, AttributeError):
            raise ModelError(f"{index}: not a shard index; save the model again") from None
        for name in listed:
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise ModelError(
                    f"{index}: names the shard {name!r}; shards are *.safetensors files of the folder itself"
                )
        names = sorted(set(listed))
        missing = [name for name in names if detect_path_kind(path / name) != "file"]
        if missing:
            raise ModelError(f"{path}: shard {missing[0]} is missing ({len(missing)} of {len(names)}); copy it too")
        return [path / name for name in names]
    files = sorted(file for file in path.glob("*.safetensors") if file.name != "adapter_model.safetensors")
    if files:
        return files
    if next(path.glob("*.bin"), None) is not None:
        raise ModelError(
            f"{path}: only pickled weights (*.bin), which can run code when read; save the model again with save_pretrained(safe_serialization=True)"
        )
    raise ModelError(f"{path}: no weights (*.safetensors) in the folder; give a folder that save_pretrained wrote")
