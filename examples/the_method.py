"""Find the smallest LoRA adapter within the margin from one training: the complete method in plain PyTorch and PEFT.

    python examples/the_method.py MODEL TRAIN.jsonl HELD_OUT.jsonl --learning-rate 1e-3 --steps 200

Student's t needs scipy. Rows have `prompt` and `completion`, or `text`. The steps are the same as in `rightrank select`, except for
its learning-rate search:

1. Train one adapter at the highest rank.
2. Estimate second moments of each module's inputs and output gradients on training examples (K-FAC).
3. Truncate the adapter to every lower rank so that the loss changes least.
4. Compare each truncation with the full adapter on held-out examples, paired, from the highest rank down, while the 95% upper bound of the loss
   difference stays within the margin. The first rank that fails ends the search.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from scipy.stats import t as student
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup

Example = tuple[list[int], list[int]]  # token ids, labels; a label of -100 is ignored
Factors = tuple[torch.Tensor, torch.Tensor]  # B [out, rank], A [rank, in]


@dataclass(frozen=True)
class Settings:
    """The ranks to compare, and the training settings."""

    ranks: Sequence[int] = (1, 2, 4, 8, 16, 32, 64)
    learning_rate: float = 1e-3
    steps: int = 200
    batch_size: int = 8
    lora_alpha: float = 32.0  # the scale of an update is alpha / rank
    margin: float = 0.005  # nats per token
    moment_tokens: int = 4096
    damping: float = 0.01
    seed: int = 0


def find_smallest_rank(model: Any, train: Sequence[Example], held_out: Sequence[Example], settings: Settings) -> int:
    """Train at the highest rank, truncate step by step, and print a line for each rank."""
    top = max(settings.ranks)
    torch.manual_seed(settings.seed)
    config = LoraConfig(r=top, lora_alpha=settings.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    unseen = train_adapter(model, train, settings)
    metrics = estimate_second_moments(model, unseen, settings)
    trained = {
        name: [factor.detach().double() for factor in get_factors(module)] for name, module in list_lora_modules(model)
    }
    reference, tokens = compute_example_losses(model, held_out, settings.batch_size)
    print(f"rank {top:3}: trained, held-out loss {(reference.sum() / tokens.sum()).item():.4f} nats per token")
    smallest = top
    for rank in sorted((rank for rank in settings.ranks if rank < top), reverse=True):
        for name, module in list_lora_modules(model):
            set_factors(module, truncate(*trained[name], rank, *metrics[name], settings.damping))
        losses, _ = compute_example_losses(model, held_out, settings.batch_size)
        mean, high = compute_paired_bound(losses - reference, tokens)
        holds = high <= settings.margin
        print(f"rank {rank:3}: {mean:+.4f} (95% upper bound {high:+.4f}) {'holds' if holds else 'fails'}")
        if not holds:
            break
        smallest = rank
    return smallest


def list_lora_modules(model: Any) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "lora_A")]


def get_factors(module: Any) -> Factors:
    return module.lora_B["default"].weight, module.lora_A["default"].weight


@torch.no_grad()
def set_factors(module: Any, new: Factors) -> None:
    """Write a truncated update to the leading columns of B and rows of A, and set the others to zero."""
    (b, a), rank = get_factors(module), len(new[1])
    b.zero_()[:, :rank] = new[0]
    a.zero_()[:rank] = new[1]


# 1. The training


def train_adapter(model: Any, examples: Sequence[Example], settings: Settings) -> list[Example]:
    """Train with AdamW and linear decay over batches in random order.

    Returns:
        The examples that the training did not read, or all examples if it read all of them.
    """
    order = draw_batches(len(examples), settings)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, settings.learning_rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, settings.steps)
    model.train()
    for batch in order:
        losses, tokens = compute_batch_losses(model, [examples[index] for index in batch])
        (losses.sum() / tokens.sum()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    read = {index for batch in order for index in batch}
    return [example for index, example in enumerate(examples) if index not in read] or list(examples)


def draw_batches(count: int, settings: Settings) -> list[list[int]]:
    """Return the indices of the examples of every step, shuffled in each epoch."""
    generator = torch.Generator().manual_seed(settings.seed)
    needed, order = settings.steps * settings.batch_size, []
    while len(order) < needed:
        order += torch.randperm(count, generator=generator).tolist()
    return [order[start : start + settings.batch_size] for start in range(0, needed, settings.batch_size)]


def compute_batch_losses(model: Any, examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `(summed loss [batch], tokens with a label [batch])` of examples padded to the same length."""
    width = max(len(ids) for ids, _ in examples)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in examples])
    labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in examples])
    mask = torch.tensor([[1] * len(token_ids) + [0] * (width - len(token_ids)) for token_ids, _ in examples])
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
    losses = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="none", ignore_index=-100)
    return losses.view(len(examples), -1).sum(1), (labels[:, 1:] != -100).sum(1)


