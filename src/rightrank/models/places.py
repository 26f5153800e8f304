"""Where models and adapters are, and the headers of their files, without torch: what refuses a wrong name before anything heavy is
imported."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path, PurePath
from typing import Any

from safetensors import SafetensorError, safe_open

from rightrank.data.files import UnreadableError, path_kind, read_json_object
from rightrank.schema.errors import MissingExtraError, ModelError, did_you_mean, first_line

HUB_SECONDS = 10.0  # for the hub to answer
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MLX_FILE = "adapters.safetensors"
MAX_CONFIG_BYTES = 16 * 2**20
INDEX_FILE = "model.safetensors.index.json"
BASE_FILE = "base.json"  # beside an adapter: what its base is known by
CLASSIFIER_FILE = "classifier.json"  # beside it: the labels of a classifier
TRAINER_STATE = "trainer_state.json"  # of transformers
OWN_FOLDER = "rightrank"  # in a trainer's output: what was measured at its end
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


def require_adapter_folder(path: Path) -> None:
    """Refuse a path that holds no adapter, or pickled weights, before torch is imported.

    Raises:
        ModelError: the message names the adapter of a run folder, and the way to compare whole models.
    """
    if not path.exists():
        raise ModelError(f"{path}: no such folder; give an adapter folder, one that PEFT's save_pretrained wrote")
    if not path.is_dir():
        raise ModelError(f"{path}: a file; give the adapter's folder, the one that holds {CONFIG_FILE}")
    if (path / CONFIG_FILE).exists():
        read_config(path)
        _require_weights(path)
        return
    hint = "give a folder that PEFT's save_pretrained wrote"
    if (path / "config.json").exists():
        hint = "it is a whole model: compare two with --base A --finetuned B"
    raise ModelError(f"{path}: not an adapter, there is no {CONFIG_FILE}; {adapter_in(path) or hint}")


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of an adapter folder.

    Raises:
        ModelError: not one JSON object.
    """
    try:
        return read_json_object(folder / CONFIG_FILE, MAX_CONFIG_BYTES)
    except UnreadableError as error:
        raise ModelError(f"{folder / CONFIG_FILE}: not readable as JSON ({error}); save the adapter again") from None


def _require_weights(folder: Path) -> None:
    if any((folder / name).exists() for name in (WEIGHTS_FILE, MLX_FILE)):
        return
    if (folder / "adapter_model.bin").exists():
        raise ModelError(
            f"{folder}: only pickled weights (adapter_model.bin), which can run code when read; convert them if you trust "
            "the file: PeftModel.from_pretrained(base, folder).save_pretrained(folder, safe_serialization=True)"
        )
    raise ModelError(f"{folder}: there is no {WEIGHTS_FILE}; save the adapter again with save_pretrained")


def adapter_in(folder: Path) -> str:
    """What to give in place of a run folder, or of a folder of PEFT's named adapters; empty for another folder."""
    inner = sorted(file.parent for file in folder.glob(f"*/{CONFIG_FILE}")) if folder.is_dir() else []
    if folder / "adapter" in inner:
        inner = [folder / "adapter"]
    if len(inner) == 1:
        return f"give {inner[0]}, the adapter in it"
    return f"give one of the adapters in it: {', '.join(map(str, inner[:5]))}" if inner else ""


