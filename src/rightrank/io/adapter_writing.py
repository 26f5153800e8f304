"""Writes adapters in the format that they were read in, or in another."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from rightrank.errors import RunFolderError
from rightrank.io.adapter_config import WEIGHTS_FILE
from rightrank.io.adapter_folder import PREFIX, AdapterFolder, open_adapter
from rightrank.io.adapter_place import CONFIG_FILE
from rightrank.io.files import replacing_folder, require_absent
from rightrank.io.lora_files import file_keys, read_header, updated_header, write_file
from rightrank.settings.values import FileFormat


def write_like(
    adapter: AdapterFolder, out: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Write a changed adapter in the format of `adapter`: a folder of PEFT, or a LoRA file.

    Raises:
        RunFolderError: `out` exists, or can't be written.
    """
    if not adapter.is_file:
        write_adapter(out, config, tensors)
        return
    _, metadata = read_header(adapter.path)
    write_file(out, tensors, updated_header(metadata, config))


def write_lora_file(folder: Path, out: Path, to: FileFormat, prefix: str = "unet") -> None:
    """Write a PEFT adapter folder as a LoRA file of kohya or diffusers.

    Args:
        out: the file, `….safetensors`.
        prefix: the model that the adapter is for, in diffusers' names.

    Raises:
        ModelError: no LoRA adapter, or one that the format can't hold.
        RunFolderError: `out` exists, or can't be written.
    """
    adapter = open_adapter(folder)
    tensors = {key.removeprefix(PREFIX): adapter.tensor(key) for key in adapter.keys}
    write_file(out, *file_keys(adapter.config, tensors, to, prefix))


def write_adapter(out: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a new adapter folder, whole or not at all.

    Raises:
        RunFolderError: `out` exists, or can't be written.
    """
    require_absent(out)
    try:
        with replacing_folder(out) as temporary:
            save_file(
                {key: value.contiguous() for key, value in tensors.items()}, temporary / WEIGHTS_FILE, {"format": "pt"}
            )
            text = json.dumps(dict(config), indent=2, sort_keys=True) + "\n"
            (temporary / CONFIG_FILE).write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunFolderError(f"{out}: can't write there ({error.strerror or error}); give a writable folder") from None
