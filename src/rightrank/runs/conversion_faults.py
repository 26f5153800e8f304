"""Find out why a full model is not the adapter that it was converted from: another function, another base model, or other tokens.

A is an adapter on its base model, B a merged, quantized or converted model. If B's losses deviate from A's by more than `IGNORED_CHANGE` times the
effect of the adapter, they are compared with the losses of functions that result from common faults: the base model alone, and the adapter at
another scale, without rsLoRA, or without DoRA's magnitudes. B is named as one of them if it is `CLOSENESS_RATIO` times closer to it than to A.
Rounding moves B away from all of them, and is not named.
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

from rightrank.adapters.adapter_folders import CONFIG_FILE, WEIGHTS_FILE
from rightrank.adapters.adapter_reader import open_adapter
from rightrank.adapters.kinds import MAGNITUDE_KEYS
from rightrank.bases.model_sources import BASE_SIDE, is_mlx_quantized
from rightrank.schema.trials import Floats, TrialFinished
from rightrank.training.runtime import Runtime
from rightrank.training.tokens import EncodedData

IGNORED_CHANGE, CLOSENESS_RATIO = 0.1, 3.0
TOKENIZED_EXAMPLES = 64  # number of examples whose tokens are compared
VECTOR_TOLERANCE, MATRIX_TOLERANCE = (
    0.02,
    0.3,
)  # relative differences: a copy in 16 bits differs by .004, a matrix in 4 bits by .1
DEFAULT_ALPHA = 8.0  # of PEFT's LoraConfig


ScoreFunction: TypeAlias = Callable[
    [Runtime, str, Path | None], TrialFinished
]  # evaluates the base model, or an adapter on it


@dataclass(frozen=True, slots=True)
class ComparedSide:
    """One side of a comparison on all examples of a data set: its source and its scores."""

    source: str
    runtime: Runtime
    adapter: Path | None  # on the base of `runtime`; None: the base model or a full model
    scores: TrialFinished
    token_difference: str | None  # why its own tokenizer reads the examples as other tokens than A's; None: it does not

    @property
    def is_full_model(self) -> bool:
        """Return whether the side is a model of its own, and not the base model with or without an adapter."""
        return self.adapter is None and self.source != BASE_SIDE


def diagnose_conversion(sides: tuple[ComparedSide, ComparedSide], score: ScoreFunction) -> str | None:
    """Describe what B is in place of A; return None if B equals A or no known fault explains the difference."""
    a, b = sides
    if not b.is_full_model:
        return None
    if b.token_difference is not None:
        return b.token_difference
    if a.adapter is None:
        return None
    return _find_base_difference(a, b) or _diagnose_function(
        a, b, score
    )  # an adapter may have no effect on another base model


def _diagnose_function(a: ComparedSide, b: ComparedSide, score: ScoreFunction) -> str | None:
    assert a.adapter is not None
    adapter_losses, converted_losses = _get_losses(a.scores), _get_losses(b.scores)
    base_losses = _get_losses(score(a.runtime, "base", None))
    deviation, adapter_effect = (
        _compute_distance(converted_losses, adapter_losses),
        _compute_distance(base_losses, adapter_losses),
    )
    if deviation <= IGNORED_CHANGE * adapter_effect:
        return None
    if _compute_distance(converted_losses, base_losses) * CLOSENESS_RATIO <= deviation:
        return "it equals the base model: the adapter was dropped"
    with tempfile.TemporaryDirectory(prefix="rightrank-") as name:
        for number, (cause, folder) in enumerate(_write_faulty_adapters(a.adapter, Path(name))):
            losses = _get_losses(score(a.runtime, f"fault {number}", folder))
            if (
                _compute_distance(losses, adapter_losses) > IGNORED_CHANGE * adapter_effect
                and _compute_distance(converted_losses, losses) * CLOSENESS_RATIO <= deviation
            ):
                return f"it is {cause}"
    return None


def _get_losses(trial: TrialFinished) -> Floats:
    return np.array(trial.example_losses)


def _compute_distance(losses: Floats, other_losses: Floats) -> float:
    return float(np.abs(losses - other_losses).mean())


def _write_faulty_adapters(adapter: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the description of each fault, and the folder of an adapter that has it."""
    opened = open_adapter(adapter)
    config = opened.config
    rank, alpha, scale_text = config["r"], config["lora_alpha"], "its scale is {:.3g}, and the adapter's is {:.3g}"
    scale = alpha / rank**0.5 if opened.use_rslora else alpha / rank
    changes: dict[str, dict[str, Any]] = {}
    if opened.use_dora:
        changes["the adapter without DoRA's magnitudes"] = {"use_dora": False}
    rslora_text = f"the adapter {'without' if opened.use_rslora else 'with'} rsLoRA"
    changes[f"{rslora_text}: {scale_text.format(alpha / (rank if opened.use_rslora else rank**0.5), scale)}"] = {
        "use_rslora": not opened.use_rslora
    }
    for description, wrong_alpha in (
        ("alpha was lost and r was used", rank),
        (f"alpha was lost and PEFT's default {DEFAULT_ALPHA:g} was used", DEFAULT_ALPHA),
        ("half", alpha / 2),
        ("twice", 2 * alpha),
    ):
        changes[f"the adapter at another scale ({description}): {scale_text.format(scale * wrong_alpha / alpha, scale)}"] = {
            "lora_alpha": wrong_alpha, "alpha_pattern": {name: value * wrong_alpha / alpha for name, value in config["alpha_pattern"].items()},
        }  # fmt: skip
    for number, (cause, change) in enumerate(changes.items()):
        copy = folder / str(number)
        shutil.copytree(adapter, copy)
        (copy / CONFIG_FILE).write_text(json.dumps(dict(config) | change), encoding="utf-8")
        if "use_dora" in change:
            tensors = load_file(copy / WEIGHTS_FILE)
            plain_tensors = {key: value for key, value in tensors.items() if not key.endswith(tuple(MAGNITUDE_KEYS))}
            save_file(plain_tensors, copy / WEIGHTS_FILE, {"format": "pt"})
        yield cause, copy


