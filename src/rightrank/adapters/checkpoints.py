"""`inspect --base A --finetuned B`: the spectrum of every matrix that full fine-tuning changed, one at a time.

Small matrices are decomposed exactly. Of larger ones a randomised range finder with power iterations (Halko, Martinsson
and Tropp 2011) gives the leading singular values; the energy ‖Δ‖²_F is exact, and so is that of the remainder.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from rightrank.adapters.spectra import InspectionInfo, Update, describe, flag_dead, summarise
from rightrank.models.adapter_files import natural_order
from rightrank.models.weights import WeightFolder, open_weights
from rightrank.plugins.allocate.importance import GRADIENT_EXAMPLES, weight_gradients
from rightrank.schema.arrays import Floats
from rightrank.schema.errors import ModelError
from rightrank.schema.results import Inspection
from rightrank.schema.settings import SelectSettings
from rightrank.train.adapter_runtime import DataUse, make_runtime

EXACT_SIDE = 1024  # shorter side up to which a difference is decomposed exactly
SKETCH_RANK = 128
BLOCK_ROWS = 1024
OVERSAMPLING = 32
POWER_ITERATIONS = 3  # gives a singular value well above the rest within a relative error of 1e-3


@dataclass(frozen=True, slots=True)
class Difference:
    """A tensor of both checkpoints, and its change."""

    name: str
    shape: tuple[int, ...]
    delta: torch.Tensor | None  # float32; None where nothing changed


def inspect_checkpoints(base: Path, finetuned: Path, sketch_rank: int = SKETCH_RANK) -> Inspection:
    """The spectra of `finetuned` minus `base`; only one matrix is in memory at a time.

    Raises:
        ModelError: a folder without safetensors, or two that differ in names or shapes.
    """
    before, after = open_weights(base), open_weights(finetuned)
    require_alike(before, after)
    updates: list[Update] = []
    not_matrices: list[str] = []
    unchanged = 0
    for difference in differences(before, after):
        if difference.delta is None:
            unchanged += 1
        elif len(difference.shape) < 2:
            not_matrices.append(difference.name)
        else:
            updates.append(matrix_update(difference.name, difference.delta.flatten(1), sketch_rank))
    if not updates and not not_matrices:
        raise ModelError(f"{finetuned}: every tensor is equal to that of {base}; give a fine-tuned model of this base")
    modules = flag_dead([describe(update) for update in updates])
    about = InspectionInfo(
        "checkpoints",
        "none",
        str(base),
        sum(update.parameters for update in updates),
        unchanged=unchanged,
        not_matrices=tuple(not_matrices),
    )
    return Inspection(modules=modules, summary=summarise(modules, about))


def require_alike(before: WeightFolder, after: WeightFolder) -> None:
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


def differences(before: WeightFolder, after: WeightFolder) -> Iterator[Difference]:
    """The change of every floating-point tensor, in the natural order of names.

    Raises:
        ModelError: a value that is NaN or infinite.
    """
    for name in sorted(before.files, key=natural_order):
        old, new = before.tensor(name), after.tensor(name)
        if not old.is_floating_point():
            continue
        if torch.equal(old, new.to(old.dtype)) and torch.equal(new, old.to(new.dtype)):
            yield Difference(name, before.shapes[name], None)
            continue
        delta = _subtracted(new, old)
        del old, new
        if not all(torch.isfinite(bound) for bound in torch.aminmax(delta)):  # without the copy that isfinite makes
            raise ModelError(
                f"{name}: NaN or infinite values in {before.path} or {after.path}; give an undamaged checkpoint"
            )
        yield Difference(name, before.shapes[name], delta)


def _subtracted(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """`new - old` in float32, a block of rows at a time, without a whole float32 copy of either."""
    if new.dim() == 0:
        return new.float() - old.float()
    delta = torch.empty(new.shape, dtype=torch.float32)
    for start in range(0, len(new), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        torch.sub(new[rows].float(), old[rows].float(), out=delta[rows])
    return delta


def matrix_update(name: str, delta: torch.Tensor, sketch_rank: int) -> Update:
    """The record of one difference: all singular values up to a shorter side of EXACT_SIDE, else the leading ones."""
    energy = float(delta.double().square().sum()) if delta.numel() < 2**22 else _energy(delta)
    if min(delta.shape) <= EXACT_SIDE:
        values = exact_values(delta)
        energy = float(np.sum(values**2))
    else:
        values = sketched_svd(delta, sketch_rank)[1].numpy()
    return Update(
        name=name.removesuffix(".weight"),
        kind="matrix",
        shape=(delta.shape[0], delta.shape[1]),
        rank=min(delta.shape),
        scaling=1.0,
        values=values,
        energy=energy,
        parameters=delta.numel(),
    )


def exact_values(delta: torch.Tensor) -> Floats:
    """All singular values, by the R of a QR decomposition of the taller orientation."""
    tall = delta if delta.shape[0] >= delta.shape[1] else delta.T
    triangle = torch.linalg.qr(tall, mode="r").R.double()
    values: Floats = torch.linalg.svdvals(triangle).numpy()
    return values


def sketched_svd(delta: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The leading `(U [d, rank], s [rank], Vᵀ [rank, k])` of `delta` [d, k]; the small matrix QᵀΔ is decomposed in
    float64."""
    width = min(rank + OVERSAMPLING, *delta.shape)
    probe = torch.randn(delta.shape[1], width, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(delta @ probe).Q
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(delta.T @ basis).Q
        basis = torch.linalg.qr(delta @ basis).Q
    small = (basis.T @ delta).double()
    u, s, vt = torch.linalg.svd(small, full_matrices=False)
    kept = min(rank, len(s))
    return basis.double() @ u[:, :kept], s[:kept], vt[:kept]


def _energy(delta: torch.Tensor) -> float:
    """‖Δ‖²_F in float64, a block of rows at a time."""
    rows = max(1, 2**22 // delta.shape[1])
    blocks = (delta[start : start + rows] for start in range(0, len(delta), rows))
    return float(sum(float(block.double().square().sum()) for block in blocks))


def inspect_gradient(model: str, data: Path, settings: SelectSettings, sketch_rank: int) -> Inspection:
    """The spectra of the gradient of the mean training loss over the first examples, of the settings' target modules.

    Raises:
        InputError: the model, the data or a module name cannot be used.
    """
    with tempfile.TemporaryDirectory(prefix="rightrank-") as name:
        runtime = make_runtime(model, None, DataUse(data, settings, Path(name)))
        shapes = {target.name: target for target in runtime.targets.modules}
        gradients = weight_gradients(runtime, list(shapes))
    updates = []
    for module, gradient in gradients.items():
        target = shapes[module]
        # Conv1D stores its weight as in × out
        matrix = gradient if gradient.shape[0] == target.out_features else gradient.T
        updates.append(matrix_update(module, matrix.float(), sketch_rank))
    modules = flag_dead([describe(update) for update in updates])
    note = f"mean loss over the first {min(GRADIENT_EXAMPLES, len(runtime.examples('train')))} training examples, base without adapter"
    about = InspectionInfo("gradient", "none", model, sum(update.parameters for update in updates), notes=(note,))
    return Inspection(modules=modules, summary=summarise(modules, about))
