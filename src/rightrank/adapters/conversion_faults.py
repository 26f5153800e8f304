"""Why a whole model is not the adapter that it was made of: the other function whose losses it has, another base, or other tokens.

A is an adapter on its base, B a merged, quantised or converted model. Where B's losses leave A's by more than `SMALL` of what the adapter
itself changes, they are compared with those of the functions that common faults make: the base, and the adapter at another scale, without
rsLoRA, or without DoRA's magnitudes. B is named as one of them where it is `NEAR` times nearer to it than to A. Rounding moves B away from
all of them alike, and is named as nothing.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from rightrank.models.adapter_folders import CONFIG_FILE, WEIGHTS_FILE
from rightrank.models.adapter_reader import open_adapter
from rightrank.models.kinds import MAGNITUDE
from rightrank.models.model_sources import BASE, is_mlx
from rightrank.schema.trials import Floats, TrialFinished
from rightrank.train.runtime import Runtime
from rightrank.train.tokens import EncodedData

SMALL, NEAR = 0.1, 3.0
COMPARED = 64  # examples whose tokens are compared
EXACT, MATRICES = 0.02, 0.3  # relative: a copy in 16 bits differs by .004, a matrix in 4 bits by .1
DEFAULT_ALPHA = 8.0  # of PEFT's LoraConfig


Score: TypeAlias = Callable[[Runtime, str, Path | None], TrialFinished]  # of the base, or an adapter on it


@dataclass(frozen=True, slots=True)
class Side:
    """One side on all examples of one data set: what it was read from, and its scores."""

    place: str
    runtime: Runtime
    adapter: Path | None  # on the base of `runtime`; None: the base or a whole model
    scores: TrialFinished
    other_tokens: str | None  # why its own tokenizer reads the examples as other tokens than A's; None: it does not

    @property
    def is_whole(self) -> bool:
        """Whether it is a model of its own, and not the base with or without an adapter."""
        return self.adapter is None and self.place != BASE


def cause_of(sides: tuple[Side, Side], score: Score) -> str | None:
    """What B is in place of A, in words; None where it is A, or nothing that has a name here."""
    a, b = sides
    if not b.is_whole:
        return None
    if b.other_tokens is not None:
        return b.other_tokens
    if a.adapter is None:
        return None
    return _other_base(a, b) or _other_function(a, b, score)  # on another base, an adapter may do as little as none


def _other_function(a: Side, b: Side, score: Score) -> str | None:
    assert a.adapter is not None
    whole, made = _losses(a.scores), _losses(b.scores)
    base = _losses(score(a.runtime, "base", None))
    off, moved = _distance(made, whole), _distance(base, whole)
    if off <= SMALL * moved:
        return None
    if _distance(made, base) * NEAR <= off:
        return "it is the base: the adapter was dropped"
    with tempfile.TemporaryDirectory(prefix="rightrank-") as name:
        for number, (cause, folder) in enumerate(_faults(a.adapter, Path(name))):
            losses = _losses(score(a.runtime, f"fault {number}", folder))
            if _distance(losses, whole) > SMALL * moved and _distance(made, losses) * NEAR <= off:
                return f"it is {cause}"
    return None


def _losses(trial: TrialFinished) -> Floats:
    return np.array(trial.example_losses)


def _distance(left: Floats, right: Floats) -> float:
    return float(np.abs(left - right).mean())


def _faults(adapter: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """What each fault is called, and an adapter that has it."""
    opened = open_adapter(adapter)
    config = opened.config
    rank, alpha, own = config["r"], config["lora_alpha"], "it has scale {:.3g}, the adapter {:.3g}"
    scale = alpha / rank**0.5 if opened.use_rslora else alpha / rank
    changes: dict[str, dict[str, Any]] = {}
    if opened.use_dora:
        changes["the adapter without DoRA's magnitudes"] = {"use_dora": False}
    rs = f"the adapter {'without' if opened.use_rslora else 'with'} rsLoRA"
    changes[f"{rs}: {own.format(alpha / (rank if opened.use_rslora else rank**0.5), scale)}"] = {
        "use_rslora": not opened.use_rslora
    }
    for what, other in (
        ("alpha lost, r taken", rank),
        (f"alpha lost, PEFT's {DEFAULT_ALPHA:g} taken", DEFAULT_ALPHA),
        ("half", alpha / 2),
        ("twice", 2 * alpha),
    ):
        changes[f"the adapter at another scale ({what}): {own.format(scale * other / alpha, scale)}"] = {
            "lora_alpha": other, "alpha_pattern": {name: value * other / alpha for name, value in config["alpha_pattern"].items()},
        }  # fmt: skip
    for number, (cause, change) in enumerate(changes.items()):
        copy = folder / str(number)
        shutil.copytree(adapter, copy)
        (copy / CONFIG_FILE).write_text(json.dumps(dict(config) | change), encoding="utf-8")
        if "use_dora" in change:
            tensors = load_file(copy / WEIGHTS_FILE)
            kept = {key: value for key, value in tensors.items() if not key.endswith(tuple(MAGNITUDE))}
            save_file(kept, copy / WEIGHTS_FILE, {"format": "pt"})
        yield cause, copy


def _other_base(a: Side, b: Side) -> str | None:
    """Whether what the adapter leaves alone is that of another base."""
    assert a.adapter is not None
    opened = open_adapter(a.adapter)
    touched = {module.name for module in opened.modules}
    saved = tuple(opened.config.get("modules_to_save") or ())
    mine, theirs = (dict(side.runtime.model.named_parameters()) for side in (a, b))
    is_packed = Path(b.place).suffix == ".gguf" or is_mlx(Path(b.place))
    embedding = None if is_packed else a.runtime.model.get_input_embeddings().weight
    for name, value in mine.items():
        module, other = name.rpartition(".")[0], theirs.get(name)
        if module in touched or module.endswith(saved or ("\0",)) or not value.is_floating_point():
            continue
        if other is None or other.shape != value.shape:
            return f"it has another base than {a.runtime.loaded.name}: {name} is not the same there"
        if not other.is_floating_point():
            continue
        off = float(
            torch.linalg.vector_norm(other.float() - value.float())
            / torch.linalg.vector_norm(value.float()).clamp(min=1e-12)
        )
        if off > (EXACT if value.dim() == 1 or value is embedding else MATRICES):
            return f"it has another base than {a.runtime.loaded.name}: {name} differs by {off:.0%}"
    return None


def difference_of_tokens(first: Runtime, tokenizer: Any, own: EncodedData) -> str | None:
    """Why the same rows are other tokens for a tokenizer than on the first side; None where they are the same."""
    entries = (islice(data.splits["selection"], COMPARED) for data in (first.data, own))
    for number, (here, there) in enumerate(zip(*entries, strict=False)):
        for (mine, _), (theirs, _) in zip(here.sequences(), there.sequences(), strict=False):
            if list(mine) != list(theirs):
                same = tokenizer.chat_template == first.loaded.tokenizer.chat_template
                what = "tokenizer" if same else "chat template"
                place = next(
                    (at for at, (x, y) in enumerate(zip(mine, theirs, strict=False)) if x != y),
                    min(len(mine), len(theirs)),
                )
                return f"its {what} was changed: example {number + 1} has other tokens from the {place + 1}th on"
    return None
