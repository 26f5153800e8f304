"""Planted truth: a small transformer plus a planted update of known rank is the teacher, and every rank × learning rate × seed
of LoRA students is trained against it.

All students of a teacher train at once, as one batch of matrices. The planted rank is an upper bound on the answer;
the exhaustive grid is the truth. Values are the held-out Kullback-Leibler divergence from the teacher, nats a token.

    python -m benchmarks.selection.planted --first 64 --count 40 --out benchmarks/selection/planted_new_grids.json

Finished teachers are kept in OUT: the same command resumes. `planted_grids.json` holds teachers 0 to 63, on which rules were found; they
were made before the looks at an eighth, with two seeds, and with recovery of a tenth of a training at .3 of the learning rate.
`planted_new_grids.json` holds teachers that chose nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rightrank.search.learning_rates import ANNEAL, LOOK

Tensor = torch.Tensor

WIDTH, FEED_FORWARD, VOCABULARY, LAYERS, HEADS = 32, 64, 32, 2, 4
SHAPES = {"q": (32, 32), "k": (32, 32), "v": (32, 32), "o": (32, 32), "up": (64, 32), "down": (32, 64)}
RANKS = (1, 2, 4, 8, 16)
RATES = (2e-3, 6e-3, 2e-2, 6e-2)
SEEDS = (0, 1, 2)
ALPHA = 16.0
BATCH, LENGTH = 12, 8  # sequences, tokens
HELD_OUT = 192  # sequences of each held-out split
CHECKPOINTS = (LOOK, 0.25, 0.5)  # parts of a training after which students are also evaluated
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
        self.splits = {name: self._held_out(generator) for name in ("validation", "test")}
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

    def _held_out(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Sequences and the teacher's log-probabilities of the next tokens."""
        tokens = torch.randint(VOCABULARY, (1, HELD_OUT, LENGTH), generator=generator)
        return tokens, torch.log_softmax(logits(self.weights, tokens, self.update), -1)

    @torch.no_grad()
    def evaluate(self, delta: dict[str, Tensor], split: str = "validation") -> list[float]:
        """Held-out divergence of each model of `delta`, nats a token."""
        models = next(iter(delta.values())).shape[0]
        tokens, log_p = self.splits[split]
        values = []
        for index in range(models):
            one = {name: value[index : index + 1] for name, value in delta.items()}
            log_q = torch.log_softmax(logits(self.weights, tokens, one), -1)
            values.append(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()))
        return values


Adapters = dict[str, tuple[Tensor, Tensor]]


class Training:
    """Adam over all students at once."""

    def __init__(self, data: Data, students: Students, start: Adapters) -> None:
        self._data, self._students = data, students
        self.adapters = {
            name: (a.clone().requires_grad_(), b.clone().requires_grad_()) for name, (a, b) in start.items()
        }
        self._moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self._parameters()]
        self._updates = 0
        self._learning_rates = torch.tensor(students.rates)[:, None, None]
        self._scale = scale_of(students)
        self.follow(students.seeds)

    def follow(self, seeds: Sequence[int]) -> None:
        """From here on, each student reads the batches of its seed here."""
        self._seeds = sorted(set(seeds))
        self._index = torch.tensor([self._seeds.index(seed) for seed in seeds])

    def copy(self) -> Training:
        """With its own adapters and optimizer state."""
        found = Training(self._data, self._students, self.detached())
        found._moments = [(m.clone(), v.clone()) for m, v in self._moments]
        found._updates = self._updates
        return found

    def step(self, number: int, factor: float) -> None:
        """One step on batch `number`, at this factor of every student's learning rate."""
        batches = [self._data.batch(seed, number) for seed in self._seeds]
        tokens, targets = (torch.cat(parts)[self._index] for parts in zip(*batches, strict=True))
        log_q = torch.log_softmax(logits(self._data.weights, tokens, self.products(self.adapters)), -1)
        losses = -(targets * log_q).sum(-1).mean((1, 2))
        parameters = self._parameters()
        gradients = torch.autograd.grad(losses.sum(), parameters)
        norms = torch.stack([(g**2).sum((1, 2)) for g in gradients]).sum(0).sqrt()[:, None, None]
        self._updates += 1
        with torch.no_grad():
            for parameter, gradient, (m, v) in zip(parameters, gradients, self._moments, strict=True):
                clipped = gradient / norms.clamp(min=1.0)
                m.mul_(0.9).add_(clipped, alpha=0.1)
                v.mul_(0.999).addcmul_(clipped, clipped, value=0.001)
                m_hat, v_hat = m / (1 - 0.9**self._updates), v / (1 - 0.999**self._updates)
                parameter.sub_(self._learning_rates * factor * m_hat / (v_hat.sqrt() + 1e-8))

    def values(self) -> list[float]:
        return self._data.evaluate(self.products(self.detached()))

    def products(self, adapters: Adapters) -> dict[str, Tensor]:
        """The update of every student."""
        return deltas(adapters, self._scale)

    def detached(self) -> Adapters:
        return {name: (a.detach(), b.detach()) for name, (a, b) in self.adapters.items()}

    def _parameters(self) -> list[Tensor]:
        return [tensor for pair in self.adapters.values() for tensor in pair]


