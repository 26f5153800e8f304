"""Grids with six seeds and up to 4,096 held-out examples: the second locked ones.

    python -m benchmarks.selection.wide_grids NAME MODEL DATA --model-name N --work FOLDER --out FOLDER

All ranks × learning rates of a seed share passes over the base. Values along a training are of 256 validation examples; the
whole test split is scored once, at the end of each training, and its values stand in an `.npz` beside the JSON file, in thousandths
(`losses` and, where answers are scored, `scores`: [cells, examples], int32). Seeds come one after the other; each is stored as soon as it is
whole, and the same command trains the missing ones.

Encoders: the position-wise layers of the last block run at the first token alone, which is all that the classifier reads. It is checked
on a batch of the validation split before the first step.
"""

from __future__ import annotations

import argparse
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import rightrank.train.fast_paths as fast_paths
import rightrank.train.loss as loss_module
from benchmarks.selection.long_grids import annealed, run_all, stored_seeds
from benchmarks.selection.real_training import COMMON, Workshop, changed, curve_of, cuts_of, open_workshop, store
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import Arm, TrialFinished
from rightrank.search.bracket import outside_in
from rightrank.search.learning_rates import LOOK
from rightrank.train.batches import Batch
from rightrank.train.runtime import adapter_attached
from rightrank.train.tokens import EXAMPLE_METRICS

EVALUATED = 4096
CHECKPOINTS = (LOOK, 0.25)
WIDE = COMMON | {"seeds": (0, 1, 2, 3, 4, 5), "max_steps": 400, "eval_batch_size": 64, "eval_items": EVALUATED, "adapters_per_pass": 12,
                 "seq_len": 24, "validation_fraction": 0.022, "test_fraction": 0.345}  # of 12,000 rows  # fmt: skip
L3 = {"layers_to_transform": (2,)}
L6 = {"layers_to_transform": (5,)}
SMOLLM2 = {"layers_to_transform": (29,), "ranks": (4, 16, 64), "adapters_per_pass": 9, "seq_len": 24}
GEMMA = {"layers_to_transform": (17,), "ranks": (4, 16, 64), "adapters_per_pass": 9}
FEWER = {"validation_fraction": 0.033, "test_fraction": 0.52}  # of 8,000 rows
LOW = {"learning_rates": (3e-4, 1e-3, 3e-3)}
HIGH = {"learning_rates": (1e-3, 3e-3, 1e-2)}
ACCURACY = {"metric": "accuracy"}
GRIDS: dict[str, dict[str, object]] = {
    "sections": WIDE | L3 | HIGH,
    "verbs": WIDE | L6 | HIGH,
    "others": WIDE | L3 | HIGH | ACCURACY,
    "origins": WIDE | L6 | HIGH,
    "maintainers": WIDE | L3 | HIGH | ACCURACY,
    "unions": WIDE | L6 | HIGH,
    "speakers": WIDE | L3 | LOW,
    "parties": WIDE | L6 | LOW | ACCURACY,
    "syllables": WIDE | L3 | HIGH,
    "spam": WIDE | L6 | LOW | {"validation_fraction": 0.045, "test_fraction": 0.35},  # of 5,815 rows
    "answers": WIDE | SMOLLM2 | HIGH | FEWER,
    "stress_gemma": WIDE | GEMMA | LOW | FEWER | {"seq_len": 16},
}


def first_token_only(block: Any, batch: Batch, routing: Any) -> AbstractContextManager[None]:
    """Within the block, what is position-wise in the encoder's last layer runs at the first token of each row."""
    keep = torch.zeros(batch.input_ids.shape, dtype=torch.bool)
    keep[:, 0] = True
    modules = [block.attention.self.query, block.attention.output.dense, block.intermediate, block.output.dense]
    return fast_paths.at_rows(modules, keep, routing)


def speed_up(shop: Workshop) -> None:
    """Use `first_token_only` where the base is an encoder that classifies, after a check of the losses."""
    if not hasattr(shop.runtime.model, "bert"):
        return
    runtime = shop.runtime
    indices = list(range(16))
    before = runtime.losses("selection", runtime.batch("selection", indices), 1.0).example_losses
    runtime.fast_paths.rows_only = first_token_only
    runtime.fast_paths.last_block = runtime.model.bert.encoder.layer[-1]
    after = runtime.losses("selection", runtime.batch("selection", indices), 1.0).example_losses
    assert torch.allclose(before, after, rtol=1e-5), (before, after)
    print("first token only: largest difference", float((before - after).abs().max()), flush=True)


