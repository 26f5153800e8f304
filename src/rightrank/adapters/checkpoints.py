"""`inspect --base A --finetuned B`: the spectrum of every matrix that full fine-tuning changed, one at a time.

Small matrices are decomposed exactly. Of larger ones a randomised range finder with power iterations (Halko, Martinsson
and Tropp 2011) gives the leading singular values; the energy ‖Δ‖²_F is exact, and so is that of the remainder.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from rightrank.adapters.spectra import inspection_of, spectrum_of
from rightrank.data.files import path_kind
from rightrank.models.adapter_files import natural_order
from rightrank.models.places import read_header, safe_shards
from rightrank.schema.errors import ModelError
from rightrank.schema.results import Inspection, ModuleSpectrum
from rightrank.schema.trials import Floats

EXACT_SIDE = 1024  # shorter side up to which a difference is decomposed exactly
SKETCH_RANK = 128
OVERSAMPLING = 32
POWER_ITERATIONS = 3  # gives a singular value well above the rest within a relative error of 1e-3


def inspect_checkpoints(base: Path, finetuned: Path, sketch_rank: int = SKETCH_RANK) -> Inspection:
    """The spectra of `finetuned` minus `base`; only one matrix is in memory at a time.

    Raises:
        ModelError: a folder without safetensors, or two that differ in names or shapes.
    """
    before, after = open_weights(base), open_weights(finetuned)
    _require_alike(before, after)
    spectra: list[ModuleSpectrum] = []
    not_matrices: list[str] = []
    unchanged = 0
    for name, delta in _differences(before, after):
        if delta is None:
            unchanged += 1
        elif delta.dim() < 2:
            not_matrices.append(name)
        else:
            spectra.append(_matrix_spectrum(name, delta.flatten(1), sketch_rank))
    if not spectra and not not_matrices:
        raise ModelError(f"{finetuned}: every tensor is equal to that of {base}; give a fine-tuned model of this base")
    return inspection_of(
        spectra,
        kind="checkpoints",
        scaling_rule="none",
        base_model=str(base),
        parameters=sum(math.prod(spectrum.shape) for spectrum in spectra),
        unchanged=unchanged,
        not_matrices=not_matrices,
    )


def _require_alike(before: _WeightFolder, after: _WeightFolder) -> None:
    """Refuse two checkpoints of different architectures.

    Raises:
        ModelError: a tensor name or shape that only one of them has.
    """
    for ours, theirs in ((before, after), (after, before)):
        missing = sorted(ours.files.keys() - theirs.files.keys())
        if missing:
            raise ModelError(
                f"{theirs.path}: has no tensor {missing[0]} that {ours.path} has ({len(missing)} such); give two checkpoints of one architecture"
            )
    for name, shape in before.shapes.items():
        if after.shapes[name] != shape:
            raise ModelError(
                f"{name}: {list(shape)} in {before.path} and {list(after.shapes[name])} in {after.path}; give two checkpoints of one architecture"
            )


def _differences(before: _WeightFolder, after: _WeightFolder) -> Iterator[tuple[str, torch.Tensor | None]]:
    """The change of every floating-point tensor in float32, in the natural order of names; None where nothing changed.

    Raises:
        ModelError: a value that is NaN or infinite.
    """
    for name in sorted(before.files, key=natural_order):
        old, new = before.tensor(name), after.tensor(name)
        if not old.is_floating_point():
            continue
        if torch.equal(old, new.to(old.dtype)) and torch.equal(new, old.to(new.dtype)):
            yield name, None
            continue
        delta = new.float() - old.float()
        del old, new
        if not all(torch.isfinite(bound) for bound in torch.aminmax(delta)):  # without the copy that isfinite makes
            raise ModelError(
                f"{name}: NaN or infinite values in {before.path} or {after.path}; give an undamaged checkpoint"
            )
        yield name, delta


def _matrix_spectrum(name: str, delta: torch.Tensor, sketch_rank: int) -> ModuleSpectrum:
    """The record of one difference: all singular values up to a shorter side of EXACT_SIDE, else the leading ones."""
    if min(delta.shape) <= EXACT_SIDE:
        tall = delta if delta.shape[0] >= delta.shape[1] else delta.T
        values: Floats = torch.linalg.svdvals(torch.linalg.qr(tall, mode="r").R.double()).numpy()
        energy = float(np.sum(values**2))
    else:
        values = _sketched_values(delta, sketch_rank)
        rows = max(1, 2**22 // delta.shape[1])  # at a time, in float64
        blocks = (delta[start : start + rows] for start in range(0, len(delta), rows))
        energy = float(sum(float(block.double().square().sum()) for block in blocks))
    about: dict[str, Any] = {"name": name.removesuffix(".weight"), "rank": min(delta.shape), "scaling": 1.0}
    return spectrum_of(values, energy, "matrix", (delta.shape[0], delta.shape[1]), **about)


def _sketched_values(delta: torch.Tensor, rank: int) -> Floats:
    """The leading singular values of `delta` [d, k]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, leading, _ = torch.svd_lowrank(delta, min(rank + OVERSAMPLING, *delta.shape), POWER_ITERATIONS)
    values: Floats = leading[:rank].double().numpy()
    return values


@dataclass(frozen=True, slots=True)
class _WeightFolder:
    """Names, files and shapes of the tensors; a tensor is read on access."""

    path: Path
    files: Mapping[str, Path]
    shapes: Mapping[str, tuple[int, ...]]

    def tensor(self, name: str) -> torch.Tensor:
        # Closing the file releases its mapped pages, so that memory holds one tensor at a time.
        with safe_open(self.files[name], framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor


def open_weights(path: Path) -> _WeightFolder:
    """Read the headers of a model folder's tensors.

    Raises:
        ModelError: no such folder, no safetensors, pickled weights, or a shard that is missing or damaged.
    """
    if path_kind(path) != "folder":
        raise ModelError(f"{path}: no such folder; give a model folder that save_pretrained wrote")
    files: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for shard in safe_shards(path):
        tensors, _ = read_header(shard)
        files |= dict.fromkeys(tensors, shard)
        shapes |= tensors
    return _WeightFolder(path, files, shapes)
