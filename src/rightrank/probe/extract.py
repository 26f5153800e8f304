"""`extract`: a full fine-tune as a LoRA adapter, from two checkpoints.

Every changed linear module gets the leading singular triplets of its difference. Factors cannot represent changes of
norms, biases and embeddings: those are left out, and a note names them.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rightrank.errors import ModelError, SettingsError
from rightrank.io.adapter_folder import PREFIX, open_adapter
from rightrank.io.adapter_writing import write_adapter
from rightrank.io.files import require_absent
from rightrank.io.models import linear_modules
from rightrank.io.truncation import Factors, balanced_factors
from rightrank.io.weights import open_weights
from rightrank.maths.spectra import energy_rank
from rightrank.probe.checkpoint_spectra import EXACT_SIDE, differences, require_alike, sketched_svd
from rightrank.probe.rank_choice import RankChoice, require_fraction
from rightrank.probe.resize import resize_adapter
from rightrank.probe.resized_adapter import write_resized
from rightrank.probe.spectrum import Update, describe
from rightrank.records.probe import Resized
from rightrank.settings.resize import ResizeOptions, ResizeRule

MAX_RANK = 128


@dataclass(frozen=True, slots=True)
class ExtractOptions:
    max_rank: int = MAX_RANK  # singular values kept of each module
    resize: ResizeOptions = field(default_factory=lambda: ResizeOptions(dtype="float32"))


@dataclass(frozen=True, slots=True)
class _LeadingParts:
    """The adapter of all leading parts, before its rank is chosen."""

    tensors: dict[str, torch.Tensor]
    updates: list[Update]
    left_out: list[str]
    fan_in_fan_out: bool


def extract(base: Path, finetuned: Path, out: Path, rule: ResizeRule, options: ExtractOptions) -> Resized:
    """Write an adapter on `base` that approximates `finetuned`; errors are relative to the whole difference.

    Raises:
        InputError: checkpoints of different architectures, a rule that cannot be applied, or an `out` that exists.
    """
    rule.require_one()
    require_absent(out)
    if rule.rank is not None and rule.rank > options.max_rank:
        raise SettingsError(f"--rank {rule.rank} is above --max-rank {options.max_rank}; give a larger --max-rank")
    leading = _leading_parts(base, finetuned, options)
    with tempfile.TemporaryDirectory(prefix="rightrank-") as name:
        whole = Path(name) / "whole"
        write_adapter(whole, _config(base, leading), leading.tensors)
        if rule.rank is None and rule.data is None:
            written = write_resized(open_adapter(whole), out, _choice(leading, rule, options), options.resize.dtype)
        else:
            written = resize_adapter(whole, out, rule, options.resize)
    return _of_whole_difference(written, leading)


def _leading_parts(base: Path, finetuned: Path, options: ExtractOptions) -> _LeadingParts:
    before, after = open_weights(base), open_weights(finetuned)
    require_alike(before, after)
    kinds = linear_modules(str(base))
    tensors: dict[str, torch.Tensor] = {}
    updates: list[Update] = []
    left_out: list[str] = []
    for difference in differences(before, after):
        if difference.delta is None:
            continue
        module = next((name for name in kinds if before.weight_of(name) == difference.name), None)
        if module is None:
            left_out.append(difference.name)
            continue
        delta = difference.delta.T if kinds[module] == "Conv1D" else difference.delta
        update, (b, a) = leading_part(module, delta, options.max_rank)
        tensors[f"{PREFIX}{module}.lora_A.weight"] = a.float()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = b.float()
        updates.append(update)
    if not updates:
        raise ModelError(
            f"{finetuned}: no linear module differs from {base}; give a model with fine-tuned linear modules"
        )
    return _LeadingParts(tensors, updates, left_out, "Conv1D" in {kinds[update.name] for update in updates})


def leading_part(name: str, delta: torch.Tensor, max_rank: int) -> tuple[Update, Factors]:
    """The record of a difference, and the factors of its leading part: exact where the matrix is small."""
    if min(delta.shape) <= EXACT_SIDE:
        u, s, vt = torch.linalg.svd(delta.double(), full_matrices=False)
    else:
        u, s, vt = sketched_svd(delta, max_rank)
    kept = min(max_rank, len(s))
    update = Update(
        name=name,
        kind="matrix",
        shape=(delta.shape[0], delta.shape[1]),
        rank=kept,
        scaling=1.0,
        values=s.numpy(),
        energy=float(delta.double().square().sum()),
        parameters=kept * sum(delta.shape),
    )
    return update, balanced_factors(u, s, vt, kept)


def _config(base: Path, leading: _LeadingParts) -> dict[str, Any]:
    """A LoraConfig of the leading parts with alpha = r, so that the scale is 1."""
    largest = max(update.rank for update in leading.updates)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": largest,
        "lora_alpha": largest,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": leading.fan_in_fan_out,
        "inference_mode": True,
        "target_modules": sorted(update.name for update in leading.updates),
        "rank_pattern": {update.name: update.rank for update in leading.updates if update.rank != largest},
        "alpha_pattern": {update.name: update.rank for update in leading.updates if update.rank != largest},
    }


def _choice(leading: _LeadingParts, rule: ResizeRule, options: ExtractOptions) -> RankChoice:
    """Ranks by energy or noise of the whole difference, at most the number of kept singular values."""
    if rule.energy is not None:
        require_fraction(rule.energy)
    ranks: dict[str, int] = {}
    short = 0
    for update in leading.updates:
        if rule.noise:
            wanted: int | None = max(1, describe(update).noise_rank)
        else:
            wanted = energy_rank(update.values[: update.rank], rule.energy or 1.0, update.energy)
        short += wanted is None or wanted > update.rank
        ranks[update.name] = max(1, min(wanted or update.rank, update.rank))
    note = f"{short} module(s) need more than --max-rank {options.max_rank}, which they got"
    choice = RankChoice(ranks, "noise" if rule.noise else f"energy {rule.energy:g}", (note,) if short else ())
    return choice.as_common() if options.resize.uniform else choice


def _of_whole_difference(written: Resized, leading: _LeadingParts) -> Resized:
    """Errors relative to the whole difference: √(error² + what the leading parts omit), since both are orthogonal."""
    updates = {update.name: update for update in leading.updates}
    modules, errors = [], []
    for module in written.modules:
        update = updates[module.name]
        kept = float(np.sum(update.values[: update.rank] ** 2))
        error = math.sqrt(module.relative_delta_error**2 * kept + max(0.0, update.energy - kept))
        errors.append(error)
        relative = error / math.sqrt(update.energy)
        modules.append(module.model_copy(update={"from_rank": min(update.shape), "relative_delta_error": relative}))
    total = math.sqrt(sum(update.energy for update in leading.updates))
    notes = list(written.notes)
    if leading.left_out:
        named = ", ".join(leading.left_out[:4]) + (", …" if len(leading.left_out) > 4 else "")
        notes.append(f"{len(leading.left_out)} changed tensor(s) that factors cannot represent were left out: {named}")
    return written.model_copy(
        update={
            "relative_delta_error": math.hypot(*errors) / total,
            "modules": modules,
            "notes": notes,
            "parameters_before": sum(update.shape[0] * update.shape[1] for update in leading.updates),
        }
    )
