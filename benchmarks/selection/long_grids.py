"""Long grids on real models, several adapters per pass; each ends in a file of its own, and some of them are locked.

    python -m benchmarks.selection.long_grids NAME MODEL DATA --work FOLDER --out benchmarks/selection/grids

NAME is one of `GRIDS`; `real_training.py` says what a grid holds. All ranks × learning rates of a seed share passes over the base,
stage by stage. FOLDER keeps what is finished, and the same command resumes. Seeds come one after the other, and each is stored
as soon as it is whole: a grid that has fewer seeds than its setting asks for is marked `partial`, and the same command trains
the missing ones, with or without FOLDER.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import read_json
from benchmarks.selection.real_training import (
    COMMON,
    LONG,
    Workshop,
    changed,
    curve_of,
    cuts_of,
    open_workshop,
    place,
    stages,
    store,
    test_grids,
)
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import Arm, Trial, TrialFinished, trial_id
from rightrank.search.bracket import outside_in
from rightrank.search.history import base_arm
from rightrank.search.learning_rates import ANNEAL, LOOK

ADAPTERS_PER_PASS = 16
SHORT_TEXTS = {"seq_len": 32, "eval_items": 256, "test_fraction": 0.06, "adapters_per_pass": ADAPTERS_PER_PASS}
MINILM = {"layers_to_transform": (4, 5)}
MINILM_L3 = {"layers_to_transform": (0, 1, 2), "dtype": "bfloat16"}  # all of its layers
SMOLLM2 = {"layers_to_transform": (28, 29), "dtype": "bfloat16"}
LOW = {"learning_rates": (3e-4, 1e-3, 3e-3)}
HIGH = {"learning_rates": (1e-3, 3e-3, 1e-2)}
HIGHEST = {"learning_rates": (2e-3, 6e-3, 2e-2)}
GEMMA = {"layers_to_transform": (16, 17), "dtype": "bfloat16"}
PAIRS = {"seq_len": 48, "validation_fraction": 0.2, "test_fraction": 0.2}  # of 720 pairs
FEW = {"test_fraction": 0.35, "validation_fraction": 0.35}  # of 1,200 rows
GRIDS: dict[str, dict[str, object]] = {
    "newsgroups": COMMON | LONG | SHORT_TEXTS | MINILM | HIGH | {"metric": "accuracy"},
    "tweets": COMMON | LONG | SHORT_TEXTS | MINILM_L3 | LOW,
    "reuters": COMMON | LONG | SHORT_TEXTS | MINILM_L3 | HIGH | {"layers_to_transform": (1, 2)},
    "senses_few": COMMON | LONG | SHORT_TEXTS | MINILM | LOW | FEW | {"dtype": "bfloat16"},
    "packages": COMMON | LONG | SHORT_TEXTS | SMOLLM2 | HIGHEST,
    "dialogue": COMMON | LONG | SHORT_TEXTS | SMOLLM2 | HIGHEST,
    "gloss_pairs": COMMON | LONG | SHORT_TEXTS | SMOLLM2 | HIGH | PAIRS,
    "senses_dora": COMMON | LONG | SHORT_TEXTS | MINILM_L3 | HIGH | {"use_dora": True},
    "senses_1500_steps": COMMON | LONG | SHORT_TEXTS | MINILM_L3 | LOW | {"max_steps": 1500},
    "newsgroups_gemma": COMMON | LONG | SHORT_TEXTS | GEMMA | LOW,
}


def train_seed(shop: Workshop, seed: int) -> None:
    """Every rank and learning rate, stage by stage; then truncations of the top rank."""
    settings, steps = shop.settings, shop.settings.max_steps
    assert steps is not None
    latest = {
        (rank, learning_rate): "" for learning_rate in settings.learning_rates for rank in outside_in(settings.ranks)
    }
    for part in stages(settings):
        stop_at = None if part == 1.0 else round(part * steps)
        arms = [
            Arm(
                rank=rank,
                learning_rate=learning_rate,
                lora_alpha=settings.lora_alpha,
                seed=seed,
                steps=steps,
                stop_at=stop_at,
                continue_from=before or None,
            )
            for (rank, learning_rate), before in latest.items()
        ]
        run_all(shop, arms)
        done = [outcome for arm in arms if isinstance(outcome := shop.outcomes.get(arm), TrialFinished)]
        latest = {(outcome.rank, outcome.learning_rate): outcome.trial_id for outcome in done}
        if part == LOOK:
            run_all(shop, [annealed(outcome, steps) for outcome in done])
    tops = [outcome for outcome in done if outcome.rank == max(settings.ranks)]
    run_all(shop, [arm for parent in tops for arm in cuts_of(shop, parent)])


def annealed(look: TrialFinished, steps: int) -> Arm:
    """The copy of a training that is annealed from its look."""
    end = round(LOOK * steps) + max(1, round(ANNEAL * steps))
    return look.arm.model_copy(
        update={"stop_at": end, "continue_from": look.trial_id, "anneal_from": round(LOOK * steps)}
    )


def run_all(shop: Workshop, arms: Sequence[Arm]) -> None:
    """Those that have no outcome yet, in shared passes."""
    base = shop.run(base_arm(shop.settings.lora_alpha))
    assert isinstance(base, TrialFinished)
    trials = [Trial(trial_id=trial_id(shop.fingerprint, arm), arm=arm) for arm in arms if arm not in shop.outcomes]
    for outcome in shop.executor.run(trials, base.metrics["loss"]):
        shop.folder.journal.append(outcome)
        shop.outcomes[outcome.arm] = outcome
        print(outcome.arm.label(), outcome.arm.stop_at or outcome.arm.steps, outcome.type, flush=True)


def store_grid(name: str, shop: Workshop, model: str, out: Path) -> None:
    """The whole seeds so far, joined to those that the grid's file has."""
    settings, file = shop.settings, out / f"{name}.json.xz"
    extra = {"model": model, "settings": changed(settings)}
    curve = curve_of(name, shop, 1.0, extra) | {"source": "benchmarks/selection/long_grids.py"}
    curve["test_grids"], curve["test_items"] = test_grids(shop, set(curve["seeds"]))
    curve |= along(shop, set(curve["seeds"]))
    seeds = {*curve["seeds"], *stored_seeds(file)}
    curve["partial"] = seeds != set(settings.seeds)
    out.mkdir(parents=True, exist_ok=True)
    store([curve], file)


