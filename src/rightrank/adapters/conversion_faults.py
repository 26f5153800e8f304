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
from rightrank.models.kinds import MAGNITUDE_KEYS
from rightrank.models.model_sources import BASE_SIDE, is_mlx_quantized
from rightrank.schema.trials import Floats, TrialFinished
from rightrank.train.runtime import Runtime
from rightrank.train.tokens import EncodedData

IGNORED_CHANGE, CLOSENESS_RATIO = 0.1, 3.0
TOKENIZED_EXAMPLES = 64  # examples whose tokens are compared
VECTOR_TOLERANCE, MATRIX_TOLERANCE = 0.02, 0.3  # relative: a copy in 16 bits differs by .004, a matrix in 4 bits by .1
DEFAULT_ALPHA = 8.0  # of PEFT's LoraConfig


ScoreFunction: TypeAlias = Callable[[Runtime, str, Path | None], TrialFinished]  # of the base, or an adapter on it


@dataclass(frozen=True, slots=True)
class ComparedSide:
    """One side on all examples of one data set: what it was read from, and its scores."""

    place: str
    runtime: Runtime
    adapter: Path | None  # on the base of `runtime`; None: the base or a whole model
    scores: TrialFinished
    token_difference: str | None  # why its own tokenizer reads the examples as other tokens than A's; None: it does not

    @property
    def is_full_model(self) -> bool:
        """Whether it is a model of its own, and not the base with or without an adapter."""
        return self.adapter is None and self.place != BASE_SIDE


def diagnose_conversion(sides: tuple[ComparedSide, ComparedSide], score: ScoreFunction) -> str | None:
    """What B is in place of A, in words; None where it is A, or nothing that has a name here."""
    a, b = sides
    if not b.is_full_model:
        return None
    if b.token_difference is not None:
        return b.token_difference
    if a.adapter is None:
        return None
    return _find_base_difference(a, b) or _diagnose_function(
        a, b, score
    )  # on another base, an adapter may do as little as none


def _diagnose_function(a: ComparedSide, b: ComparedSide, score: ScoreFunction) -> str | None:
    assert a.adapter is not None
    whole, made = _get_losses(a.scores), _get_losses(b.scores)
    base = _get_losses(score(a.runtime, "base", None))
    off, moved = _compute_distance(made, whole), _compute_distance(base, whole)
    if off <= IGNORED_CHANGE * moved:
        return None
    if _compute_distance(made, base) * CLOSENESS_RATIO <= off:
        return "it is the base: the adapter was dropped"
    with tempfile.TemporaryDirectory(prefix="rightrank-") as name:
        for number, (cause, folder) in enumerate(_write_faulty_adapters(a.adapter, Path(name))):
            losses = _get_losses(score(a.runtime, f"fault {number}", folder))
            if (
                _compute_distance(losses, whole) > IGNORED_CHANGE * moved
                and _compute_distance(made, losses) * CLOSENESS_RATIO <= off
            ):
                return f"it is {cause}"
    return None


def _get_losses(trial: TrialFinished) -> Floats:
    return np.array(trial.example_losses)


def _compute_distance(left: Floats, right: Floats) -> float:
    return float(np.abs(left - right).mean())


def _write_faulty_adapters(adapter: Path, folder: Path) -> Iterator[tuple[str, Path]]:
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
            kept = {key: value for key, value in tensors.items() if not key.endswith(tuple(MAGNITUDE_KEYS))}
            save_file(kept, copy / WEIGHTS_FILE, {"format": "pt"})
        yield cause, copy


def _find_base_difference(a: ComparedSide, b: ComparedSide) -> str | None:
    """Whether what the adapter leaves alone is that of another base."""
    assert a.adapter is not None
    opened = open_adapter(a.adapter)
    touched = {module.name for module in opened.modules}
    saved = tuple(opened.config.get("modules_to_save") or ())
    mine, theirs = (dict(side.runtime.model.named_parameters()) for side in (a, b))
    is_packed = Path(b.place).suffix == ".gguf" or is_mlx_quantized(Path(b.place))
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
        if off > (VECTOR_TOLERANCE if value.dim() == 1 or value is embedding else MATRIX_TOLERANCE):
            return f"it has another base than {a.runtime.loaded.name}: {name} differs by {off:.0%}"
    return None


def describe_token_difference(first: Runtime, tokenizer: Any, own: EncodedData) -> str | None:
    """Why the same rows are other tokens for a tokenizer than on the first side; None where they are the same."""
    entries = (islice(data.splits["validation"], TOKENIZED_EXAMPLES) for data in (first.data, own))
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
