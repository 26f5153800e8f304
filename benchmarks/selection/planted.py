"""Planted truth: a small transformer plus a planted update of known rank is the teacher, and every rank × learning rate × seed
of LoRA students is trained against it.

All students of a teacher train at once, as one batch of matrices. The planted rank is an upper bound on the answer;
the exhaustive grid is the truth. Values are the held-out Kullback-Leibler divergence from the teacher, nats a token.

    python -m benchmarks.selection.planted --count 64 --out benchmarks/selection/planted_grids.json

Finished teachers are kept in OUT: the same command resumes.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

Tensor = torch.Tensor

WIDTH, FEED_FORWARD, VOCABULARY, LAYERS, HEADS = 32, 64, 32, 2, 4
SHAPES = {"q": (32, 32), "k": (32, 32), "v": (32, 32), "o": (32, 32), "up": (64, 32), "down": (32, 64)}
RANKS = (1, 2, 4, 8, 16)
RATES = (2e-3, 6e-3, 2e-2, 6e-2)
SEEDS = (0, 1)
ALPHA = 16.0
BATCH, LENGTH = 12, 8  # sequences, tokens
HELD_OUT = 192  # sequences
CHECKPOINTS = (0.25, 0.5)  # parts of a training after which students are also evaluated
RECOVERY_RATE = 0.3  # of the learning rate that the truncated student was trained at
RECOVERY = 0.1  # further steps after a truncation, a part of a training
PLANTED_RANKS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24)


@dataclass(frozen=True)
class Teacher:
    """What is planted, and how it is taught."""

    number: int
    planted_rank: int
    spectrum: str  # flat, geometric or power
    gain: float  # Frobenius norm of the update over that of the weight
    placement: str  # even; or uneven: the last layer alone has the full rank, the others a quarter
    labels: str  # soft: the teacher's distribution; sampled: one label each; few: sampled, from few sequences
    steps: int

    @property
    def name(self) -> str:
        return f"planted_{self.number:02d}_r{self.planted_rank}_{self.spectrum}_{self.placement}_{self.labels}"


def teachers(count: int) -> list[Teacher]:
    """The first `count` teachers: planted ranks in turn, everything else drawn from one seed."""
    generator = np.random.default_rng(20)
    found = []
    for number in range(count):
        found.append(
            Teacher(
                number=number,
                planted_rank=PLANTED_RANKS[number % len(PLANTED_RANKS)],
                spectrum=str(generator.choice(["flat", "geometric", "power"])),
                gain=float(generator.choice([0.15, 0.3, 0.6])),
                placement=str(generator.choice(["even", "uneven"])),
                labels=str(generator.choice(["soft", "sampled", "few"], p=[0.5, 0.3, 0.2])),
                steps=int(generator.choice([150, 300])),
            )
        )
    return found


def base_weights(number: int) -> dict[str, Tensor]:
    """The frozen base of a teacher: random weights at a scale that makes confident predictions."""
    generator = torch.Generator().manual_seed(1000 + number)
    weights = {
        "embedding": torch.randn(VOCABULARY, WIDTH, generator=generator),
        "position": torch.randn(LENGTH, WIDTH, generator=generator) * 0.5,
        "head": torch.randn(VOCABULARY, WIDTH, generator=generator) * 1.5 / WIDTH**0.5,
    }
    for layer in range(LAYERS):
        for name, (rows, columns) in SHAPES.items():
            weights[f"{layer}.{name}"] = torch.randn(rows, columns, generator=generator) * 1.5 / columns**0.5
    return weights


def planted_update(teacher: Teacher, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """ΔW of every adapted matrix, of the teacher's rank (less where its placement is uneven)."""
    generator = torch.Generator().manual_seed(2000 + teacher.number)
    update = {}
    for name in matrices():
        rank = teacher.planted_rank
        if teacher.placement == "uneven" and not name.startswith(str(LAYERS - 1)):
            rank = rank // 4
        rows, columns = weights[name].shape
        u, _ = torch.linalg.qr(torch.randn(rows, rows, generator=generator))
        v, _ = torch.linalg.qr(torch.randn(columns, columns, generator=generator))
        sigma = spectrum(teacher.spectrum, rank)
        if rank:
            sigma = sigma / sigma.norm() * teacher.gain * weights[name].norm()
        update[name] = (u[:, :rank] * sigma) @ v[:, :rank].T
    return update