def along(shop: Workshop, seeds: set[int]) -> dict[str, Any]:
    """What changes during a training: values of the examples at the checkpoints, and the loss of every step."""
    steps, name = shop.settings.max_steps, shop.settings.metric_name
    assert steps is not None
    parts = {round(part * steps): f"{part:g}" for part in shop.checkpoints}
    items: dict[str, Any] = {part: {} for part in parts.values()}
    losses: dict[str, Any] = {}
    for arm, outcome in shop.outcomes.items():
        if not isinstance(outcome, TrialFinished) or arm.rank == 0 or arm.seed not in seeds:
            continue
        if arm.anneal_from is not None or arm.truncate_from is not None:
            continue
        if arm.stop_at in parts:
            scores, _ = outcome.items(name) or ([], [])
            place(items[parts[arm.stop_at]], arm.rank, arm.learning_rate, arm.seed, [round(one, 3) for one in scores])
        elif arm.stop_at is None:
            place(losses, arm.rank, arm.learning_rate, arm.seed, [round(one, 3) for one in outcome.train_losses])
    return {"checkpoint_items": items, "train_losses": losses}


def stored_seeds(file: Path) -> set[int]:
    """The seeds of a grid's file; none before it is there."""
    if not file.exists():
        return set()
    (curve,) = read_json(file)["curves"]
    return set(curve["seeds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=GRIDS)
    parser.add_argument("model", help="folder or GGUF file of the base")
    parser.add_argument("data", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder of finished trainings")
    parser.add_argument("--out", type=Path, required=True, help="folder of the grid's file")
    parser.add_argument("--model-name", required=True)
    parser.add_argument("--store-only", action="store_true", help="train nothing: store the whole seeds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = SelectSettings(**GRIDS[options.name])
    shop = open_workshop(options.model, options.data, settings, options.work)
    missing = [seed for seed in settings.seeds if seed not in stored_seeds(options.out / f"{options.name}.json.xz")]
    for seed in () if options.store_only else missing:
        train_seed(shop, seed)
        store_grid(options.name, shop, options.model_name, options.out)
    if options.store_only:
        store_grid(options.name, shop, options.model_name, options.out)


if __name__ == "__main__":
    main()