def _find_base_difference(a: ComparedSide, b: ComparedSide) -> str | None:
    """Describe a difference between the base models in the weights that the adapter does not change; return None if there is none."""
    assert a.adapter is not None
    opened = open_adapter(a.adapter)
    adapted = {module.name for module in opened.modules}
    saved_modules = tuple(opened.config.get("modules_to_save") or ())
    base_parameters, converted_parameters = (
        dict(compared_side.runtime.model.named_parameters()) for compared_side in (a, b)
    )
    is_packed = Path(b.source).suffix == ".gguf" or is_mlx_quantized(Path(b.source))
    embedding = None if is_packed else a.runtime.model.get_input_embeddings().weight
    for name, value in base_parameters.items():
        module, converted = name.rpartition(".")[0], converted_parameters.get(name)
        if module in adapted or module.endswith(saved_modules or ("\0",)) or not value.is_floating_point():
            continue
        if converted is None or converted.shape != value.shape:
            return (
                f"it has another base model than {a.runtime.loaded.name}: {name} is missing there or has another shape"
            )
        if not converted.is_floating_point():
            continue
        relative_error = float(
            torch.linalg.vector_norm(converted.float() - value.float())
            / torch.linalg.vector_norm(value.float()).clamp(min=1e-12)
        )
        if relative_error > (VECTOR_TOLERANCE if value.dim() == 1 or value is embedding else MATRIX_TOLERANCE):
            return f"it has another base model than {a.runtime.loaded.name}: {name} differs by {relative_error:.0%}"
    return None


def describe_token_difference(first: Runtime, tokenizer: Any, own_data: EncodedData) -> str | None:
    """Describe why a tokenizer gives other tokens than the first side for the same rows; return None if the tokens are the same."""
    entries = (islice(data.splits["validation"], TOKENIZED_EXAMPLES) for data in (first.data, own_data))
    for number, (example, own_example) in enumerate(zip(*entries, strict=False)):
        for (ids, _), (own_ids, _) in zip(example.sequences(), own_example.sequences(), strict=False):
            if list(ids) != list(own_ids):
                has_same_template = tokenizer.chat_template == first.loaded.tokenizer.chat_template
                cause = "tokenizer" if has_same_template else "chat template"
                position = next(
                    (index for index, (x, y) in enumerate(zip(ids, own_ids, strict=False)) if x != y),
                    min(len(ids), len(own_ids)),
                )
                return f"its {cause} was changed: example {number + 1} has other tokens from token {position + 1} on"
    return None
