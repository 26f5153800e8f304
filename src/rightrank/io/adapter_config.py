"""The checked `adapter_config.json` and the tensor shapes of an adapter folder, without PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rightrank.errors import ModelError
from rightrank.io.adapter_place import CONFIG_FILE, require_adapter_folder
from rightrank.io.lora_files import read_header
from rightrank.io.reading import UnreadableError, read_json_object

MIN_ALPHA, MAX_ALPHA = 1e-9, 1e9
MAX_CONFIG_BYTES = 16 * 2**20  # bytes
WEIGHTS_FILE = "adapter_model.safetensors"
# Options with which the adapter's update is not s·B·A.
FOREIGN_OPTIONS = ("use_qalora", "use_bdlora", "kasa_config", "arrow_config", "monteclora_config", "velora_config")


def read_config(path: Path) -> dict[str, Any]:
    file = path / CONFIG_FILE
    require_adapter_folder(path)
    try:
        config = read_json_object(file, MAX_CONFIG_BYTES)
    except UnreadableError as error:
        raise ModelError(f"{file}: not readable as JSON ({error}); save the adapter again") from None
    _check_config(file, config)
    return config


def _check_config(file: Path, config: dict[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ModelError(f"{file}: peft_type is {kind!r}; only 'LORA' is supported")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ModelError(f"{file}: r is {rank!r}; it must be a whole number from 1")
    if not _is_alpha(alpha):
        raise ModelError(f"{file}: lora_alpha is {alpha!r}; it must be a number from {MIN_ALPHA:g} to {MAX_ALPHA:g}")
    for name in FOREIGN_OPTIONS:
        if config.get(name):
            raise ModelError(f"{file}: {name} is set; such an update is not s·B·A and is not supported")
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(name)
        if pattern is None:
            config[name] = {}
        elif not isinstance(pattern, dict):
            raise ModelError(f"{file}: {name} is a {type(pattern).__name__}; it must map module names to numbers")
    for name, value in config["alpha_pattern"].items():
        if not _is_alpha(value):
            raise ModelError(f"{file}: alpha_pattern has {value!r} for {name!r}; it must be a number")


def _is_alpha(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return value == 0 or MIN_ALPHA <= abs(value) <= MAX_ALPHA


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    file = path / WEIGHTS_FILE
    if not file.exists():
        if (path / "adapter_model.bin").exists():
            raise ModelError(
                f"{path}: only pickled weights (adapter_model.bin), which can run code when read; convert them if you trust "
                "the file: PeftModel.from_pretrained(base, folder).save_pretrained(folder, safe_serialization=True)"
            )
        raise ModelError(f"{path}: there is no {WEIGHTS_FILE}; save the adapter again with save_pretrained")
    return read_header(file)[0]
