"""An oracle judge on SmolLM2: of two ranks' adapters, the one with the lower loss on a prompt wins. Does the judged decision agree with the loss's?

    python -m benchmarks.judged.by_loss            # writes by_loss.json

The adapters are those of `glosses_long_400_steps` (SmolLM2-135M, last two layers, WordNet glosses, 400 steps, three seeds, 300 validation examples), each
rank at its best learning rate. A difference below `TIE` nats per token is a tie. The three seeds stand for three judges who see answers of different
trainings. As with people, a win says nothing of how much is won.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.results import store
from rightrank.plugins.judge.judgements import Judgement, decide_judged

OUT = Path(__file__).with_name("by_loss.json")
GRIDS = Path(__file__).parents[1] / "selection" / "seeded_grids.json"
GRID, TIE, REFERENCE = "glosses_long_400_steps", 0.005, 64
MARGINS = (0.02, 0.05, 0.1, 0.2)


def judgements() -> list[Judgement]:
    """Of every rank against the reference, on every validation example, by every seed."""
    curves = json.loads(GRIDS.read_text(encoding="utf-8"))["curves"]
    curve = next(one for one in curves if one["id"] == GRID)
    tokens, losses = curve["item_tokens"], curve["item_losses"]
    best = {rank: min(by_rate, key=lambda rate: _mean(by_rate[rate])) for rank, by_rate in losses.items()}
    found = []
    for rank in sorted(map(int, losses)):
        if rank == REFERENCE:
            continue
        own, top = losses[str(rank)][best[str(rank)]], losses[str(REFERENCE)][best[str(REFERENCE)]]
        for seed in sorted(own.keys() & top.keys()):
            for place, (ours, theirs, count) in enumerate(zip(own[seed], top[seed], tokens, strict=True)):
                worse = (ours - theirs) / count
                outcome = "tie" if abs(worse) < TIE else "b" if worse > 0 else "a"
                row = {
                    "prompt": f"gloss {place}",
                    "rank_a": rank,
                    "rank_b": REFERENCE,
                    "outcome": outcome,
                    "judge": f"seed {seed}",
                }
                found.append(Judgement.model_validate(row))
    return found


def _mean(by_seed: dict[str, list[float]]) -> float:
    return sum(sum(losses) for losses in by_seed.values()) / len(by_seed)


def result() -> dict[str, Any]:
    rows = judgements()
    decisions = {}
    for margin in MARGINS:
        found = decide_judged(rows, margin)
        decisions[str(margin)] = {
            "rank": found.rank,
            "verdict": found.verdict,
            "sentence": found.sentence,
            "next_run": found.next_run,
        }
    ranks = [
        {"rank": one.rank, "win_rate": round(one.value, 4), "low": round(one.low, 4), "high": round(one.high, 4)}
        for one in decide_judged(rows).ranks
    ]
    return {"grid": GRID, "tie": TIE, "judgements": len(rows), "ranks": ranks, "by_margin": decisions}


if __name__ == "__main__":
    found = result()
    print(json.dumps(found, indent=1))
    store(found, OUT)
