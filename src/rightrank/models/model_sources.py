"""Locations of base models: folders, GGUF files and hub names.

This module imports no torch, so that a wrong name is refused before anything heavy is imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rightrank.data.files import UnreadableError, path_kind, read_json_object
from rightrank.schema.errors import MissingExtraError, ModelError, did_you_mean, first_line

HUB_SECONDS = 10.0  # for the hub to answer
BASE = "base"  # the side of a comparison that is the base model alone


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model is: a folder or hub name, and the name of a GGUF file in the folder."""

    name: str
    gguf_file: str | None

    def loading_arguments(self, trust_remote_code: bool) -> dict[str, Any]:
        arguments: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        if self.gguf_file is not None:
            arguments["gguf_file"] = self.gguf_file
        return arguments


def find_model(reference: str) -> ModelSource:
    """Locate a model without loading it.

    Raises:
        ModelError: a local folder without config, a file that is not GGUF, or a path that does not exist.
        MissingExtraError: a GGUF file without the `gguf` package.
    """
    path = Path(reference).expanduser()
    kind = path_kind(path)
    if kind == "file":
        if path.suffix.lower() != ".gguf":
            raise ModelError(
                f"{reference}: a model file must end in .gguf; give a GGUF file, a model folder, or a hub name"
            )
        if find_spec("gguf") is None:
            raise MissingExtraError("reading GGUF files needs the `gguf` package: pip install 'rightrank[gguf]'")
        return ModelSource(str(path.parent), path.name)
    if kind == "folder":
        if not (path / "config.json").exists():
            ggufs = sorted(file.name for file in path.glob("*.gguf"))
            hint = f"; give the file: {path / ggufs[0]}" if ggufs else "; give a folder that save_pretrained wrote"
            raise ModelError(f"{reference}: no config.json in the folder{hint}")
        if (path / "adapter_config.json").exists():  # transformers would load the base that it names
            raise ModelError(f"{reference}: holds an adapter_config.json too; give the folder of the base model alone")
        _reject_foreign(path / "config.json")
        return ModelSource(str(path), None)
    if path.is_absolute() or reference.startswith((".", "~")) or reference.count("/") > 1:
        raise ModelError(
            f"{reference}: no such folder{_nearest_folder(path)}; give a model folder, a GGUF file, or a hub name"
        )
    return ModelSource(reference, None)


def require_model(reference: str) -> ModelSource:
    """As `find_model`, and refuse a name that the hub does not answer for.

    Raises:
        ModelError: as `find_model`, or no such model on the hub, or a hub that can't be reached.
    """
    source = find_model(reference)
    if source.gguf_file is None and path_kind(Path(source.name)) == "missing":
        _require_on_hub(reference, Path(reference))
    return source


@cache
def last_part(name: str) -> str:
    """Of a path or a hub name: whoever holds a copy."""
    return name.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1].lower()


def _require_on_hub(name: str, path: Path) -> None:
    """Refuse a name that is no model of the hub, at the first answer: loading would try again for a minute."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_OFFLINE

    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        if HF_HUB_OFFLINE:
            raise ModelError(
                f"{name}: no such folder{_nearest_folder(path)}, and the hub is switched off (HF_HUB_OFFLINE)"
            )
        HfApi().model_info(name, timeout=HUB_SECONDS)
    except hub_errors() as error:
        raise ModelError(
            f"{name}: no such folder{_nearest_folder(path)}, and no model that the hub answers for ({first_line(error)}); "
            "give a model folder, a GGUF file, or a hub name"
        ) from None


def hub_errors() -> tuple[type[BaseException], ...]:
    """What a call of the hub raises: the client's errors derive from those of an HTTP library that differs between versions."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    return (OSError, HFValidationError, *HfHubHTTPError.__bases__)


def _nearest_folder(path: Path) -> str:
    """` (did you mean 'x'?)` for a model folder of a similar name beside it."""
    parent = path.parent
    folders = (
        [folder.name for folder in parent.iterdir() if (folder / "config.json").is_file()] if parent.is_dir() else []
    )
    return did_you_mean(path.name, folders)


def _reject_foreign(file: Path) -> None:
    """Reject a configuration that names compiled code on the hub, which transformers runs even without trust, and weights of MLX."""
    try:
        config = read_json_object(file)
    except UnreadableError as error:
        raise ModelError(f"{file}: not readable as JSON ({error}); save the model again") from None
    if is_mlx(file.parent):
        raise ModelError(
            f"{file.parent}: quantised by MLX, which PyTorch does not read; give the model that it was made from"
        )
    for name, value in _implementations(config):
        if "/" in value:
            raise ModelError(
                f"{file}: {name} is {value!r}, code from the hub; remove the line to use transformers' own"
            )


def is_mlx(folder: Path) -> bool:
    """Whether a model folder holds weights that MLX quantised."""
    try:
        config = read_json_object(folder / "config.json")
    except UnreadableError:
        return False
    return "quantization" in config and "quant_method" not in (config.get("quantization_config") or {})


def _implementations(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield `(key, value)` of every `*_implementation` in a configuration, at any depth."""
    for name, value in config.items():
        inner = value.values() if isinstance(value, dict) and name.endswith("_implementation") else [value]
        if name.endswith("_implementation"):
            yield from ((name, text) for text in inner if isinstance(text, str))
        elif isinstance(value, dict):
            yield from _implementations(value)
