"""Train the grids of `README.md`: every rank and learning rate of a seed in shared passes over the last block of a base.

    python -m benchmarks.learning_rate.train_grids BASES DATA WORK OUT [--grids answers roles] [--seeds 3]

WORK keeps hidden states and trained adapters; OUT gets one file for each grid and seed as soon as it is complete, and the same
command continues where it stopped. It prints times and whether values are finite, and no value. `OUT/GRID_SEED.npz` holds:

    records      JSON: for each row of `validation` its kind, rank, learning rate, steps and number of trained steps
    validation   [records, examples] summed losses in thousandths (uint16; 65535 where a training diverged)
    test         the same for the records with `"test": true`, in their order
    scores       [test rows, examples] 0 or 1, where answers, labels or preferences can be right or wrong
    weights_*    label tokens of the examples; groups_*: groups of the examples
    train_losses [ranks x learning rates, steps]
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from benchmarks.learning_rate.bases import GEMMA, MINILM_L3, MINILM_L6, SMOLLM2, Base, load_base
from rightrank.adapters.rank_math import find_server_rank
from rightrank.adapters.truncation import Moments, allocate_ranks, decompose_update

RANKS = (4, 8, 16, 32, 64)
TRUNCATED_RANKS = (1, 2, 4, 8, 16, 32)
AVERAGED_RANKS = (4, 8, 16, 32, 64)
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
STEPS, BATCH = 400, 8
CHECKPOINTS = (0.125, 0.25, 0.5)
TRAIN_ROWS, VALIDATION_ROWS, TEST_ROWS = 3584, 512, 2048
MAX_GROUP_ROWS = 26  # rows of one group, so that a split has many groups
MAX_TOKENS, MAX_LABELS = 20, 6
VOCABULARY = 3072
ALPHA, WARMUP, MAX_NORM, BETA = 32, 0.05, 1.0, 0.1
MOMENT_STEPS = 40
EVAL_BATCH, ADAPTERS_PER_PASS = 32, 24
DIVERGED = 65535
TOP = max(RANKS)
GRIDS = {  # in the order of training
    "answers": SMOLLM2,
    "roles": MINILM_L6,
    "descriptions": SMOLLM2,
    "speakers": MINILM_L3,
    "words": GEMMA,
    "languages": MINILM_L3,
    "dialogues": GEMMA,
    "word_classes": MINILM_L6,
    "replies": SMOLLM2,
    "usages": SMOLLM2,
}
ROUNDS = ((0, 1, 2), (3,), (4,), (5,))


@dataclass(frozen=True)
class Example:
    """Sequences of token ids, the positions at which a loss is read, and the labels there."""

    sequences: list[tuple[list[int], list[int], list[int]]]
    group: str


@dataclass
class Task:
    """Encoded rows of a grid; splits are ranges of examples."""

    base: Base
    examples: list[Example]
    splits: Mapping[str, list[int]]
    is_preference: bool
    classes: int  # 0: a language model
    head: torch.Tensor  # [vocabulary, hidden]
    hidden: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # [sequences, t, hidden]
    reference: torch.Tensor = field(
        default_factory=lambda: torch.empty(0)
    )  # [sequences] log-probabilities under the base

    @property
    def per_example(self) -> int:
        return 2 if self.is_preference else 1

    def weights(self, indices: Sequence[int]) -> torch.Tensor:
        """Return what the summed loss of each example is divided by: its label tokens, or 1."""
        if self.is_preference or self.classes:
            return torch.ones(len(indices))
        return torch.tensor([float(len(self.examples[index].sequences[0][2])) for index in indices])


class Bank:
    """Adapters that share a pass: factors padded to the largest rank of neighbours of equal nominal rank."""

    def __init__(self, adapters: Sequence[Mapping[str, torch.Tensor]], trainable: bool = False) -> None:
        self.size = len(adapters)
        ranks = [max(adapter[key].shape[0] for key in adapter if key.endswith(".A")) for adapter in adapters]
        starts = [0, *(index for index in range(1, self.size) if ranks[index] != ranks[index - 1]), self.size]
        self.groups = list(pairwise(starts))
        self.tensors: list[dict[str, torch.Tensor]] = []
        for start, end in self.groups:
            members = adapters[start:end]
            group = {}
            for key in members[0]:
                axis = {".A": 0, ".B": 1}.get(key[-2:])
                size = 0 if axis is None else max(member[key].shape[axis] for member in members)
                stacked = torch.stack(
                    [member[key] if axis is None else pad(member[key], axis, size) for member in members]
                )
                group[key] = stacked.clone().requires_grad_(trainable)
            self.tensors.append(group)
        self.captured: dict[str, torch.Tensor] = {}
        self.captures = False

    def update(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Return B·A·x of every adapter, for an input that they share or one for each."""
        outputs = []
        for (start, end), group in zip(self.groups, self.tensors, strict=True):
            a, b = group[f"{name}.A"], group[f"{name}.B"]
            if x.dim() == 2:
                reduced = F.linear(x, a.flatten(0, 1)).view(len(x), *a.shape[:2]).transpose(0, 1)
            else:
                reduced = x[start:end] @ a.transpose(1, 2)
            if self.captures:
                reduced.requires_grad_() if reduced.is_leaf else reduced.retain_grad()
                self.captured[name] = reduced
            outputs.append(reduced @ b.transpose(1, 2))
        return torch.cat(outputs)

    def classify(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits of each adapter's classifier."""
        weight, bias = (torch.cat([group[key] for group in self.tensors]) for key in ("classifier.W", "classifier.b"))
        return hidden @ weight.transpose(1, 2) + bias[:, None]

    def unstack(self) -> list[dict[str, torch.Tensor]]:
        """Return a copy of each adapter."""
        counts = [
            (group, index)
            for (start, end), group in zip(self.groups, self.tensors, strict=True)
            for index in range(end - start)
        ]
        return [{key: value[index].detach().clone() for key, value in group.items()} for group, index in counts]


def pad(tensor: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    """Append zeros along an axis up to `size`."""
    missing = size - tensor.shape[axis]
    if missing <= 0:
        return tensor
    shape = list(tensor.shape)
    shape[axis] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], axis)


