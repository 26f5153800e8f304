"""How the rank that is enough moves with the length of the training, on data that never repeat.

    python -m benchmarks.selection.horizon texts deb/usr/share/wordnet --out kinds.jsonl
    python -m benchmarks.selection.horizon train MODEL kinds.jsonl --work FOLDER --out benchmarks/selection/horizon.json
    python -m benchmarks.selection.horizon draw                                   # horizon.svg from the stored results

From the gloss of any word of WordNet, which of its lexicographer files it is in: over 100,000 rows, of which a training sees each once. The learning
rate is constant after its warm-up, so a training is measured at every horizon; at each, a copy decays linearly to 0 over a tenth of the
steps so far, as the end of a training of about that length, and is what counts.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine
from benchmarks.selection import wide_grids
from benchmarks.selection.long_grids import run_all
from benchmarks.selection.more_texts import LEAST, _synsets
from benchmarks.selection.real_training import COMMON, CONSTANT, Workshop, open_workshop
from benchmarks.selection.texts import PARTS_OF_SPEECH
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import Arm, TrialFinished

HERE = Path(__file__).parent
STORED, PICTURE = HERE / "horizon.json", HERE / "horizon.svg"
HORIZONS = (400, 1600, 6400, 12000)
ANNEALED = 0.1  # of the steps so far
MARGINS = (0.005, 0.02, 0.05)
SETTINGS = COMMON | CONSTANT | {
    "seeds": (0, 1), "max_steps": HORIZONS[-1] + 1200, "learning_rates": (5e-4, 2e-3), "layers_to_transform": (2,), "seq_len": 24,
    "adapters_per_pass": 8, "eval_batch_size": 64, "eval_items": 2000, "validation_fraction": 0.02, "test_fraction": 0.0,
}  # fmt: skip


def texts(wordnet: Path, out: Path) -> None:
    rows = [
        {"text": gloss, "label": f"kind {kind}"}
        for part in PARTS_OF_SPEECH
        for kind, gloss in _synsets(wordnet / f"data.{part}")
    ]
    by_text = {row["text"]: row for row in rows}
    counts = Counter(row["label"] for row in by_text.values())
    kept = [row for row in by_text.values() if counts[row["label"]] >= LEAST]
    out.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    print(len(kept), "rows")


def train(shop: Workshop, out: Path) -> None:
    """Horizon by horizon, both seeds, so that what is there when time ends is whole."""
    settings, steps = shop.settings, shop.settings.max_steps
    assert steps is not None
    latest: dict[tuple[int, float, int], str | None] = {
        (rank, rate, seed): None
        for seed in settings.seeds
        for rate in settings.learning_rates
        for rank in settings.ranks
    }
    for horizon in HORIZONS:
        arms = [
            Arm(rank=rank, learning_rate=rate, lora_alpha=settings.lora_alpha, seed=seed, steps=steps, stop_at=horizon, continue_from=before)
            for (rank, rate, seed), before in latest.items()
        ]  # fmt: skip
        run_all(shop, arms)
        done = [outcome for arm in arms if isinstance(outcome := shop.outcomes.get(arm), TrialFinished)]
        latest = {(o.rank, o.learning_rate, o.seed): o.trial_id for o in done}
        end = {"stop_at": horizon + round(ANNEALED * horizon), "anneal_from": horizon}
        run_all(shop, [o.arm.model_copy(update=end | {"continue_from": o.trial_id}) for o in done])
        store(shop, out)


def store(shop: Workshop, out: Path) -> None:
    """Value of every annealed copy, and of the training that it is a copy of, with the examples' losses of the copies."""
    rows = []
    for arm, outcome in shop.outcomes.items():
        if isinstance(outcome, TrialFinished) and arm.rank > 0 and arm.stop_at is not None:
            horizon = arm.anneal_from or arm.stop_at
            rows.append({
                "rank": arm.rank, "learning_rate": arm.learning_rate, "seed": arm.seed, "steps": horizon, "annealed": arm.anneal_from is not None,
                "loss": round(outcome.metrics["loss"], 5), "accuracy": round(outcome.metrics["accuracy"], 5),
                "item_losses": [round(loss, 2) for loss in outcome.item_losses] if arm.anneal_from else [],
            })  # fmt: skip
    head = {
        "machine": machine(),
        "base": "paraphrase-MiniLM-L3-v2, the last layer",
        "rows": len(shop.runtime.data.splits["train"]),
    }
    out.write_text(json.dumps(head | {"trainings": rows}, separators=(",", ":")) + "\n")


def table(stored: dict[str, Any]) -> dict[int, dict[int, float]]:
    """Steps → rank → loss of the annealed copies, in the mean of the seeds, at the best learning rate of each rank."""
    found: dict[int, dict[int, float]] = {}
    copies = [row for row in stored["trainings"] if row["annealed"]]
    for steps in sorted({row["steps"] for row in copies}):
        for rank in sorted({row["rank"] for row in copies}):
            here = [row for row in copies if row["steps"] == steps and row["rank"] == rank]
            by_rate = {
                rate: [row["loss"] for row in here if row["learning_rate"] == rate]
                for rate in {r["learning_rate"] for r in here}
            }
            found.setdefault(steps, {})[rank] = min(sum(losses) / len(losses) for losses in by_rate.values())
    return found


def enough(losses: dict[int, float], margin: float) -> int:
    return next(rank for rank in sorted(losses) if losses[rank] - min(losses.values()) <= margin)


def draw(stored: dict[str, Any]) -> None:
    """Each rank's loss beyond rank 64's, against the steps."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    losses = table(stored)
    top = max(next(iter(losses.values())))
    figure, axis = plt.subplots(figsize=(6, 3.8))
    for rank in sorted(next(iter(losses.values()))):
        axis.plot(
            list(losses), [by_rank[rank] - by_rank[top] for by_rank in losses.values()], "o-", label=f"rank {rank}"
        )
    axis.set_xscale("log")
    axis.set_xticks(list(losses), [f"{steps:,}" for steps in losses])
    axis.minorticks_off()
    axis.set_xlabel("steps of 8 examples, none seen twice")
    axis.set_ylabel(f"held-out loss beyond rank {top}, nats")
    axis.axhline(0, color="grey", linewidth=0.5)
    axis.legend()
    figure.tight_layout()
    figure.savefig(PICTURE, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("texts")
    made.add_argument("source", type=Path)
    made.add_argument("--out", type=Path, required=True)
    trained = commands.add_parser("train")
    trained.add_argument("model")
    trained.add_argument("data", type=Path)
    trained.add_argument("--work", type=Path, required=True)
    trained.add_argument("--out", type=Path, default=STORED)
    commands.add_parser("draw")
    options = parser.parse_args()
    if options.command == "texts":
        texts(options.source, options.out)
    elif options.command == "train":
        torch.set_num_threads(1)
        shop = open_workshop(options.model, options.data, SelectSettings(**SETTINGS), options.work, ())
        wide_grids.speed_up(shop)
        train(shop, options.out)
    else:
        stored = json.loads(STORED.read_text())
        for steps, losses in table(stored).items():
            print(
                steps,
                {rank: round(loss, 4) for rank, loss in losses.items()},
                {margin: enough(losses, margin) for margin in MARGINS},
            )
        draw(stored)


if __name__ == "__main__":
    main()
