"""One linear layer, where the right rank is known in closed form.

y = (W + ΔW)x with x ~ N(0, I): the smallest excess risk of rank r is half the sum of ΔW's squared singular values beyond
the r-th. Students are LoRA pairs that Adam trains on fresh batches; every rank × learning rate × seed is trained, and the
optimum of each rank is stored beside what training reached.

    python -m benchmarks.selection.linear --out benchmarks/selection/linear_grids.json

Minutes on one core. Values are excess risk, computed exactly from the weights: nothing is sampled in an evaluation.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

WIDTH = 48
RANKS = (1, 2, 4, 8, 16, 32)
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
SEEDS = (0, 1)
STEPS, BATCH = 400, 32
ALPHA = 16.0
CHECKPOINTS = (0.25, 0.5)
RISK = 1.0  # of the base: half the squared Frobenius norm of ΔW
SPECTRA = ("flat", "geometric", "power")
PLANTED_RANKS = (1, 3, 6, 12, 24, 48)
NOISES = (0.0, 0.5)  # standard deviation of the labels


@dataclass(frozen=True)
class Layer:
    spectrum: str
    planted_rank: int
    noise: float

    @property
    def name(self) -> str:
        return f"linear_r{self.planted_rank}_{self.spectrum}_noise{self.noise:g}"


def layers() -> list[Layer]:
    return [Layer(spectrum, rank, noise) for noise in NOISES for spectrum in SPECTRA for rank in PLANTED_RANKS]


def singular_values(layer: Layer) -> torch.Tensor:
    """Descending, scaled so that the base's risk is `RISK`."""
    order = torch.arange(1, layer.planted_rank + 1, dtype=torch.float32)
    found = {"flat": torch.ones_like(order), "geometric": 0.7**order, "power": 1 / order}[layer.spectrum]
    return found / found.norm() * (2 * RISK) ** 0.5


def optimal_risk(layer: Layer, rank: int) -> float:
    """The smallest excess risk that a rank can have (Eckart and Young)."""
    return float((singular_values(layer)[rank:] ** 2).sum() / 2)


def planted(layer: Layer) -> torch.Tensor:
    generator = torch.Generator().manual_seed(layer.planted_rank)
    u, _ = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))
    v, _ = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))
    rank = layer.planted_rank
    return (u[:, :rank] * singular_values(layer)) @ v[:, :rank].T


def train(layer: Layer, rank: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Every learning rate × seed of a rank at once: risks [learning rate × seed] at CHECKPOINTS and at the end; products [learning rate × seed, W, W].

    Students of one seed see the same batches.
    """
    target = planted(layer)
    rates = torch.tensor([rate for rate in RATES for _ in SEEDS])[:, None, None]
    starts = [torch.randn(max(RANKS), WIDTH, generator=torch.Generator().manual_seed(seed))[:rank] for seed in SEEDS]
    a = (torch.stack(starts) / WIDTH**0.5).repeat(len(RATES), 1, 1).requires_grad_()
    b = torch.zeros(len(rates), WIDTH, rank).requires_grad_()
    optimizer = torch.optim.Adam([{"params": [a]}, {"params": [b]}], lr=1.0)
    streams = [torch.Generator().manual_seed(10_000 + seed) for seed in SEEDS]
    scale, risks = ALPHA / rank, []
    for step in range(STEPS):
        drawn = [torch.randn(2, BATCH, WIDTH, generator=stream) for stream in streams]
        x = torch.stack([pair[0] for pair in drawn]).repeat(len(RATES), 1, 1)
        noise = layer.noise * torch.stack([pair[1] for pair in drawn]).repeat(len(RATES), 1, 1)
        error = x @ a.mT @ b.mT * scale - x @ target.T - noise
        optimizer.zero_grad()
        ((error**2).sum(2).mean(1) / 2).sum().backward()
        before = a.detach().clone(), b.detach().clone()
        optimizer.step()
        with torch.no_grad():  # Adam's step at learning rate 1, times each student's own learning rate
            for tensor, old in zip((a, b), before, strict=True):
                tensor.copy_(old + (tensor - old) * rates * (1 - step / STEPS))
        if step + 1 in [round(part * STEPS) for part in (*CHECKPOINTS, 1.0)]:
            risks.append(risk(scale * b @ a, target))
    return risks, (scale * b @ a).detach()


def risk(products: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """[M, W, W] → [M] excess risks."""
    return ((products.detach() - target) ** 2).sum((1, 2)) / 2


def place(grid: dict[str, Any], rank: int, values: torch.Tensor) -> None:
    for index, value in enumerate(values.tolist()):
        rate, seed = RATES[index // len(SEEDS)], SEEDS[index % len(SEEDS)]
        grid.setdefault(str(rank), {}).setdefault(f"{rate:g}", {})[str(seed)] = round(value, 6)


def curve(layer: Layer) -> dict[str, Any]:
    grid: dict[str, Any] = {}
    ways: dict[str, Any] = {f"{part:g}": {} for part in CHECKPOINTS}
    cuts: dict[str, Any] = {}
    for rank in RANKS:
        risks, products = train(layer, rank)
        for into, values in zip((*ways.values(), grid), risks, strict=True):
            place(into, rank, values)
        if rank == max(RANKS):
            u, sigma, vt = torch.linalg.svd(products)
            for lower in RANKS:
                cut = (u[:, :, :lower] * sigma[:, None, :lower]) @ vt[:, :lower]
                place(cuts, lower, risk(cut, planted(layer)))
    return {
        "id": layer.name,
        "family": "linear",
        "source": "benchmarks/selection/linear.py",
        "layer": asdict(layer),
        "ranks": list(RANKS),
        "higher_is_better": False,
        "base": round(optimal_risk(layer, 0), 6),
        "optimum": {str(rank): round(optimal_risk(layer, rank), 6) for rank in RANKS},
        "seed_grid": grid,
        "lr_grid": {
            rank: {rate: round(sum(by_seed.values()) / len(by_seed), 6) for rate, by_seed in by_rate.items()}
            for rank, by_rate in grid.items()
        },
        "checkpoints": ways,
        "truncation_grid": cuts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    curves = [curve(layer) for layer in layers()]
    options.out.write_text(json.dumps({"curves": curves}, separators=(",", ":")) + "\n")
    print(len(curves), "grids")


if __name__ == "__main__":
    main()