@dataclass(frozen=True)
class Looks:
    """What a training shows before its end, by student."""

    checkpoints: dict[float, list[float]]  # part of a training → values
    averaged: list[float]  # of the running mean over the second half of the steps to LOOK
    annealed: list[float]  # of copies from LOOK on, whose learning rate decays to 0 over ANNEAL of a training


def train(data: Data, students: Students, start: Adapters, steps: int) -> tuple[Adapters, Looks]:
    """Train for `steps` with a warmup of 5% and a linear decay."""
    training = Training(data, students, start)
    checkpoints: dict[float, list[float]] = {}
    look = round(LOOK * steps)
    mean: Adapters = {}
    averaged: list[float] = []
    annealed: list[float] = []
    for step in range(steps):
        training.step(step, min(1.0, (step + 1) / (0.05 * steps)) * (1 - step / steps))
        done = step + 1
        if look // 2 < done <= look:
            mean = running_mean(mean, training.detached(), done - look // 2)
        for part in CHECKPOINTS:
            if done == round(part * steps):
                checkpoints[part] = training.values()
        if done == look:
            averaged = data.evaluate(deltas(mean, scale_of(students)))
            annealed = annealed_values(training.copy(), look, round(ANNEAL * steps), 1 - step / steps)
    return training.detached(), Looks(checkpoints, averaged, annealed)


def running_mean(mean: Adapters, adapters: Adapters, count: int) -> Adapters:
    """The mean of `count` states of A and of B, the last of which is `adapters`."""
    if count == 1:
        return {name: (a.clone(), b.clone()) for name, (a, b) in adapters.items()}
    return {
        name: (mean[name][0] + (a - mean[name][0]) / count, mean[name][1] + (b - mean[name][1]) / count)
        for name, (a, b) in adapters.items()
    }


def annealed_values(copy: Training, first: int, steps: int, factor: float) -> list[float]:
    for step in range(steps):
        copy.step(first + step, factor * (1 - step / steps))
    return copy.values()


def scale_of(students: Students) -> Tensor:
    """alpha/r of each student, [M, 1, 1]."""
    return torch.tensor([ALPHA / rank for rank in students.ranks])[:, None, None]


def deltas(adapters: Adapters, scale: Tensor) -> dict[str, Tensor]:
    """s·B·A of every student."""
    return {name: scale * torch.bmm(b, a) for name, (a, b) in adapters.items()}


def initial(students: Students) -> Adapters:
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


def truncations(adapters: Adapters, students: Students) -> tuple[Students, Adapters, list[list[float]]]:
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
    adapters, looks = train(data, students, initial(students), teacher.steps)
    cut, pairs, energies = truncations(adapters, students)
    kinds = {"trained": (students, adapters), "truncated": (cut, pairs)}
    grids = {
        split: {
            kind: nested(who, data.evaluate(deltas(them, scale_of(who)), split)) for kind, (who, them) in kinds.items()
        }
        for split in data.splits
    }
    validation = grids["validation"]
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
        "lr_grid": mean_over_seeds(validation["trained"]),
        "seed_grid": validation["trained"],
        "checkpoints": {f"{part:g}": nested(students, found) for part, found in looks.checkpoints.items()},
        "averaged": {f"{LOOK:g}": nested(students, looks.averaged)},
        "annealed": {f"{LOOK:g}": nested(students, looks.annealed)},
        "truncation_grid": validation["truncated"],
        "test_grids": grids["test"],
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
    parser.add_argument("--first", type=int, default=64, help="number of the first teacher")
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    curves = json.loads(arguments.out.read_text())["curves"] if arguments.out.exists() else []
    done = {found["id"] for found in curves}
    for teacher in teachers(arguments.first + arguments.count)[arguments.first :]:
        if teacher.name in done:
            continue
        curves.append(curve(teacher))
        temporary = arguments.out.with_suffix(".tmp")
        temporary.write_text(json.dumps({"curves": curves}, separators=(",", ":")))
        temporary.replace(arguments.out)
        print(teacher.name, curves[-1]["seconds"], "s", flush=True)


if __name__ == "__main__":
    main()