@torch.no_grad()
def compute_example_losses(
    model: Any, examples: Sequence[Example], batch_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    batches = [
        compute_batch_losses(model, examples[start : start + batch_size])
        for start in range(0, len(examples), batch_size)
    ]
    losses, tokens = (torch.cat(values).double() for values in zip(*batches, strict=True))
    return losses, tokens


# 2. Second moments. An error s·B·M·A of the update changes the loss only through h = A·x and δ = s·Bᵀ·∂loss/∂output,
# so two rank × rank matrices are enough for a module of any size.


def estimate_second_moments(model: Any, examples: Sequence[Example], settings: Settings) -> dict[str, Factors]:
    """Return `(E[δ·δᵀ], E[h·hᵀ])` of each adapted module, over examples with about `moment_tokens` tokens."""
    sums: dict[str, list[torch.Tensor]] = {}
    labels = read = 0
    with record_moments(model, sums):
        for start in range(0, len(examples), settings.batch_size):
            if read >= settings.moment_tokens:
                break
            batch = examples[start : start + settings.batch_size]
            losses, tokens = compute_batch_losses(model, batch)
            losses.sum().backward()
            labels += int(tokens.sum())
            read += sum(len(ids) for ids, _ in batch)
    model.zero_grad()
    return {name: (delta / labels, hidden / read) for name, (delta, hidden) in sums.items()}


@contextmanager
def record_moments(model: Any, sums: dict[str, list[torch.Tensor]]) -> Iterator[None]:
    """Add the outer products of δ and h of every backward pass to `sums`."""
    handles = []
    for name, module in list_lora_modules(model):
        (b, a), scale = (factor.detach() for factor in get_factors(module)), module.scaling["default"]
        sums[name] = [torch.zeros(len(a), len(a), dtype=torch.float64) for _ in range(2)]

        def forward(_module: Any, inputs: Any, output: Any, name=name, a=a, b=b, scale=scale) -> None:
            hidden = inputs[0].detach().flatten(0, -2) @ a.T

            def backward(gradient: torch.Tensor) -> None:
                delta = scale * gradient.flatten(0, -2) @ b
                is_token = (delta.abs().amax(1, keepdim=True) > 1e-6 * delta.abs().max()).to(hidden)  # no padding
                sums[name][0] += (delta.T @ delta).double()
                sums[name][1] += ((hidden * is_token).T @ hidden).double()

            output.register_hook(backward)

        handles.append(module.register_forward_hook(forward))
    yield
    for handle in handles:
        handle.remove()


# 3. The truncation


def truncate(b: torch.Tensor, a: torch.Tensor, rank: int, delta: Any, hidden: Any, damping: float) -> Factors:
    """Return the best factors of `rank` for B·A if an error E costs tr(G·E·C·Eᵀ): the SVD of Lᵀ·R, L·Lᵀ = E[δ·δᵀ], R·Rᵀ = E[h·hᵀ]."""
    left_root, left_inverse_root = compute_root(damp(delta, b.T @ b, damping))
    right_root, _ = compute_root(damp(hidden, a @ a.T, damping))
    u = torch.linalg.svd(left_root.T @ right_root)[0][:, :rank]
    return b @ left_inverse_root @ u, u.T @ left_root.T @ a


def damp(moment: torch.Tensor, plain_metric: torch.Tensor, damping: float) -> torch.Tensor:
    """Add a share of the plain metric to the moment, so that directions with few tokens keep some weight."""
    if moment.trace() <= 0:
        return plain_metric
    return moment + damping * moment.trace() / plain_metric.trace() * plain_metric


def compute_root(matrix: torch.Tensor) -> Factors:
    """Return `(L, L⁻ᵀ)` with L·Lᵀ = matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    roots = values.clamp(min=1e-12 * values[-1]).sqrt()
    return vectors * roots, vectors / roots


# 4. The comparison


def compute_paired_bound(differences: torch.Tensor, tokens: torch.Tensor) -> tuple[float, float]:
    """Return `(mean difference per token, its 95% upper bound)`: Student's t over the examples for a ratio of sums."""
    mean = (differences.sum() / tokens.sum()).item()
    influence = (differences - tokens * mean) / tokens.mean()
    error = influence.std().item() / math.sqrt(len(influence))
    return mean, mean + error * float(student.ppf(0.95, len(influence) - 1))


def encode(tokenizer: Any, row: dict[str, str], length: int = 512) -> Example:
    prompt, text = row.get("prompt", ""), row.get("completion", row.get("text", ""))
    prompt_ids = tokenizer(prompt)["input_ids"] if prompt else []
    completion_ids = tokenizer(text, add_special_tokens=not prompt)["input_ids"] + [tokenizer.eos_token_id]
    return (prompt_ids + completion_ids)[:length], ([-100] * len(prompt_ids) + completion_ids)[:length]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("train", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("--learning-rate", type=float, default=Settings.learning_rate)
    parser.add_argument("--ranks", type=lambda text: tuple(map(int, text.split(","))), default=Settings.ranks)
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--margin", type=float, default=Settings.margin)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    rows = [
        [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        for path in (arguments.train, arguments.held_out)
    ]
    train, held_out = ([encode(tokenizer, row) for row in split] for split in rows)
    settings = Settings(
        arguments.ranks, learning_rate=arguments.learning_rate, steps=arguments.steps, margin=arguments.margin
    )
    print(f"Rank {find_smallest_rank(model, train, held_out, settings)} of {max(settings.ranks)} is enough.")


if __name__ == "__main__":
    main()
