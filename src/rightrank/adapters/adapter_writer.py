"""Write adapters in PEFT's format: from a model in memory, after a resize, and from mlx-lm's format."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from rightrank.adapters.adapter_folders import (
    BASE_FILE,
    CLASSIFIER_FILE,
    CONFIG_FILE,
    MLX_FILE,
    WEIGHTS_FILE,
    find_base_changing_init,
)
from rightrank.adapters.adapter_reader import AdapterFolder, open_adapter
from rightrank.adapters.loading import require_loadable
from rightrank.bases.safetensors_files import read_header
from rightrank.data.files import create_output, replace_folder, write_text

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "spiece.model", "chat_template.jinja", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
COPIED_FILES = (BASE_FILE, CLASSIFIER_FILE, *TOKENIZER_FILES)  # files that are copied to an adapter of another rank


def write_adapter(
    out: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    source: Path | None = None,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write a new adapter folder that PEFT loads. An error leaves no folder behind.

    Args:
        source: The original adapter, whose tokenizer, labels and base identity (`COPIED_FILES`) are copied.
        files: Additional files by name.

    Raises:
        ModelError: PEFT can't load the adapter.
        RunFolderError: `out` exists or can't be written.
    """

    with create_output(out), replace_folder(out) as temporary:
        save_file(
            {key: value.contiguous() for key, value in tensors.items()}, temporary / WEIGHTS_FILE, {"format": "pt"}
        )
        text = json.dumps(dict(config), indent=2, sort_keys=True) + "\n"
        (temporary / CONFIG_FILE).write_text(text, encoding="utf-8")
        if source is not None:
            for file in (source / name for name in COPIED_FILES):
                if file.is_file():
                    shutil.copy2(file, temporary)
        for name, content in (files or {}).items():
            (temporary / name).write_bytes(content)
        require_loadable(open_adapter(temporary))


def _write_classifier_labels(folder: Path, config: Any) -> None:
    """Write the number, names and order of a classifier's labels.

    PEFT's configuration has no field for them, and a base model that is loaded without them gets a head of two labels. The file holds the
    arguments of `from_pretrained` that create the trained head: `num_labels`, `id2label`, `label2id` and `pad_token_id`.
    """
    names = {int(number): str(label) for number, label in config.id2label.items()}
    arguments = {
        "num_labels": len(names),
        "id2label": {str(number): names[number] for number in sorted(names)},
        "label2id": {names[number]: number for number in sorted(names)},
    }
    pad = getattr(config.get_text_config(), "pad_token_id", None)
    arguments |= {} if pad is None else {"pad_token_id": pad}  # needed to find the last token of a shorter row
    write_text(folder / CLASSIFIER_FILE, json.dumps(arguments, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def ensure_peft_format(folder: Path) -> Iterator[Path]:
    """Yield the folder itself, or a temporary copy in PEFT's format if mlx-lm wrote it.

    Raises:
        ModelError: The weights are not a readable safetensors file.
    """
    if not (folder / MLX_FILE).is_file() or (folder / WEIGHTS_FILE).exists():
        if (folder / WEIGHTS_FILE).exists():
            read_header(folder / WEIGHTS_FILE)
        yield folder
        return
    adapter = open_adapter(folder)
    with tempfile.TemporaryDirectory(prefix="rightrank-") as name:
        converted = Path(name) / folder.name
        write_adapter(converted, adapter.config, {key: adapter.load_tensor(key) for key in adapter.keys})
        yield converted


def save_adapter(peft_model: Any, folder: Path, base_name: str, adapter: str = "default") -> None:
    """Save the configuration and weights of an adapter, and the labels of a classifier.

    Args:
        base_name: An absolute path or a hub name, which the adapter's configuration refers to.
    """
    config = peft_model.peft_config[adapter]
    sharded_parameters = {
        name: parameter
        for name, parameter in peft_model.named_parameters()
        if isinstance(parameter, DTensor) and ("lora_" in name or parameter.requires_grad)
    }
    state_dict = {
        name: parameter.full_tensor().detach().cpu() for name, parameter in sharded_parameters.items()
    } or None
    saved_config = peft_model.peft_config[adapter] = copy.deepcopy(
        config
    )  # PEFT modifies the configuration that it saves
    saved_config.base_model_name_or_path = base_name
    if find_base_changing_init(vars(saved_config)) is None:
        # Loading replaces the first values, and other names of PEFT do not take every rank.
        saved_config.init_lora_weights, saved_config.eva_config = True, None
    with replace_folder(folder) as temporary, warnings.catch_warnings():
        # PEFT takes the biases of lora_bias for factors of a wrong shape.
        warnings.filterwarnings("ignore", message=r"Adapter .* LoRA tensor\(s\) have invalid shape: \S+lora_B\.bias")
        try:
            peft_model.save_pretrained(
                str(temporary),
                safe_serialization=True,
                selected_adapters=[adapter],
                save_embedding_layers=False,
                state_dict=state_dict,
            )
        finally:
            peft_model.peft_config[adapter] = config
        if adapter != "default":  # PEFT saves a named adapter in a subfolder
            for path in list((temporary / adapter).iterdir()):
                path.replace(temporary / path.name)
            (temporary / adapter).rmdir()
        if config.task_type == "SEQ_CLS":
            _write_classifier_labels(temporary, peft_model.config)
        readme = temporary / "README.md"  # PEFT's empty template; the final adapter gets a model card of its own
        readme.unlink(missing_ok=True)


def write_same_format(
    adapter: AdapterFolder,
    out: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
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
