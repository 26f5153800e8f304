"""Adapter folders: the names of their files, the adapters in the output folder of a trainer, checks without torch, and code that loads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from rightrank.data.files import UnreadableError, read_json_object
from rightrank.schema.errors import ModelError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MLX_FILE = "adapters.safetensors"
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_PREFIX = "base_model.model."  # the prefix of PEFT's keys
WRAPPER_SUFFIX = ".base_layer"  # PEFT's suffix for each nested wrapper
MAX_CONFIG_BYTES = 16 * 2**20
BASE_FILE = "base.json"  # beside an adapter: values that identify its base model
CLASSIFIER_FILE = "classifier.json"  # beside an adapter: the labels of a classifier
# Initializations that leave the base's weights as they are. With any other, ΔW may not be s·B·A alone.
BASE_KEEPING_INITS = ("true", "false", "none", "gaussian", "orthogonal", "eva", "mica")


def name_experts(parameter: str, experts: int) -> list[str]:
    """Return the names of the matrices of a parameter that holds this number of experts."""
    return [parameter] if experts == 1 else [f"{parameter}.{expert}" for expert in range(experts)]


def require_adapter_folder(path: Path) -> None:
    """Raise if a path holds no adapter or only pickled weights, before torch is imported.

    Raises:
        ModelError: The message names the adapters below a folder.
    """
    if not path.exists():
        raise ModelError(f"{path}: no such folder; give an adapter folder, one that PEFT's save_pretrained wrote")
    if is_single_file(path):
        return
    if not path.is_dir():
        raise ModelError(f"{path}: a file; give the adapter's folder, the one that holds {CONFIG_FILE}")
    if (path / CONFIG_FILE).exists():
        read_adapter_config(path)
        if any((path / name).exists() for name in (WEIGHTS_FILE, MLX_FILE)):
            return
        hint = "save the adapter again with save_pretrained"
        if (path / "adapter_model.bin").exists():
            hint = (
                "only pickled weights (adapter_model.bin), which can run code when read; convert them if you trust the file: "
                "PeftModel.from_pretrained(base, folder).save_pretrained(folder, safe_serialization=True)"
            )
        raise ModelError(f"{path}: there is no {WEIGHTS_FILE}; {hint}")
    hint = f"give a folder that PEFT's save_pretrained wrote, or the file of another program, such as {DIFFUSERS_FILE}"
    raise ModelError(f"{path}: not an adapter, there is no {CONFIG_FILE}; {suggest_adapter_folder(path) or hint}")


def is_single_file(path: Path) -> bool:
    """Return whether a path is an adapter in a single file, as sd-scripts and diffusers write it, and not the weights of a folder."""
    is_named = path.suffix == ".safetensors" and path.name not in (WEIGHTS_FILE, MLX_FILE)
    return is_named and path.is_file()


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Read the configuration of an adapter folder.

    Raises:
        ModelError: The file is not one JSON object.
    """
    try:
        return read_json_object(folder / CONFIG_FILE, MAX_CONFIG_BYTES)
    except UnreadableError as error:
        raise ModelError(f"{folder / CONFIG_FILE}: not readable as JSON ({error}); save the adapter again") from None


def find_base_changing_init(config: Mapping[str, Any]) -> str | None:
    """Return the name of the initialization unless it is known to leave the base model as it is on loading.

    PEFT compares some of the names without case.
    """
    init = str(config.get("init_lora_weights", True))
    return None if init.lower() in BASE_KEEPING_INITS else init


def require_kept_base(path: Path, config: Mapping[str, Any]) -> None:
    """Raise if PEFT may change the base model when it loads an adapter with this configuration.

    Raises:
        ModelError: The initialization is not known to leave the base model as it is.
    """
    if (init := find_base_changing_init(config)) is not None:
        raise ModelError(
            f"{path}: init_lora_weights is {init!r}, which changes the base model on loading by an amount that depends on "
            "the rank; convert it first: save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )


def suggest_adapter_folder(folder: Path) -> str:
    """Return a hint that names the adapters below a run folder or the output folder of a trainer, or an empty string."""
    inner = sorted(file.parent for file in folder.rglob(CONFIG_FILE)) if folder.is_dir() else []
    if folder / "adapter" in inner:
        inner = [folder / "adapter"]
    if len(inner) == 1:
        return f"give {inner[0]}, the adapter in it"
    return f"give one of the adapters in it: {', '.join(map(str, inner[:5]))}" if inner else ""


def format_loading_code(folder: str, base: str | None, is_classifier: bool) -> list[str]:
    """Return lines of Python that load a model with the adapter in `folder`.

    PEFT finds the base model by itself, unless it is in a GGUF file.
    """
    kind = "AutoPeftModelFor" + ("SequenceClassification" if is_classifier else "CausalLM")
    imports, head, more = [], [], ""
    if is_classifier:
        imports, more = ["import json"], ", **head"
        head = [
            f"head = json.load(open({f'{folder}/{CLASSIFIER_FILE}'!r}, encoding='utf-8'))",
            "head['id2label'] = {int(number): label for number, label in head['id2label'].items()}",  # JSON has no numbers as keys
        ]
    if base is None or not base.lower().endswith(".gguf"):
        return [*imports, f"from peft import {kind}", *head, f"model = {kind}.from_pretrained({folder!r}{more})"]
    plain = kind.replace("AutoPeft", "Auto")
    imports += ["from peft import PeftModel", f"from transformers import {plain}"]
    loaded = f"base = {plain}.from_pretrained({format_base_arguments(base)}{more})"
    return [*imports, *head, loaded, f"model = PeftModel.from_pretrained(base, {folder!r})"]


def format_base_arguments(base: str) -> str:
    """Return the arguments of `from_pretrained` for a base model: its name, or the folder and the name of a GGUF file."""
    path = PurePath(base)
    return f"{str(path.parent)!r}, gguf_file={path.name!r}" if path.suffix.lower() == ".gguf" else repr(base)
