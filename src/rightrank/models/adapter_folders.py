"""Adapter folders: the names of their files, the adapters in the output folder of a trainer, and checks without torch."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from rightrank.data.files import UnreadableError, read_json_object
from rightrank.schema.errors import ModelError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MLX_FILE = "adapters.safetensors"
MAX_CONFIG_BYTES = 16 * 2**20
BASE_FILE = "base.json"  # beside an adapter: what its base is known by
CLASSIFIER_FILE = "classifier.json"  # beside it: the labels of a classifier
TRAINER_STATE = "trainer_state.json"  # of transformers
OWN_FOLDER = "rightrank"  # in a trainer's output: what was measured at its end


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
