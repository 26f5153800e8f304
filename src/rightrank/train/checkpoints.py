"""Checkpoints of a running trial: one safetensors file with a checksum, replaced atomically."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rightrank.data.files import UnreadableError, parse_json, replacing


@dataclass(frozen=True, slots=True)
class Checkpoint:
    tensors: Mapping[str, torch.Tensor]
    state: Mapping[str, Any]


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    tensors = {name: value.detach().cpu().contiguous() for name, value in checkpoint.tensors.items()}
    state = json.dumps(dict(checkpoint.state))
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"state": state, "crc": _checksum(state, tensors)})


def load_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint; None if there is none or it is damaged (the trial then starts again)."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if metadata["crc"] != _checksum(metadata["state"], tensors):
                return None
            return Checkpoint(tensors, parse_json(metadata["state"]))
    except (SafetensorError, KeyError, TypeError, UnreadableError):
        return None


def _checksum(state: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """CRC-32 in hex over the state and every tensor's name, shape and bytes."""
    checksum = zlib.crc32(state.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        checksum = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), checksum)
        checksum = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, checksum)
    return f"{checksum:08x}"
