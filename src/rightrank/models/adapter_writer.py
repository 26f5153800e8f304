"""Write adapters in the format of PEFT: those of a model in memory, resized ones, and conversions from mlx-lm."""

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

from rightrank.data.files import creating, replacing_folder, write_text
from rightrank.models.adapter_folders import BASE_FILE, CLASSIFIER_FILE, CONFIG_FILE, MLX_FILE, WEIGHTS_FILE
from rightrank.models.adapter_reader import BASE_CHANGING_INITS, open_adapter
from rightrank.models.kinds.linear import whole_factors
from rightrank.models.loading import require_loadable

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "spiece.model", "chat_template.jinja", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
BESIDE = (BASE_FILE, CLASSIFIER_FILE, *TOKENIZER_FILES)  # what an adapter of another rank keeps of a folder


def write_adapter(
    out: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    source: Path | None = None,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write a new adapter folder that PEFT loads, whole or not at all.

    Args:
        source: the adapter that it comes from, of which it keeps what lies beside the weights (`BESIDE`).
        files: further ones, by name.

    Raises:
        ModelError: PEFT can't load it.
        RunFolderError: `out` exists, or can't be written.
    """

    with creating(out), replacing_folder(out) as temporary:
        save_file(
            {key: value.contiguous() for key, value in tensors.items()}, temporary / WEIGHTS_FILE, {"format": "pt"}
        )
        text = json.dumps(dict(config), indent=2, sort_keys=True) + "\n"
        (temporary / CONFIG_FILE).write_text(text, encoding="utf-8")
        if source is not None:
            for file in (source / name for name in BESIDE):
                if file.is_file():
                    shutil.copy2(file, temporary)
        for name, content in (files or {}).items():
            (temporary / name).write_bytes(content)
        require_loadable(open_adapter(temporary))


def _write_classifier(folder: Path, config: Any) -> None:
    """Write the labels of a classifier's adapter: their number, names and order.

    PEFT's configuration has no room for them, and a base without them gets a head of two labels. The file holds the arguments of
    `from_pretrained` with which the base gets the head that was trained: `num_labels`, `id2label`, `label2id` and `pad_token_id`.
    """
    names = {int(number): str(label) for number, label in config.id2label.items()}
    arguments = {
        "num_labels": len(names),
        "id2label": {str(number): names[number] for number in sorted(names)},
        "label2id": {names[number]: number for number in sorted(names)},
    }
    pad = getattr(config.get_text_config(), "pad_token_id", None)
    arguments |= {} if pad is None else {"pad_token_id": pad}  # the last token of a shorter row is found by it
    write_text(folder / CLASSIFIER_FILE, json.dumps(arguments, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def peft_folder(folder: Path) -> Iterator[Path]:
    """The folder itself, or in the block a copy in PEFT's format of one that mlx-lm wrote."""
    if not (folder / MLX_FILE).is_file() or (folder / WEIGHTS_FILE).exists():
        yield folder
        return
    adapter = open_adapter(folder)
    with tempfile.TemporaryDirectory(prefix="rightrank-") as name:
        place = Path(name) / folder.name
        write_adapter(place, adapter.config, {key: adapter.tensor(key) for key in adapter.keys})
        yield place


def save_adapter(peft_model: Any, folder: Path, base_name: str, adapter: str = "default") -> None:
    """Write configuration and weights, and a classifier's labels; `base_name` is an absolute path or a hub name."""
    config = peft_model.peft_config[adapter]
    sharded = {
        name: parameter
        for name, parameter in peft_model.named_parameters()
        if isinstance(parameter, DTensor) and ("lora_" in name or parameter.requires_grad)
    }
    whole = {name: parameter.full_tensor().detach().cpu() for name, parameter in sharded.items()} or None
    saved = peft_model.peft_config[adapter] = copy.deepcopy(config)  # PEFT writes into the one that it saves
    saved.base_model_name_or_path = base_name
    if not str(saved.init_lora_weights).startswith(BASE_CHANGING_INITS):
        # Loading replaces the first values, and other names of PEFT do not take every rank.
        saved.init_lora_weights, saved.eva_config = True, None
    if factors := whole_factors(peft_model, adapter):
        whole = {**peft_model.state_dict(), **factors}
        saved.r, saved.lora_alpha = 2 * config.r, config.lora_alpha * (2**0.5 if config.use_rslora else 2)
    with replacing_folder(folder) as temporary, warnings.catch_warnings():
        # PEFT takes the biases of lora_bias for factors of a wrong shape.
        warnings.filterwarnings("ignore", message=r"Adapter .* LoRA tensor\(s\) have invalid shape: \S+lora_B\.bias")
        try:
            peft_model.save_pretrained(
                str(temporary),
                safe_serialization=True,
                selected_adapters=[adapter],
                save_embedding_layers=False,
                state_dict=whole,
            )
        finally:
            peft_model.peft_config[adapter] = config
        if adapter != "default":  # PEFT saves a named adapter in a subfolder
            for path in list((temporary / adapter).iterdir()):
                path.replace(temporary / path.name)
            (temporary / adapter).rmdir()
        if config.task_type == "SEQ_CLS":
            _write_classifier(temporary, peft_model.config)
        readme = temporary / "README.md"  # PEFT's empty template; the final adapter gets a model card of its own
        readme.unlink(missing_ok=True)
