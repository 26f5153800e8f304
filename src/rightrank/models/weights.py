"""The weights of a model folder in safetensors, read one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from yaml import YAMLError

from rightrank.data.files import UnreadableError, hub_errors, kind_of, read_json_object
from rightrank.schema.errors import ModelError

if TYPE_CHECKING:
    import torch  # a licence is read without it

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


GGUF_FIELDS = {"general.license": "identifier", "general.license.name": "name", "general.license.link": "link"}


@dataclass(frozen=True, slots=True)
class Licence:
    """The fields `license`, and for a custom licence `license_name` and `license_link`, of a model card."""

    identifier: str
    name: str | None = None
    link: str | None = None


def licence_of(model: object) -> Licence | None:
    """The licence stated by a model folder's card, a GGUF file's header or the hub; None if none is found.

    The hub is asked only for a model that is not a local file. A hub that can't be reached is not an error.
    """
    if not isinstance(model, str):
        return None
    path = Path(model)
    if path.suffix.lower() == ".gguf" and path.is_file():
        from gguf import GGUFReader

        fields: Any = GGUFReader(path).fields
        values = {name: str(fields[key].contents()) for key, name in GGUF_FIELDS.items() if key in fields}
        return _licence(values.get("identifier"), values.get("name"), values.get("link"))

    from huggingface_hub import ModelCard

    unreadable: tuple[type[Exception], ...] = (*hub_errors(), ValueError, YAMLError)
    try:
        card = ModelCard.load(path / "README.md" if path.is_dir() else model).data
    except unreadable:
        return None
    return _licence(card.get("license"), card.get("license_name"), card.get("license_link"))


def _licence(identifier: object, name: object, link: object) -> Licence | None:
    if isinstance(identifier, list):
        identifier = next(iter(identifier), None)
    if not isinstance(identifier, str) or not identifier.strip():
        return None
    return Licence(identifier, *(value if isinstance(value, str) else None for value in (name, link)))
