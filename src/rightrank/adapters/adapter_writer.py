"""Write adapter folders in PEFT's format, or an adapter in the format that it was read in."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rightrank.adapters.adapter_folders import BASE_FILE, CLASSIFIER_FILE, CONFIG_FILE, MLX_FILE, WEIGHTS_FILE
from rightrank.adapters.adapter_reader import AdapterFolder, open_adapter
from rightrank.bases.safetensors_files import Tensor, open_tensors, write_tensors
from rightrank.data.files import create_output, replace_folder

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "spiece.model", "chat_template.jinja", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
COPIED_FILES = (BASE_FILE, CLASSIFIER_FILE, *TOKENIZER_FILES)  # files that are copied to an adapter of another rank


def write_adapter(
    out: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    source: Path | None = None,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write a new adapter folder. An error leaves no folder behind.

    Args:
        source: The original adapter, whose tokenizer, labels and base identity (`COPIED_FILES`) are copied.
        files: Additional files by name.

    Raises:
        RunFolderError: `out` exists or can't be written.
    """

    with create_output(out), replace_folder(out) as temporary:
        write_tensors(temporary / WEIGHTS_FILE, tensors, {"format": "pt"})
        text = json.dumps(dict(config), indent=2, sort_keys=True) + "\n"
        (temporary / CONFIG_FILE).write_text(text, encoding="utf-8")
        if source is not None:
            for file in (source / name for name in COPIED_FILES):
                if file.is_file():
                    shutil.copy2(file, temporary)
        for name, content in (files or {}).items():
            (temporary / name).write_bytes(content)


@contextmanager
def ensure_peft_format(folder: Path) -> Iterator[Path]:
    """Yield the folder itself, or a temporary copy in PEFT's format if mlx-lm wrote it.

    Raises:
        ModelError: The weights are not a readable safetensors file.
    """
    if not (folder / MLX_FILE).is_file() or (folder / WEIGHTS_FILE).exists():
        if (folder / WEIGHTS_FILE).exists():
            open_tensors(folder / WEIGHTS_FILE)
        yield folder
        return
    adapter = open_adapter(folder)
    with tempfile.TemporaryDirectory(prefix="rightrank-") as name:
        converted = Path(name) / folder.name
        write_adapter(converted, adapter.config, {key: adapter.load_tensor(key) for key in adapter.keys})
        yield converted


def write_same_format(
    adapter: AdapterFolder,
    out: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write a changed adapter in the format of `adapter`.

    In PEFT's format, the accompanying files are copied and additional `files` are written.

    Raises:
        RunFolderError: `out` exists or can't be written.
    """
    if adapter.foreign is not None:
        adapter.foreign.write(out, config, tensors)
        return
    write_adapter(out, config, tensors, adapter.path, files)
