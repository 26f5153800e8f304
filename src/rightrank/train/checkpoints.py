"""What a running training keeps: its progress and its checkpoint.

A checkpoint is one safetensors file with a checksum, replaced atomically.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rightrank.data.files import UnreadableError, parse_json, replacing
from rightrank.schema.trials import EvalPoint


class Progress(BaseModel):
    """What a checkpoint stores beside tensors."""

    step: int = 0
    train_losses: list[float] = []  # nats per label, one per step
    points: list[EvalPoint] = []
    train_seconds: float = 0.0
    train_tokens: int = 0
    eval_seconds: float = 0.0
    answer_seconds: float = 0.0  # part of eval_seconds: the metrics at the end


def save_checkpoint(path: Path, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
    whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    text = json.dumps(dict(state))
    with replacing(path) as temporary:
        save_file(whole, temporary, metadata={"state": text, "crc": _checksum(text, whole)})


def load_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """`(tensors, state)` of the checkpoint; None if there is none or it is damaged (the trial then starts again)."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if metadata["crc"] != _checksum(metadata["state"], tensors):
                return None
            return tensors, parse_json(metadata["state"])
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
