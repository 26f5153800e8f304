"""Does the spectrum of the first gradient name the rank? On the planted teachers, before any training.

    python -m benchmarks.selection.priors --out benchmarks/selection/priors.json

The gradient of the loss to every adapted matrix at the base, over 16 batches; the rank is the smallest that holds a
share of its squared singular values, summed over matrices. Compared with the whole grid's pick.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from benchmarks.machine import machine
from benchmarks.selection.planted import RANKS, Data, Teacher, logits, teachers
from benchmarks.selection.tables import read_grids

BATCHES = 16
SHARES = (0.5, 0.8, 0.9, 0.95, 0.99)
MARGINS = (0.002, 0.005, 0.02)
HERE = Path(__file__).parent


def gradient_energy(teacher: Teacher) -> np.ndarray:
    """Shares of the squared singular values by order, summed over matrices, cumulated."""
    data = Data(teacher)
    delta = {name: torch.zeros_like(value).requires_grad_() for name, value in data.update.items()}
    loss = torch.zeros(())
    for step in range(BATCHES):
        tokens, targets = data.batch(0, step)
        loss = loss - (targets * torch.log_softmax(logits(data.weights, tokens, delta), -1)).sum(-1).mean()
    gradients = torch.autograd.grad(loss, list(delta.values()))
    energies = [torch.linalg.svdvals(gradient[0])[:32] ** 2 for gradient in gradients]
    total = torch.stack(energies).sum(0).numpy()
    return np.asarray(np.cumsum(total) / total.sum())


def named_rank(cumulated: np.ndarray, share: float) -> int:
    """The smallest rank of the grid that holds the share; the top where none does."""
    needed = int(np.searchsorted(cumulated, share)) + 1
    return next((rank for rank in RANKS if rank >= needed), max(RANKS))


def compared() -> dict[str, Any]:
    curves = {curve.name: curve for curve in read_grids(HERE / "planted_grids.json")}
    spectra = {teacher.name: gradient_energy(teacher) for teacher in teachers(len(curves))}
    rows = []
    for margin in MARGINS:
        truths = {name: curve.truth(margin) for name, curve in curves.items()}
        most_common = max(set(truths.values()), key=list(truths.values()).count)
        for share in SHARES:
            picks = {name: named_rank(spectra[name], share) for name in curves}
            places = [RANKS.index(picks[name]) - RANKS.index(truths[name]) for name in curves]
            names = sorted(curves)
            needed = [float(np.searchsorted(spectra[name], share)) for name in names]
            rows.append(
                {
                    "margin": margin,
                    "share": share,
                    "exact": sum(place == 0 for place in places),
                    "exact_or_neighbour": sum(abs(place) <= 1 for place in places),
                    "below": sum(place < 0 for place in places),
                    "spearman": round(float(spearmanr(needed, [truths[name] for name in names]).statistic), 3),
                    "always_the_most_common": list(truths.values()).count(most_common),
                }
            )
    return {"machine": machine(), "grids": len(curves), "table": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = compared()
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    for row in found["table"]:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
