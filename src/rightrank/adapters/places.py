"""What the verbs on adapters take, without torch: an adapter in a trainer's output folder, and the sides of a comparison."""

from __future__ import annotations

import math
import re
from pathlib import Path

from rightrank.data.files import UnreadableError, read_json_object
from rightrank.models.places import CONFIG_FILE

TRAINER_STATE = "trainer_state.json"  # of transformers
OWN_FOLDER = "rightrank"  # in a trainer's output: what was measured at its end
KOHYA_STEP = re.compile(r"-(?:step)?(\d{6,8})$")
BASE = "base"  # the side of a comparison that is the base model alone


def find_adapter(path: Path) -> tuple[Path, str]:
    """`(the adapter in a trainer's output folder, how it was found)`; what is an adapter itself comes back with an empty line.

    | trainer | below its output folder |
    |---|---|
    | transformers, TRL, axolotl, LLaMA-Factory, Unsloth | `checkpoint-40` |
    | ms-swift | `v0-20260101-120000/checkpoint-40` |
    | verl | `global_step_40/actor/lora_adapter`, or `lora_adapter` after its model merger |
    | OpenRLHF | `global_step40_hf` |
    | NeMo AutoModel | `epoch_0_step_40/model` |
    | kohya | `name.safetensors`, `name-000004.safetensors`, `name-step00000400.safetensors` |

    The best by `trainer_state.json` or NeMo's `LOWEST_VAL`, else the newest: the one of the highest numbers, or without any.
    """
    if not path.is_dir() or (path / CONFIG_FILE).exists() or (path / "journal.jsonl").exists():
        return path, ""
    folders = [file.parent for file in path.rglob(CONFIG_FILE) if OWN_FOLDER not in file.relative_to(path).parts]
    files = [] if (path / "config.json").exists() else list(path.glob("*.safetensors"))
    # PEFT's, whose configuration is missing
    files = [file for file in files if file.name != "adapter_model.safetensors"]
    adapters = sorted(
        folders or files, key=lambda place: (_steps(place.relative_to(path)), -len(place.parts), place.name)
    )
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
    if place.suffix == ".safetensors":
        match = KOHYA_STEP.search(place.stem)
        return [math.inf if match is None else float(match[1])]
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
