"""Locations of base models: folders, GGUF files and hub names.

This module imports no torch, so that a wrong name is refused before anything heavy is imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rightrank.data.files import UnreadableError, detect_path_kind, read_json_object
from rightrank.schema.errors import MissingExtraError, ModelError, get_first_line

BASE_SIDE = "base"  # names the base model alone as a side of a comparison


def find_model(reference: str) -> tuple[str, dict[str, str]]:
    """Locate a model without loading it.

    Returns:
        The folder or hub name, and the argument of transformers that names a GGUF file in the folder.

    Raises:
        ModelError: The folder has no configuration, the file is not GGUF, or the path does not exist.
        MissingExtraError: The file is GGUF and the `gguf` package is not installed.
    """
    path = Path(reference).expanduser()
    kind = detect_path_kind(path)
    if kind == "file":
        if path.suffix.lower() != ".gguf":
            raise ModelError(
                f"{reference}: a model file must end in .gguf; give a GGUF file, a model folder, or a hub name"
            )
        if find_spec("gguf") is None:
            raise MissingExtraError("reading GGUF files needs the `gguf` package: pip install 'rightrank[gguf]'")
        return str(path.parent), {"gguf_file": path.name}
    if kind == "folder":
        if not (path / "config.json").exists():
            if (path / "adapter_config.json").exists():
                raise ModelError(f"{reference}: this is an adapter; give the base model that it was trained on")
            raise ModelError(
                f"{reference}: no config.json in the folder; give a folder that save_pretrained wrote, or a GGUF file"
            )
        if (path / "adapter_config.json").exists():  # transformers would load the base that it names
            raise ModelError(f"{reference}: holds an adapter_config.json too; give the folder of the base model alone")
        _reject_hub_code(path / "config.json")
        return str(path), {}
    if path.is_absolute() or reference.startswith((".", "~")) or reference.count("/") > 1:
        raise ModelError(f"{reference}: no such folder; give a model folder, a GGUF file, or a hub name")
    return reference, {}


def require_model(reference: str) -> None:
    """Raise if a reference is neither a folder, a GGUF file nor a model on the hub.

    Raises:
        ModelError: As for `find_model`, or the hub has no such model or can't be reached.
    """
    name, _ = find_model(reference)
    if detect_path_kind(Path(name)) == "missing":
        _require_on_hub(reference)


def normalize_model_name(name: str) -> str:
    """Return the last component of a path or hub name in lower case, which is the same for every copy of a model."""
    return name.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1].lower()


def _require_on_hub(name: str) -> None:
    """Raise if a name is no model on the hub. The first answer decides, where loading would retry for a minute."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        HfApi().model_info(name, timeout=10.0)  # seconds
    except _list_hub_errors() as error:
        raise ModelError(
            f"{name}: no such folder, and the hub has no such model or does not answer ({get_first_line(error)}); "
            "give a model folder, a GGUF file, or a hub name"
        ) from None


def _list_hub_errors() -> tuple[type[BaseException], ...]:
    """Return the errors that a request to the hub can raise: the client's errors derive from an HTTP library that differs between versions."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    return (OSError, HFValidationError, *HfHubHTTPError.__bases__)


def _reject_hub_code(file: Path) -> None:
    """Raise if a model folder's configuration names compiled code on the hub, which transformers runs even without trust."""
    try:
        config = read_json_object(file)
    except UnreadableError as error:
        raise ModelError(f"{file}: not readable as JSON ({error}); save the model again") from None
    for name, value in _iterate_implementations(config):
        if "/" in value:
            raise ModelError(
                f"{file}: {name} is {value!r}, code from the hub; remove the line to use transformers' own"
            )


def _iterate_implementations(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield `(key, value)` of every `*_implementation` in a configuration, at any depth."""
    for name, value in config.items():
        inner = value.values() if isinstance(value, dict) and name.endswith("_implementation") else [value]
        if name.endswith("_implementation"):
            yield from ((name, text) for text in inner if isinstance(text, str))
        elif isinstance(value, dict):
            yield from _iterate_implementations(value)
