"""The weights of a model folder in safetensors, read one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from rightrank.data.files import UnreadableError, kind_of, read_json_object
from rightrank.schema.errors import ModelError

if TYPE_CHECKING:
    import torch

INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class WeightFolder:
    """Names, files and shapes of the tensors; a tensor is read on access."""

    path: Path
    files: Mapping[str, Path]
    shapes: Mapping[str, tuple[int, ...]]

    def tensor(self, name: str) -> torch.Tensor:
        # Closing the file releases its mapped pages, so that memory holds one tensor at a time.
        with safe_open(self.files[name], framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor


def open_weights(path: Path) -> WeightFolder:
    """Read the headers of a model folder's tensors.

    Raises:
        ModelError: no such folder, no safetensors, pickled weights, or a shard that is missing or damaged.
    """
    if kind_of(path) != "folder":
        raise ModelError(f"{path}: no such folder; give a model folder that save_pretrained wrote")
    files: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for shard in safe_shards(path):
        found, _ = read_header(shard)
        files |= dict.fromkeys(found, shard)
        shapes |= found
    return WeightFolder(path, files, shapes)


def read_header(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Names and shapes of a file's tensors, and its metadata.

    Raises:
        ModelError: no readable safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in list(file.keys())}
            return shapes, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: not a readable safetensors file ({error}); copy or save it again") from None


def safe_shards(path: Path) -> list[Path]:
    """The safetensors files of a model folder: those in its index if it has one, else all.

    Raises:
        ModelError: no safetensors, a damaged index, an index with files outside the folder, or a missing shard.
    """
    index = path / INDEX_FILE
    if index.exists():
        names = _shard_names(index)
        missing = [name for name in names if kind_of(path / name) != "file"]
        if missing:
            raise ModelError(f"{path}: shard {missing[0]} is missing ({len(missing)} of {len(names)}); copy it too")
        return [path / name for name in names]
    found = sorted(file for file in path.glob("*.safetensors") if file.name != "adapter_model.safetensors")
    if found:
        return found
    if next(path.glob("*.bin"), None) is not None:
        raise ModelError(
            f"{path}: only pickled weights (*.bin), which can run code when read; save the model again with save_pretrained(safe_serialization=True)"
        )
    raise ModelError(f"{path}: no weights (*.safetensors) in the folder; give a folder that save_pretrained wrote")


def _shard_names(index: Path) -> list[str]:
    """The shards in an index, all of which must be safetensors files in the folder."""
    try:
        names = read_json_object(index)["weight_map"].values()
    except (UnreadableError, KeyError, AttributeError):
        raise ModelError(f"{index}: not a shard index; save the model again") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{index}: names the shard {name!r}; shards are *.safetensors files of the folder itself")
    return sorted(set(names))