def compute_losses(task: Task, bank: Bank, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return summed losses and scores (0 or 1) of the examples, each [adapters, examples]."""
    count = task.per_example
    sequences = [sequence for index in indices for sequence in task.examples[index].sequences]
    numbers = [index * count + offset for index in indices for offset in range(count)]
    length, width = max(len(ids) for ids, _, _ in sequences), max(len(rows) for _, rows, _ in sequences)
    mask = torch.zeros(len(sequences), length, dtype=torch.bool)
    rows, valid = (
        torch.zeros(len(sequences), width, dtype=torch.long),
        torch.zeros(len(sequences), width, dtype=torch.bool),
    )
    for number, (ids, positions, _) in enumerate(sequences):
        mask[number, : len(ids)] = True
        rows[number, : len(positions)], valid[number, : len(positions)] = torch.tensor(positions), True
    labels = torch.tensor([label for _, _, targets in sequences for label in targets])
    hidden = task.hidden[numbers, :length]
    out = task.base.apply_block(hidden, mask, rows, valid, bank.update)
    # Where a caller trains in bfloat16, an evaluation still computes the logits in float32.
    with torch.autocast("cpu", enabled=torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()):
        logits = bank.classify(out.float()) if task.classes else F.linear(out.float(), task.head)
    losses = F.cross_entropy(logits.flatten(0, 1), labels.repeat(bank.size), reduction="none").view(bank.size, -1)
    owners = torch.arange(len(sequences))[:, None].expand_as(valid)[valid]
    sums = torch.zeros(bank.size, len(sequences)).index_add(1, owners, losses)
    if task.is_preference:
        gains = task.reference[numbers] if len(task.reference) else torch.zeros(len(numbers))
        margin = BETA * (-sums - gains).view(bank.size, -1, 2).diff(dim=2)[..., 0].neg()
        return -F.logsigmoid(margin), (margin > 0).float()
    wrong = torch.zeros_like(sums).index_add(1, owners, (logits.detach().argmax(-1) != labels).float())
    return sums, (wrong == 0).float()


def encode_rows(base: Base, rows: Sequence[Mapping[str, str]], max_tokens: int = MAX_TOKENS, max_labels: int = MAX_LABELS) -> tuple[list[Example], int, torch.Tensor]:  # fmt: skip
    """Return the examples, the number of classes, and the head over the `VOCABULARY` most frequent tokens of the task."""
    tokenizer = base.tokenizer
    if "label" in rows[0]:
        names = sorted({row["label"] for row in rows})
        ids = tokenizer([row["text"] for row in rows], truncation=True, max_length=max_tokens).input_ids
        examples = [Example([(tokens, [0], [names.index(row["label"])])], row.get("group", str(number))) for number, (tokens, row) in enumerate(zip(ids, rows, strict=True))]  # fmt: skip
        return examples, len(names), torch.empty(0)
    prompts = tokenizer([row["prompt"] for row in rows]).input_ids
    examples = []
    for number, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        sequences = []
        for key in ("completion", "chosen", "rejected"):
            if key in row:
                labels = [*tokenizer(row[key], add_special_tokens=False).input_ids, tokenizer.eos_token_id][:max_labels]
                first = prompt[:1] if prompt[0] == tokenizer.bos_token_id and base.name == GEMMA else []
                prompt_tokens = [*first, *prompt[len(first) :][-(max_tokens - len(labels) - len(first)) :]]
                positions = list(range(len(prompt_tokens) - 1, len(prompt_tokens) + len(labels) - 1))
                sequences.append((prompt_tokens + labels[:-1], positions, labels))
        examples.append(Example(sequences, row.get("group", str(number))))
    counts = Counter(
        token for example in examples for ids, _, labels in example.sequences for token in (*ids, labels[-1])
    )
    vocabulary = sorted(token for token, _ in counts.most_common(VOCABULARY))
    places = {token: index for index, token in enumerate(vocabulary)}
    examples = [
        Example(
            [(ids, at, [places[label] for label in labels]) for ids, at, labels in example.sequences], example.group
        )
        for example in examples
        if all(label in places for _, _, labels in example.sequences for label in labels)
    ]
    return examples, 0, base.weights["head"][vocabulary].contiguous()


def split_examples(examples: Sequence[Example], counts: Sequence[int] = (TEST_ROWS, VALIDATION_ROWS, TRAIN_ROWS)) -> dict[str, list[int]]:  # fmt: skip
    """Fill the test split, then the validation split, then the training split with whole groups in the order of the rows."""
    by_group: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        by_group.setdefault(example.group, []).append(index)
    splits: dict[str, list[int]] = {"test": [], "validation": [], "train": []}
    sizes = iter(counts)
    names = iter(splits)
    name, size = next(names), next(sizes)
    for indices in (rows[:MAX_GROUP_ROWS] for rows in by_group.values()):
        if len(splits[name]) >= size and name != "train":
            name, size = next(names), next(sizes)
        splits[name] += indices
    return {name: indices[:size] for (name, indices), size in zip(splits.items(), counts, strict=True)}  # fmt: skip


@torch.no_grad()
def load_task(name: str, base_name: str, bases: Path, data: Path, work: Path) -> Task:
    """Encode the rows of a grid and compute the hidden states before the last block, once."""
    base = load_base(bases, base_name)
    return prepare_task(base, data / f"{name}.jsonl", work / f"{name}_hidden.safetensors")


@torch.no_grad()
def prepare_task(base: Base, data: Path, cache: Path, counts: Sequence[int] = (TEST_ROWS, VALIDATION_ROWS, TRAIN_ROWS),
                 max_tokens: int = MAX_TOKENS, max_labels: int = MAX_LABELS) -> Task:  # fmt: skip
    """Encode rows, split them into so many test, validation and training rows, and compute the hidden states before the first adapted block."""
    with data.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    examples, classes, head = encode_rows(base, rows, max_tokens, max_labels)
    splits = split_examples(examples, counts)
    order = [index for indices in splits.values() for index in indices]
    examples = [examples[index] for index in order]
    bounds = np.cumsum([0, *map(len, splits.values())])
    splits = {split: list(range(start, end)) for split, start, end in zip(splits, bounds[:-1], bounds[1:], strict=True)}
    task = Task(base, examples, splits, "chosen" in rows[0], classes, head)
    sequences = [ids for example in examples for ids, _, _ in example.sequences]
    if not cache.exists():
        hidden = torch.zeros(len(sequences), max_tokens, base.shapes["q"][1])
        by_length = sorted(range(len(sequences)), key=lambda number: len(sequences[number]))
        for start in range(0, len(by_length), 64):
            numbers = by_length[start : start + 64]
            length = len(sequences[numbers[-1]])
            ids = torch.tensor([sequences[number] + [0] * (length - len(sequences[number])) for number in numbers])
            mask = torch.tensor(
                [[position < len(sequences[number]) for position in range(length)] for number in numbers]
            )
            if start == 0:
                base.check(ids, mask)
            hidden[numbers, :length] = base.compute_prefix(ids, mask.long())
        save_file({"hidden": hidden}, cache.with_suffix(".part"))
        cache.with_suffix(".part").rename(cache)
    task.hidden = load_file(cache)["hidden"]
    base.drop_prefix()
    if task.is_preference:
        plain = Task(base, [Example([sequence], "") for example in examples for sequence in example.sequences], {}, False, 0, head, task.hidden)  # fmt: skip
        bank = Bank([first_adapter(task, 1, 0)])
        task.reference = -torch.cat([compute_losses(plain, bank, range(at, min(at + 64, len(plain.examples))))[0][0] for at in range(0, len(plain.examples), 64)])  # fmt: skip
    return task


def first_adapter(task: Task, rank: int, seed: int) -> dict[str, torch.Tensor]:
    """Return an untrained adapter as PEFT initialises it; a lower rank has the first rows of a higher one. B includes the scale."""
    adapter = {}
    for number, (name, (rows, columns)) in enumerate(task.base.shapes.items()):
        generator = torch.Generator().manual_seed(seed * 100 + number)
        uniform = torch.rand(TOP, columns, generator=generator) * 2 - 1
        adapter[f"{name}.A"] = uniform[:rank] / math.sqrt(columns)
        adapter[f"{name}.B"] = torch.zeros(rows, rank)
    if task.classes:
        generator = torch.Generator().manual_seed(seed * 100 + 99)
        adapter["classifier.W"] = torch.randn(task.classes, task.base.shapes["q"][1], generator=generator) * 0.02
        adapter["classifier.b"] = torch.zeros(task.classes)
    return adapter


def plan_batches(task: Task, seed: int, steps: int) -> list[list[int]]:
    """Return the examples of each step; a plan of more steps begins with that of fewer."""
    draw = np.random.default_rng([seed, 1])
    order: list[int] = []
    while len(order) < steps * BATCH:
        order += draw.permutation(task.splits["train"]).tolist()
    return [order[step * BATCH : (step + 1) * BATCH] for step in range(steps)]


def train(task: Task, cells: Sequence[tuple[int, float]], seed: int, steps: int) -> Iterator[tuple[int, list[dict[str, torch.Tensor]], np.ndarray[Any, Any]]]:  # fmt: skip
    """Train adapters of (rank, learning rate) with AdamW, and yield step, adapters and losses so far at each checkpoint and at the end.

    Gradients are of LoRA's B, so its learning rate does not depend on the scale alpha / rank, which is folded into the adapters that are yielded.
    """
    bank = Bank([first_adapter(task, rank, seed) for rank, _ in cells], trainable=True)
    scales = [ALPHA / rank for rank, _ in cells]
    plan, warmup = plan_batches(task, seed, steps), math.ceil(WARMUP * steps)
    stops = {round(fraction * steps) for fraction in (*CHECKPOINTS, 1)}
    rates = torch.tensor([rate for _, rate in cells])
    scaled = ScaledBank(bank, scales)
    parameters = [(start, end, tensor) for (start, end), group in zip(bank.groups, bank.tensors, strict=True) for tensor in group.values()]  # fmt: skip
    states = [(torch.zeros_like(tensor), torch.zeros_like(tensor)) for _, _, tensor in parameters]
    history = np.zeros((len(cells), steps), dtype=np.float32)
    for step, indices in enumerate(plan):
        losses, _ = compute_losses(task, scaled, indices)
        means = losses.sum(1) / task.weights(indices).sum()
        means.sum().backward()
        history[:, step] = means.detach().numpy()
        factor = step / warmup if step < warmup else (steps - step) / (steps - warmup)
        squares = torch.zeros(len(cells))
        for start, end, tensor in parameters:
            assert tensor.grad is not None
            squares[start:end] += tensor.grad.square().flatten(1).sum(1)
        clips = (MAX_NORM / (squares.sqrt() + 1e-6)).clamp(max=1.0)
        with torch.no_grad():
            for (start, end, tensor), (first, second) in zip(parameters, states, strict=True):
                shape = (-1, *[1] * (tensor.dim() - 1))
                gradient = tensor.grad * clips[start:end].view(shape)
                first.lerp_(gradient, 0.1)
                second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
                denominator = (second / (1 - 0.999 ** (step + 1))).sqrt_().add_(1e-8)
                tensor.sub_((rates[start:end] * factor / (1 - 0.9 ** (step + 1))).view(shape) * first / denominator)
                tensor.grad = None
        if step + 1 in stops:
            yield step + 1, scaled.unstack(), history


class ScaledBank(Bank):
    """A trained bank whose updates are multiplied by LoRA's scales."""

    def __init__(self, bank: Bank, scales: Sequence[float]) -> None:
        self.size, self.groups, self.tensors, self.captures = bank.size, bank.groups, bank.tensors, False
        self.scales = torch.tensor(scales)[:, None, None]

    def update(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return super().update(name, x) * self.scales

    def unstack(self) -> list[dict[str, torch.Tensor]]:
        adapters = super().unstack()
        for adapter, scale in zip(adapters, self.scales[:, 0, 0].tolist(), strict=True):
            for key in adapter:
                if key.endswith(".B"):
                    adapter[key] *= scale
        return adapters


def gather_moments(
    task: Task, adapter: Mapping[str, torch.Tensor], batches: Sequence[Sequence[int]]
) -> dict[str, Moments]:
    """Return the second moments of A·x and of its gradient over training examples, as `rightrank select` gathers them."""
    bank = Bank([adapter])
    bank.captures = True
    inputs: dict[str, torch.Tensor] = {}
    gradients: dict[str, torch.Tensor] = {}
    counts: Counter[str] = Counter()
    labels = 0.0
    for indices in batches:
        compute_losses(task, bank, indices)[0].sum().backward()
        labels += float(task.weights(indices).sum())
        for name, reduced in bank.captured.items():
            assert reduced.grad is not None
            hidden, gradient = reduced.detach()[0].double(), reduced.grad[0].double()
            size = gradient.abs().amax(1, keepdim=True)
            is_seen = size > 1e-6 * size.max()
            hidden, gradient = hidden * is_seen, gradient * is_seen
            inputs[name] = inputs.get(name, 0) + hidden.T @ hidden
            gradients[name] = gradients.get(name, 0) + gradient.T @ gradient
            counts[name] += int(is_seen.sum())
    return {
        name: Moments((inputs[name] / max(1, counts[name])).numpy(), (gradients[name] / labels).numpy())
        for name in inputs
    }


def truncate(task: Task, adapter: Mapping[str, torch.Tensor], moments: Mapping[str, Moments], ranks: Sequence[int]) -> list[dict[str, torch.Tensor]]:  # fmt: skip
    """Return the adapter cut to each rank by K-FAC; where a server reserves more, modules share the parameters of the rank."""
    names = list(task.base.shapes)
    parts = {name: decompose_update(adapter[f"{name}.B"].double().numpy(), adapter[f"{name}.A"].double().numpy(), 1.0, moments[name]) for name in names}  # fmt: skip
    costs = [sum(task.base.shapes[name]) for name in names]
    truncated = []
    for rank in ranks:
        limit = find_server_rank(rank)
        shared = allocate_ranks([parts[name].costs for name in names], costs, rank * sum(costs), limit) if limit > rank else [rank] * len(names)  # fmt: skip
        cut = {key: value for key, value in adapter.items() if key.startswith("classifier")}
        for name, module_rank in zip(names, shared, strict=True):
            cut[f"{name}.A"] = torch.from_numpy(parts[name].a[:module_rank]).float().contiguous()
            cut[f"{name}.B"] = torch.from_numpy(parts[name].b[:, :module_rank]).float().contiguous()
        truncated.append(cut)
    return truncated


def average(adapters: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the mean of the adapters' updates as one product, whose rank is the sum of their ranks."""
    mean: dict[str, torch.Tensor] = {}
    for key in adapters[0]:
        tensors = [adapter[key] for adapter in adapters]
        if key.endswith(".A"):
            mean[key] = torch.cat(tensors, 0)
        elif key.endswith(".B"):
            mean[key] = torch.cat(tensors, 1) / len(tensors)
        else:
            mean[key] = torch.stack(tensors).mean(0)
    return mean


@torch.no_grad()
def evaluate(task: Task, adapters: Sequence[Mapping[str, torch.Tensor]], split: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:  # fmt: skip
    """Return summed losses in thousandths and scores of a split, each [adapters, examples]."""
    indices = task.splits[split]
    losses, scores = [], []
    for first in range(0, len(adapters), ADAPTERS_PER_PASS):
        bank = Bank(adapters[first : first + ADAPTERS_PER_PASS])
        batches = [
            compute_losses(task, bank, indices[at : at + EVAL_BATCH]) for at in range(0, len(indices), EVAL_BATCH)
        ]
        losses.append(torch.cat([loss for loss, _ in batches], 1).numpy())
        scores.append(torch.cat([score for _, score in batches], 1).numpy())
    values = np.concatenate(losses)
    finite = np.isfinite(values)
    thousandths = np.where(finite, np.clip(np.round(np.where(finite, values, 0) * 1000), 0, DIVERGED - 1), DIVERGED)
    return thousandths.astype(np.uint16), np.concatenate(scores).astype(np.uint8)


class SeedResults:
    """The records of a seed and their values."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.records: list[dict[str, Any]] = []
        self.validation: list[np.ndarray[Any, Any]] = []
        self.test: list[np.ndarray[Any, Any]] = []
        self.scores: list[np.ndarray[Any, Any]] = []

    def add(
        self, records: Sequence[Mapping[str, Any]], adapters: Sequence[Mapping[str, torch.Tensor]], is_final: bool
    ) -> None:
        """Evaluate adapters on the validation split and, where they are final, on the test split."""
        self.records += [{**record, "test": is_final} for record in records]
        self.validation.append(evaluate(self.task, adapters, "validation")[0])
        if is_final:
            losses, scores = evaluate(self.task, adapters, "test")
            self.test.append(losses)
            self.scores.append(scores)

    @classmethod
    def load(cls, task: Task, path: Path) -> SeedResults:
        """Read the records and validation losses of a stored seed."""
        results = cls(task)
        with np.load(path) as arrays:
            results.records, results.validation = json.loads(str(arrays["records"])), [arrays["validation"]]
        return results

    def measure_rates(self, trained: int) -> dict[float, float]:
        """Return the mean validation loss of rank 64 by learning rate after so many of `STEPS` steps."""
        rows = np.concatenate(self.validation)
        return {
            record["rate"]: float(row.mean())
            for record, row in zip(self.records, rows, strict=True)
            if record["kind"] in ("checkpoint", "trained") and record["rank"] == TOP and record["trained"] == trained
        }

    def find_quarter_rates(self) -> tuple[float, float]:
        """Return the learning rate of rank 64 with the lowest loss at a quarter, and the next lower one (or higher, at the lower edge)."""
        means = self.measure_rates(STEPS // 4)
        best = RATES.index(min(means, key=lambda rate: means[rate]))
        return RATES[best], RATES[best - 1 if best else 1]

    def save(self, path: Path, history: np.ndarray[Any, Any]) -> None:
        task = self.task
        arrays: dict[str, Any] = {
            "records": np.array(json.dumps(self.records)),
            "validation": np.concatenate(self.validation),
        }
        arrays |= {
            "test": np.concatenate(self.test),
            "scores": np.concatenate(self.scores),
            "train_losses": history.astype(np.float16),
        }
        for split in ("validation", "test"):
            groups = [task.examples[index].group for index in task.splits[split]]
            arrays[f"weights_{split}"] = task.weights(task.splits[split]).numpy().astype(np.uint8)
            arrays[f"groups_{split}"] = np.unique(groups, return_inverse=True)[1].astype(np.uint16)
        temporary = path.with_suffix(".part.npz")
        np.savez_compressed(temporary, **arrays)
        temporary.rename(path)


def run_seed(task: Task, name: str, seed: int, work: Path, out: Path) -> None:
    """Train and evaluate everything of a seed that `README.md` lists, and store it."""
    begun = time.perf_counter()
    results = SeedResults(task)
    cells = [(rank, rate) for rank in RANKS for rate in RATES]
    adapters: list[dict[str, torch.Tensor]] = []
    history = np.zeros(0, dtype=np.float32)
    for step, current, losses in train(task, cells, seed, STEPS):
        adapters, history = current, losses
        records = [{"kind": "checkpoint" if step < STEPS else "trained", "rank": rank, "rate": rate, "steps": STEPS, "trained": step} for rank, rate in cells]  # fmt: skip
        results.add(records, adapters, step == STEPS)
    tops = adapters[-len(RATES) :]
    save_file({f"{rate:g}/{key}": value for rate, top in zip(RATES, tops, strict=True) for key, value in top.items()}, work / f"{name}_{seed}.safetensors")  # fmt: skip
    print(f"  trained {time.perf_counter() - begun:.0f} s, finite {bool(np.isfinite(history).all())}", flush=True)
    moment_batches = plan_batches(task, seed, STEPS + MOMENT_STEPS)[STEPS:]
    add_truncations(results, tops, moment_batches, "truncated", STEPS)
    for step, longer, _ in train(task, [(TOP, rate) for rate in results.find_quarter_rates()], seed, 2 * STEPS):
        rates = results.find_quarter_rates()
        records = [{"kind": "long checkpoint" if step < 2 * STEPS else "long", "rank": TOP, "rate": rate, "steps": 2 * STEPS, "trained": step} for rate in rates]  # fmt: skip
        results.add(records, longer, step == 2 * STEPS)
    batches = plan_batches(task, seed, 2 * STEPS + MOMENT_STEPS)[2 * STEPS :]
    add_truncations(results, longer, batches, "long truncated", 2 * STEPS, results.find_quarter_rates())
    for earlier_seed in range(seed):
        file = work / f"{name}_{earlier_seed}.safetensors"
        if file.exists():
            stored = load_file(file)
            rates = choose_average_rates(results, SeedResults.load(task, out / f"{name}_{earlier_seed}.npz"))
            others = [{key.partition("/")[2]: value for key, value in stored.items() if key.startswith(f"{rate:g}/")} for rate in rates]  # fmt: skip
            means = [average([first, tops[RATES.index(rate)]]) for first, rate in zip(others, rates, strict=True)]
            results.add([{"kind": "average", "rank": 2 * TOP, "rate": rate, "steps": STEPS, "with": earlier_seed} for rate in rates], means, True)  # fmt: skip
            add_truncations(
                results, means, moment_batches, "average truncated", STEPS, rates, AVERAGED_RANKS, earlier_seed
            )
    results.save(out / f"{name}_{seed}.npz", history)
    print(f"  stored after {time.perf_counter() - begun:.0f} s", flush=True)


def choose_average_rates(first: SeedResults, second: SeedResults) -> list[float]:
    """Return the best learning rate at a quarter of either seed, and the best of both at the end."""
    ends = first.measure_rates(STEPS), second.measure_rates(STEPS)
    best = min(RATES, key=lambda rate: ends[0][rate] + ends[1][rate])
    return sorted({first.find_quarter_rates()[0], second.find_quarter_rates()[0], best})


def add_truncations(results: SeedResults, tops: Sequence[Mapping[str, torch.Tensor]], batches: Sequence[Sequence[int]], kind: str,
                    steps: int, rates: Sequence[float] = RATES, ranks: Sequence[int] = TRUNCATED_RANKS, other: int | None = None) -> None:  # fmt: skip
    """Truncate each adapter to each rank and evaluate the results; adapters that diverged have none."""
    records, cuts = [], []
    for rate, top in zip(rates, tops, strict=True):
        if all(bool(torch.isfinite(value).all()) for value in top.values()):
            moments = gather_moments(results.task, top, batches)
            if all(
                np.isfinite(moment.inputs).all() and np.isfinite(moment.gradients).all() for moment in moments.values()
            ):
                extra = {} if other is None else {"with": other}
                records += [{"kind": kind, "rank": rank, "rate": rate, "steps": steps, **extra} for rank in ranks]
                cuts += truncate(results.task, top, moments, ranks)
    order = sorted(range(len(cuts)), key=lambda index: records[index]["rank"])
    if order:
        results.add([records[index] for index in order], [cuts[index] for index in order], True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("bases", "data", "work", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--grids", nargs="+", choices=GRIDS, default=list(GRIDS))
    parser.add_argument("--seeds", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    for seeds in ROUNDS:
        for name in options.grids:
            missing = [
                seed for seed in seeds if seed < options.seeds and not (options.out / f"{name}_{seed}.npz").exists()
            ]
            if missing:
                begun = time.perf_counter()
                task = load_task(name, GRIDS[name], options.bases, options.data, options.work)
                sizes = {split: len(indices) for split, indices in task.splits.items()}
                print(
                    f"{name}: {sizes}, head {tuple(task.head.shape)}, prepared in {time.perf_counter() - begun:.0f} s",
                    flush=True,
                )
                for seed in missing:
                    print(f"{name}, seed {seed}, {time.strftime('%H:%M:%S')}", flush=True)
                    run_seed(task, name, seed, options.work, options.out)


if __name__ == "__main__":
    main()
