"""Checkpoints of a trial that is still running: one safetensors file, replaced whole, never a pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rightrank.io.files import replacing
from rightrank.io.reading import UnreadableError, parse_json


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Tensors by name, and the JSON state that goes with them."""

    tensors: Mapping[str, torch.Tensor]
    state: Mapping[str, Any]


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    tensors = {name: value.detach().cpu().contiguous() for name, value in checkpoint.tensors.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"state": json.dumps(dict(checkpoint.state))})


def load_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint, or None where there is none or it can't be read (the trial then starts again)."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            state = parse_json(file.metadata()["state"])
            return Checkpoint({name: file.get_tensor(name) for name in file.keys()}, state)  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, UnreadableError):
        return None