def read_header(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Names and shapes of a file's tensors, and its metadata.

    Raises:
        ModelError: no readable safetensors file.
    """
    try:
        with safe_open(path, framework="np") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in list(file.keys())}
            return shapes, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: not a readable safetensors file ({error}); copy or save it again") from None


def safe_shards(path: Path) -> list[Path]:
    """The safetensors files of a model folder: those in its index if it has one, else all.

    Raises:
        ModelError: no safetensors, a damaged index, an index with files outside the folder, or a missing shard.
    """
    index = path / INDEX_FILE
    if index.exists():
        try:
            listed = read_json_object(index)["weight_map"].values()
        except (UnreadableError, KeyError, AttributeError):
            raise ModelError(f"{index}: not a shard index; save the model again") from None
        for name in listed:
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise ModelError(
                    f"{index}: names the shard {name!r}; shards are *.safetensors files of the folder itself"
                )
        names = sorted(set(listed))
        missing = [name for name in names if path_kind(path / name) != "file"]
        if missing:
            raise ModelError(f"{path}: shard {missing[0]} is missing ({len(missing)} of {len(names)}); copy it too")
        return [path / name for name in names]
    files = sorted(file for file in path.glob("*.safetensors") if file.name != "adapter_model.safetensors")
    if files:
        return files
    if next(path.glob("*.bin"), None) is not None:
        raise ModelError(
            f"{path}: only pickled weights (*.bin), which can run code when read; save the model again with save_pretrained(safe_serialization=True)"
        )
    raise ModelError(f"{path}: no weights (*.safetensors) in the folder; give a folder that save_pretrained wrote")


def find_adapter(path: Path) -> tuple[Path, str]:
    """`(the adapter in a trainer's output folder, how it was found)`; what is an adapter itself comes back with an empty line.

    | trainer | below its output folder |
    |---|---|
    | transformers, TRL, axolotl, LLaMA-Factory, Unsloth | `checkpoint-40` |
    | ms-swift | `v0-20260101-120000/checkpoint-40` |
    | verl | `global_step_40/actor/lora_adapter`, or `lora_adapter` after its model merger |
    | OpenRLHF | `global_step40_hf` |
    | NeMo AutoModel | `epoch_0_step_40/model` |

    The best by `trainer_state.json` or NeMo's `LOWEST_VAL`, else the newest: the one of the highest numbers, or without any.
    """
    if not path.is_dir() or (path / CONFIG_FILE).exists() or (path / "journal.jsonl").exists():
        return path, ""
    folders = [file.parent for file in path.rglob(CONFIG_FILE) if OWN_FOLDER not in file.relative_to(path).parts]
    adapters = sorted(folders, key=lambda place: (_steps(place.relative_to(path)), -len(place.parts), place.name))
    if not adapters:
        return path, ""
    newest = adapters[-1]
    if len(adapters) == 1:
        return newest, f"{newest}: the only adapter in {path}"
    best, by = _best_of(path, newest)
    chosen = next((place for place in adapters if best is not None and best in (place, *place.parents)), None)
    if chosen is None:
        return newest, f"{newest}: the newest of {len(adapters)} adapters in {path}, where nothing names the best"
    return chosen, f"{chosen}: the best of {len(adapters)} adapters in {path} by {by}"


def _steps(place: Path) -> list[float]:
    """The numbers in a place's name, by which checkpoints are ordered; infinity for one without, which is a training's last."""
    return [float(number) for number in re.findall(r"\d+", str(place))] or [math.inf]


def _best_of(output: Path, newest: Path) -> tuple[Path | None, str]:
    """The checkpoint that the training itself names the best, and the file that names it."""
    lowest = output / "LOWEST_VAL"  # NeMo's: a link, or a text file
    if lowest.is_symlink() or lowest.with_suffix(".txt").is_file():
        target = lowest.readlink() if lowest.is_symlink() else Path(lowest.with_suffix(".txt").read_text().strip())
        return output / target.name, lowest.name
    for folder in (newest, newest.parent):
        file = folder / TRAINER_STATE
        try:
            named = read_json_object(file).get("best_model_checkpoint") if file.is_file() else None
        except UnreadableError:
            named = None  # written halfway
        if named:
            return newest.parent / Path(str(named)).name, TRAINER_STATE
    return None, ""


def loading_lines(folder: str, base: str | None, is_classifier: bool) -> list[str]:
    """Python that loads a model with the adapter in `folder`: PEFT finds the base, but for one in a GGUF file."""
    kind, more = "AutoPeftModelFor" + ("SequenceClassification" if is_classifier else "CausalLM"), ""
    head: list[str] = []
    if is_classifier:
        more = ", **head"
        head = [
            f"head = json.load(open({f'{folder}/{CLASSIFIER_FILE}'!r}, encoding='utf-8'))",
            "head['id2label'] = {int(number): label for number, label in head['id2label'].items()}",  # JSON has no numbers as keys
        ]
    imports = ["import json"] if is_classifier else []
    if base is None or not base.lower().endswith(".gguf"):
        return [*imports, f"from peft import {kind}", *head, f"model = {kind}.from_pretrained({folder!r}{more})"]
    plain = kind.replace("AutoPeft", "Auto")
    imports += ["from peft import PeftModel", f"from transformers import {plain}"]
    loaded = f"base = {plain}.from_pretrained({base_arguments(base)}{more})"
    return [*imports, *head, loaded, f"model = PeftModel.from_pretrained(base, {folder!r})"]


def base_arguments(base: str) -> str:
    """What `from_pretrained` takes for a base: its name, or the folder and the name of a GGUF file."""
    path = PurePath(base)
    return f"{str(path.parent)!r}, gguf_file={path.name!r}" if path.suffix.lower() == ".gguf" else repr(base)