def score_answers() -> None:
    """Give every evaluation of answers whether each label is the most probable token: what greedy decoding writes equals the answer exactly then."""
    hits: list[torch.Tensor] = []

    def chunk_losses(hidden: torch.Tensor, targets: torch.Tensor, head: Any) -> torch.Tensor:
        logits = head(hidden).float()
        hits.append((logits.detach().argmax(-1) == targets).cpu())
        return F.cross_entropy(logits, targets, reduction="none")

    plain = loss_module.Likelihood.__call__

    def with_matches(self: Any, model: Any, batch: Batch, scale: Any) -> loss_module.BatchLoss:
        hits.clear()
        labels = self.labels

        def keeping(*given: Any) -> Any:
            keeping.sequences = (result := labels(*given)).sequences.cpu()  # type: ignore[attr-defined]
            return result

        result = plain(type(self)(keeping), model, batch, scale)
        right = torch.cat(hits) if hits else torch.empty(0, dtype=torch.bool)
        sequences = keeping.sequences  # type: ignore[attr-defined]
        if len(right) != len(sequences):
            return result
        wrong = torch.zeros(batch.sequences).index_add_(0, sequences, (~right).float())
        matches = {"answered": (wrong == 0).double()}
        return loss_module.BatchLoss(result.total, result.example_losses, result.example_tokens, matches)

    loss_module._chunk_losses = chunk_losses
    loss_module.Likelihood.__call__ = with_matches  # type: ignore[method-assign]
    EXAMPLE_METRICS["prompt_completion"] = ("answered",)


def train_seed(shop: Workshop, seed: int) -> None:
    """Every rank and learning rate in shared passes, in stages; annealed copies at the first look; the top truncated."""
    settings, steps = shop.settings, shop.settings.max_steps
    assert steps is not None
    latest = {(rank, rate): "" for rate in settings.learning_rates for rank in outside_in(settings.ranks)}
    for part in (*CHECKPOINTS, 1.0):
        arms = [
            Arm(
                rank=rank,
                learning_rate=rate,
                lora_alpha=settings.lora_alpha,
                seed=seed,
                steps=steps,
                stop_at=None if part == 1.0 else round(part * steps),
                continue_from=before or None,
            )
            for (rank, rate), before in latest.items()
        ]
        run_all(shop, arms)
        done = [outcome for arm in arms if isinstance(outcome := shop.outcomes.get(arm), TrialFinished)]
        latest = {(outcome.rank, outcome.learning_rate): outcome.trial_id for outcome in done}
        if part == LOOK:
            run_all(shop, [annealed(outcome, steps) for outcome in done])
    tops = [outcome for outcome in done if outcome.rank == max(settings.ranks)]
    run_all(shop, [arm for parent in tops for arm in cuts_of(shop, parent)])


def score_test(shop: Workshop, seed: int) -> None:
    """The test split under every adapter of a whole training of the seed, in a file of its own."""
    file = shop.folder.path / f"test_{seed}.npz"
    if file.exists():
        return
    losses, scores, cells = [], [], []
    for arm, outcome in sorted(shop.outcomes.items(), key=lambda item: (item[0].rank, item[0].learning_rate)):
        if not isinstance(outcome, TrialFinished) or arm.rank == 0 or arm.seed != seed or not arm.is_direct:
            continue
        with adapter_attached(shop.runtime, shop.folder.trial_adapter(outcome.trial_id)):
            measured = shop.runtime.evaluate("test")
        cells.append([arm.rank, arm.learning_rate, seed])
        losses.append(np.round(np.array(measured.losses) * 1000).astype(np.int32))
        kept = next(iter(measured.by_example.values()), None)
        scores.append(np.zeros(0, np.int32) if kept is None else np.round(np.array(kept) * 1000).astype(np.int32))
    np.savez_compressed(
        file, cells=np.array(cells), losses=np.array(losses), scores=np.array(scores), tokens=np.array(measured.tokens)
    )


def store_grid(name: str, shop: Workshop, model: str, out: Path) -> None:
    """The whole seeds so far: the JSON file, and the test split's values beside it."""
    out.mkdir(parents=True, exist_ok=True)
    curve = curve_of(name, shop, 1.0, {"model": model, "settings": changed(shop.settings)})
    curve["source"] = "benchmarks/selection/wide_grids.py"
    curve["partial"] = set(curve["seeds"]) != set(shop.settings.seeds)
    store([curve], out / f"{name}.json.xz")
    parts = [np.load(shop.folder.path / f"test_{seed}.npz") for seed in curve["seeds"]]
    joined = {key: np.concatenate([part[key] for part in parts]) for key in ("cells", "losses", "scores")}
    np.savez_compressed(out / f"{name}.npz", **joined, tokens=parts[0]["tokens"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=GRIDS)
    parser.add_argument("model", help="folder or GGUF file of the base")
    parser.add_argument("data", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder of finished trainings")
    parser.add_argument("--out", type=Path, required=True, help="folder of the grid's files")
    parser.add_argument("--model-name", required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.name == "answers":
        score_answers()
    settings = SelectSettings(**GRIDS[options.name])
    shop = open_workshop(options.model, options.data, settings, options.work, CHECKPOINTS)
    sizes = {split: len(examples) for split, examples in shop.runtime.data.splits.items()}
    print(options.name, sizes, flush=True)
    speed_up(shop)
    for seed in settings.seeds:
        if seed in stored_seeds(options.out / f"{options.name}.json.xz"):
            continue
        begun = time.perf_counter()
        train_seed(shop, seed)
        trained = time.perf_counter()
        score_test(shop, seed)
        store_grid(options.name, shop, options.model_name, options.out)
        print(f"seed {seed}: {trained - begun:.0f} s trained, {time.perf_counter() - trained:.0f} s scored", flush=True)


if __name__ == "__main__":
    main()