def spectrum(kind: str, rank: int) -> Tensor:
    order = torch.arange(1, rank + 1, dtype=torch.float32)
    if kind == "flat":
        return torch.ones(rank)
    return 0.7**order if kind == "geometric" else 1 / order


def matrices() -> list[str]:
    return [f"{layer}.{name}" for layer in range(LAYERS) for name in SHAPES]


def logits(weights: dict[str, Tensor], tokens: Tensor, delta: dict[str, Tensor]) -> Tensor:
    """tokens [M, B, T], delta of each matrix [M, out, in] → logits [M, B, T, V] of M models at once."""
    models, batch, length = tokens.shape
    x = (weights["embedding"][tokens] + weights["position"][:length]).reshape(models, batch * length, WIDTH)

    def linear(name: str, value: Tensor) -> Tensor:
        return torch.bmm(value, (weights[name] + delta[name]).transpose(1, 2))

    mask = torch.full((length, length), -1e9).triu(1)
    for layer in range(LAYERS):
        normal = torch.nn.functional.layer_norm(x, (WIDTH,))
        q, k, v = (
            linear(f"{layer}.{name}", normal)
            .view(models * batch, length, HEADS, WIDTH // HEADS)
            .transpose(1, 2)
            .reshape(models * batch * HEADS, length, WIDTH // HEADS)
            for name in "qkv"
        )
        scores = torch.softmax(torch.baddbmm(mask, q, k.transpose(1, 2), alpha=(WIDTH // HEADS) ** -0.5), -1)
        mixed = torch.bmm(scores, v).view(models * batch, HEADS, length, WIDTH // HEADS).transpose(1, 2)
        x = x + linear(f"{layer}.o", mixed.reshape(models, batch * length, WIDTH)) / 2
        hidden = torch.relu(linear(f"{layer}.up", torch.nn.functional.layer_norm(x, (WIDTH,))))
        x = x + linear(f"{layer}.down", hidden) / 2
    x = torch.nn.functional.layer_norm(x, (WIDTH,))
    return (x @ weights["head"].T).view(models, batch, length, VOCABULARY)


@dataclass(frozen=True)
class Students:
    """The arms of a batch: parallel lists."""

    ranks: list[int]
    rates: list[float]
    seeds: list[int]

    def __len__(self) -> int:
        return len(self.ranks)


def all_students() -> Students:
    cells = [(rank, rate, seed) for rank in RANKS for rate in RATES for seed in SEEDS]
    return Students([c[0] for c in cells], [c[1] for c in cells], [c[2] for c in cells])


class Data:
    """Batches of a teacher, by seed; and its held-out sequences."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher
        self.weights = base_weights(teacher.number)
        self.update = {name: value[None] for name, value in planted_update(teacher, self.weights).items()}
        generator = torch.Generator().manual_seed(3000 + teacher.number)
        self.held_out = torch.randint(VOCABULARY, (1, HELD_OUT, LENGTH), generator=generator)
        self.held_out_log_p = torch.log_softmax(logits(self.weights, self.held_out, self.update), -1)
        few = torch.randint(VOCABULARY, (1, 160, LENGTH), generator=generator)
        self.few = few, self._labels(few, generator)

    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """tokens [1, B, T] and target distributions [1, B, T, V]; the same for every student of a seed."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step * 17 + self.teacher.number)
        if self.teacher.labels == "few":
            chosen = torch.randint(self.few[0].shape[1], (BATCH,), generator=generator)
            return self.few[0][:, chosen], self.few[1][:, chosen]
        tokens = torch.randint(VOCABULARY, (1, BATCH, LENGTH), generator=generator)
        return tokens, self._labels(tokens, generator)

    def _labels(self, tokens: Tensor, generator: torch.Generator) -> Tensor:
        p = torch.softmax(logits(self.weights, tokens, self.update), -1)
        if self.teacher.labels == "soft":
            return p
        sampled = torch.multinomial(p.reshape(-1, VOCABULARY), 1, generator=generator)
        return torch.nn.functional.one_hot(sampled, VOCABULARY).float().reshape(p.shape)

    @torch.no_grad()
    def evaluate(self, delta: dict[str, Tensor]) -> list[float]:
        """Held-out divergence of each model of `delta`, nats a token."""
        models = next(iter(delta.values())).shape[0]
        values = []
        for index in range(models):
            one = {name: value[index : index + 1] for name, value in delta.items()}
            log_q = torch.log_softmax(logits(self.weights, self.held_out, one), -1)
            values.append(float((self.held_out_log_p.exp() * (self.held_out_log_p - log_q)).sum(-1).mean()))
        return values


def train(
    data: Data, students: Students, start: dict[str, tuple[Tensor, Tensor]], first: int, steps: int
) -> tuple[dict[str, tuple[Tensor, Tensor]], list[list[float]]]:
    """Adam with linear decay from step `first` for `steps` steps; the adapters, and values at CHECKPOINTS."""
    adapters = {name: (a.clone().requires_grad_(), b.clone().requires_grad_()) for name, (a, b) in start.items()}
    parameters = [tensor for pair in adapters.values() for tensor in pair]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    rates, scale = torch.tensor(students.rates)[:, None, None], scale_of(students)
    seeds = sorted(set(students.seeds))
    index = torch.tensor([seeds.index(seed) for seed in students.seeds])
    checkpoints: list[list[float]] = []
    for step in range(steps):
        batches = [data.batch(seed, first + step) for seed in seeds]
        tokens, targets = (torch.cat(parts)[index] for parts in zip(*batches, strict=True))
        log_q = torch.log_softmax(logits(data.weights, tokens, deltas(adapters, scale)), -1)
        losses = -(targets * log_q).sum(-1).mean((1, 2))
        gradients = torch.autograd.grad(losses.sum(), parameters)
        norms = torch.stack([(g**2).sum((1, 2)) for g in gradients]).sum(0).sqrt()[:, None, None]
        factor = min(1.0, (step + 1) / (0.05 * steps)) * (1 - step / steps)
        with torch.no_grad():
            for parameter, gradient, (m, v) in zip(parameters, gradients, moments, strict=True):
                clipped = gradient / norms.clamp(min=1.0)
                m.mul_(0.9).add_(clipped, alpha=0.1)
                v.mul_(0.999).addcmul_(clipped, clipped, value=0.001)
                m_hat, v_hat = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
                parameter.sub_(rates * factor * m_hat / (v_hat.sqrt() + 1e-8))
        if step + 1 in [round(part * steps) for part in CHECKPOINTS]:
            checkpoints.append(data.evaluate(deltas(adapters, scale)))
    return {name: (a.detach(), b.detach()) for name, (a, b) in adapters.items()}, checkpoints


def scale_of(students: Students) -> Tensor:
    """alpha/r of each student, [M, 1, 1]."""
    return torch.tensor([ALPHA / rank for rank in students.ranks])[:, None, None]


def deltas(adapters: dict[str, tuple[Tensor, Tensor]], scale: Tensor) -> dict[str, Tensor]:
    """s·B·A of every student."""
    return {name: scale * torch.bmm(b, a) for name, (a, b) in adapters.items()}


def initial(students: Students) -> dict[str, tuple[Tensor, Tensor]]:
    """A uniform, the first r rows of one draw a seed; B zero. Rows past r are zero and stay so: their gradients are."""
    found = {}
    for position, name in enumerate(matrices()):
        rows, columns = SHAPES[name.split(".")[1]]
        a = torch.zeros(len(students), max(RANKS), columns)
        for index, (rank, seed) in enumerate(zip(students.ranks, students.seeds, strict=True)):
            generator = torch.Generator().manual_seed(7_919 * seed + position)
            a[index, :rank] = ((torch.rand(max(RANKS), columns, generator=generator) * 2 - 1) / columns**0.5)[:rank]
        found[name] = a, torch.zeros(len(students), rows, max(RANKS))
    return found


def truncations(
    adapters: dict[str, tuple[Tensor, Tensor]], students: Students
) -> tuple[Students, dict[str, tuple[Tensor, Tensor]], list[list[float]]]:
    """The top-rank students cut to every rank by their singular values; and the singular values, [top][matrix, r]."""
    tops = [index for index, rank in enumerate(students.ranks) if rank == max(RANKS)]
    cut = Students(
        [rank for _ in tops for rank in RANKS],
        [students.rates[top] for top in tops for _ in RANKS],
        [students.seeds[top] for top in tops for _ in RANKS],
    )
    pairs = {}
    energies = [[0.0] * max(RANKS) for _ in tops]
    products = deltas(adapters, scale_of(students))
    for name in adapters:
        u, sigma, vt = torch.linalg.svd(products[name][tops], full_matrices=False)
        a = torch.zeros(len(cut), max(RANKS), vt.shape[2])
        b = torch.zeros(len(cut), u.shape[1], max(RANKS))
        for index, rank in enumerate(cut.ranks):
            top = index // len(RANKS)
            half = (sigma[top, :rank] * rank / ALPHA).sqrt()
            a[index, :rank] = half[:, None] * vt[top, :rank]
            b[index, :, :rank] = u[top, :, :rank] * half
        pairs[name] = a, b
        for top in range(len(tops)):
            for order in range(max(RANKS)):
                energies[top][order] += float(sigma[top, order] ** 2)
    return cut, pairs, energies


def nested(rank_lists: Students, values: list[float], digits: int = 6) -> dict[str, Any]:
    """{rank: {rate: {seed: value}}}, numbers rounded."""
    found: dict[str, Any] = {}
    for rank, rate, seed, value in zip(rank_lists.ranks, rank_lists.rates, rank_lists.seeds, values, strict=True):
        found.setdefault(str(rank), {}).setdefault(f"{rate:g}", {})[str(seed)] = round(value, digits)
    return found


def mean_over_seeds(grid: dict[str, Any]) -> dict[str, Any]:
    return {
        rank: {rate: round(float(np.mean(list(by_seed.values()))), 6) for rate, by_seed in by_rate.items()}
        for rank, by_rate in grid.items()
    }


def curve(teacher: Teacher) -> dict[str, Any]:
    """The whole grid of a teacher, with what cheaper methods would see of it."""
    begun = time.perf_counter()
    data, students = Data(teacher), all_students()
    adapters, checkpoints = train(data, students, initial(students), 0, teacher.steps)
    values = data.evaluate(deltas(adapters, scale_of(students)))
    cut, pairs, energies = truncations(adapters, students)
    truncated = data.evaluate(deltas(pairs, scale_of(cut)))
    gentle = Students(cut.ranks, [rate * RECOVERY_RATE for rate in cut.rates], cut.seeds)
    recovered_pairs, _ = train(data, gentle, pairs, teacher.steps, round(RECOVERY * teacher.steps))
    recovered = data.evaluate(deltas(recovered_pairs, scale_of(cut)))
    grid = nested(students, values)
    base = data.evaluate({name: torch.zeros_like(value) for name, value in data.update.items()})[0]
    tops = [index for index, rank in enumerate(students.ranks) if rank == max(RANKS)]
    return {
        "id": teacher.name,
        "family": "planted",
        "source": "benchmarks/selection/planted.py",
        "teacher": asdict(teacher),
        "ranks": list(RANKS),
        "higher_is_better": False,
        "base": round(base, 6),
        "lr_grid": mean_over_seeds(grid),
        "seed_grid": grid,
        "checkpoints": {
            f"{part:g}": nested(students, found) for part, found in zip(CHECKPOINTS, checkpoints, strict=True)
        },
        "truncation_grid": nested(cut, truncated),
        "recovery_grid": nested(cut, recovered),
        "recovery_part": RECOVERY,
        "energy": {
            f"{students.rates[top]:g}": {
                str(students.seeds[top]): [round(e / sum(found), 5) if sum(found) else 0.0 for e in found]
            }
            for top, found in zip(tops, energies, strict=True)
            if students.seeds[top] == SEEDS[0]
        },
        "seconds": round(time.perf_counter() - begun, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    curves = json.loads(arguments.out.read_text())["curves"] if arguments.out.exists() else []
    done = {found["id"] for found in curves}
    for teacher in teachers(arguments.count):
        if teacher.name in done:
            continue
        curves.append(curve(teacher))
        temporary = arguments.out.with_suffix(".tmp")
        temporary.write_text(json.dumps({"curves": curves}, separators=(",", ":")))
        temporary.replace(arguments.out)
        print(teacher.name, curves[-1]["seconds"], "s", flush=True)


if __name__ == "__main__":
    main()
