"""DoRA beside LoRA on the demo's data: the same ranks, learning rate, seed, batches and first A, paired by example.

python -m benchmarks.kinds.dora FOLDER      # runs two selections in FOLDER; writes dora.json beside this file
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tests.watch import Watch

from benchmarks.machine import machine
from rightrank import select_rank
from rightrank.decision.comparison import estimate
from rightrank.decision.records import records_of
from rightrank.demo import DEMO_SETTINGS, prepare_docstrings, prepare_model_folder
from rightrank.runs.folder import RunFolder
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import TrialFinished

SETTINGS: dict[str, Any] = DEMO_SETTINGS.model_dump(include=DEMO_SETTINGS.model_fields_set) | {
    "strategy": "grid",
    "ranks": (4, 16),
    "learning_rates": (3e-3,),
    "eval_items": 120,
}


def best_by_rank(run: Path) -> dict[int, TrialFinished]:
    """The whole training of each rank with the lowest loss over its learning rates."""
    found: dict[int, TrialFinished] = {}
    for trial in records_of(RunFolder(run).journal.read(), str(run)).finished():
        if trial.rank > 0 and trial.truncate_from is None and trial.stop_at is None:
            best = found.get(trial.rank)
            found[trial.rank] = trial if best is None or trial.value < best.value else best
    return found


def compared(lora: dict[int, TrialFinished], dora: dict[int, TrialFinished]) -> list[dict[str, Any]]:
    """By rank: both losses in nats a label, and the paired difference DoRA − LoRA with its 95% interval."""
    rows = []
    for rank in sorted(lora.keys() & dora.keys()):
        one, other = lora[rank], dora[rank]
        differences = np.array(other.item_losses) - np.array(one.item_losses)
        found = estimate(differences[None], np.array(one.item_tokens, dtype=float))
        rows.append(
            {
                "rank": rank,
                "lora": one.value,
                "dora": other.value,
                "difference": found.mean,
                "low": found.bound(0.025),
                "high": found.bound(0.975),
                "lora_learning_rate": one.learning_rate,
                "dora_learning_rate": other.learning_rate,
                "lora_parameters": one.trainable_parameters,
                "dora_parameters": other.trainable_parameters,
            }
        )
    return rows


def main(folder: Path) -> None:
    observer = Watch(notice=lambda line: print(line, flush=True))
    model, data = prepare_model_folder(folder / "base_model", print), prepare_docstrings(folder / "docstrings.jsonl")
    decisions = {}
    for name, use_dora in (("lora", False), ("dora", True)):
        settings = SelectSettings(**SETTINGS | {"use_dora": use_dora})
        selected = select_rank(str(model), data, folder / name, settings=settings, callbacks=[observer])
        assert selected.decision is not None
        decisions[name] = {"rank": selected.decision.rank, "verdict": selected.decision.verdict}
        decisions[name] |= {"adapter_rank": selected.adapter.rank}
    rows = compared(best_by_rank(folder / "lora"), best_by_rank(folder / "dora"))
    result = {"machine": machine(), "settings": SETTINGS, "selected": decisions, "ranks": rows}
    (Path(__file__).parent / "dora.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
