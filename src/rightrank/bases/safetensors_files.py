"""Safetensors files as numpy arrays: their headers and tensors, writing, and the shards of a model folder.

numpy has no bfloat16 and no floats of 8 bits. Such a tensor is an array of integers in a structured type with one field, whose name is the
type's: it is copied, sliced and written as any other. `widen` and `narrow` convert bfloat16.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from safetensors import SafetensorError, safe_open

from rightrank.data.files import UnreadableError, detect_path_kind, read_json_object
from rightrank.schema.errors import ModelError
from rightrank.schema.trials import Floats

INDEX_FILE = "model.safetensors.index.json"
Tensor: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
# By the names in a header, in the order in which the library of safetensors writes tensors.
DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype([(name, code)] if name in ("BF16", "F8_E4M3", "F8_E5M2") else code)
    for name, code in (
        *(("U64", "<u8"), ("I64", "<i8"), ("F64", "<f8"), ("F32", "<f4"), ("U32", "<u4"), ("I32", "<i4")),
        *(("BF16", "<u2"), ("F16", "<f2"), ("U16", "<u2"), ("I16", "<i2")),
        *(("F8_E4M3", "u1"), ("F8_E5M2", "u1"), ("I8", "i1"), ("U8", "u1"), ("BOOL", "?")),
    )
}
BFLOAT16 = DTYPES["BF16"]


@dataclass(frozen=True, slots=True)
class TensorFile:
    """The header of a safetensors file, whose tensors are read on access."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]
    types: Mapping[str, str]  # keys of `DTYPES`, or other types
    _offsets: Mapping[str, int]

    def load_tensor(self, name: str) -> Tensor:
        """Read a tensor.

        Raises:
            ModelError: Its type is not one of `DTYPES`.
        """
        dtype, shape = DTYPES.get(self.types[name]), self.shapes[name]
        if dtype is None:
            raise ModelError(f"{self.path}: {name} is stored as {self.types[name]}; save it in f32, bf16 or f16")
        return np.fromfile(self.path, dtype, int(np.prod(shape)), offset=self._offsets[name]).reshape(shape)


def open_tensors(path: Path) -> TensorFile:
    """Read the header of a file.

    Raises:
        ModelError: The file is not a readable safetensors file.
    """
    if detect_path_kind(path) != "file":  # a pipe would be waited for
        raise ModelError(f"{path}: not a regular file; copy or save it again")
    try:
        with safe_open(path, framework="np"):  # checks sizes and offsets
            pass
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: not a readable safetensors file ({error}); copy or save it again") from None
    metadata = header.pop("__metadata__", None) or {}
    return TensorFile(
        path,
        {name: tuple(entry["shape"]) for name, entry in header.items()},
        metadata,
        {name: entry["dtype"] for name, entry in header.items()},
        {name: 8 + size + entry["data_offsets"][0] for name, entry in header.items()},
    )


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file as the library of safetensors does: the largest types first, then by name.

    https://github.com/huggingface/safetensors#format
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    ranks = {dtype: index for index, dtype in enumerate(names)}
    ordered = sorted(tensors.items(), key=lambda item: (ranks[item[1].dtype], item[0]))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": names[tensor.dtype], "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            file.write(tensor.tobytes())


def widen(tensor: Tensor) -> Floats:
    """Return the values in float64."""
    if tensor.dtype == BFLOAT16:
        tensor = (tensor["BF16"].astype(np.uint32) << 16).view(np.float32)
    return tensor.astype(np.float64)


def narrow(values: Floats, dtype: np.dtype[Any]) -> Tensor:
    """Round to a narrower type, through float32 as torch does; half-way values go to the even neighbour."""
    if dtype == np.float64:
        return values
    with np.errstate(over="ignore"):  # a value beyond the type's largest is infinite, as torch has it
        single = values.astype(np.float32)
        if dtype != BFLOAT16:
            return single.astype(dtype)
    bits = single.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").view(BFLOAT16)


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
