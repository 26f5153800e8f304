"""Eight adapters of one base, from four texts and two ranks, brought to one rank: what each loses, and what a server saves.

    python -m benchmarks.fleet.study MODEL TEXTS --work FOLDER      # TEXTS holds the JSONL files named in `TASKS`

Each adapter is trained for 20 steps on its own text's first rows, and the fleet is measured on rows that it has not seen. Writes results.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.machine import machine
from benchmarks.results import store
from rightrank.data.splits import load_data
from rightrank.models.base_models import load_base
from rightrank.plugins.fleet import fleet
from rightrank.schema.events import Listener
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import Arm, Trial
from rightrank.train.loop import run_trial
from rightrank.train.runtime import Runtime
from rightrank.train.tokens import encode
from rightrank.train.trial import TrialFolders

OUT = Path(__file__).with_name("results.json")
TASKS = ("glosses", "packages", "docstrings", "reviews")
RANKS = (8, 32)
STEPS, ROWS, HELD_OUT, MARGIN = 20, 400, 60, 0.01
SETTINGS = {
    "layers_to_transform": (28, 29),
    "seq_len": 40,
    "eval_items": HELD_OUT,
    "max_steps": STEPS,
    "device": "cpu",
    "margin": MARGIN,
}


def rows_of(texts: Path, task: str, work: Path) -> tuple[Path, Path]:
    """Files of the rows to train on and of those to measure."""
    lines = (texts / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
    train, held_out = work / f"{task}.train.jsonl", work / f"{task}.held_out.jsonl"
    train.write_text("\n".join(lines[:ROWS]) + "\n", encoding="utf-8")
    held_out.write_text("\n".join(lines[ROWS : ROWS + HELD_OUT]) + "\n", encoding="utf-8")
    return train, held_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("texts", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    settings = SelectSettings(**SETTINGS)
    loaded = load_base(given.model, settings, None)
    adapters, data = [], []
    for task in TASKS:
        train, held_out = rows_of(given.texts, task, given.work)
        runtime = Runtime(
            loaded, encode(load_data(train, settings), loaded, settings), settings, STEPS, given.work / f"cache-{task}"
        )
        for rank in RANKS:
            folder = given.work / f"{task}-r{rank}"
            if not folder.exists():
                arm = Arm(rank=rank, learning_rate=3e-3, lora_alpha=32.0, seed=0, steps=STEPS)
                folders = TrialFolders(given.work / f"{task}-{rank}.checkpoint", folder)
                run_trial(runtime, Trial(trial_id=f"{task}{rank}", arm=arm), None, folders, Listener())
                print(folder.name, flush=True)
            adapters.append(folder)
            data.append(held_out)
    found = fleet(
        adapters,
        given.work / "common",
        model=given.model,
        data=data,
        settings=settings,
        notice=lambda line: print(line, flush=True),
    )
    rows = [
        {
            "adapter": Path(one.adapter).name,
            "rank_before": one.rank_before,
            "rank": one.rank,
            "value": round(one.value, 4),
            "loses": {str(c.rank): [round(c.difference, 5), c.holds] for c in one.candidates},
            "relative_delta_error": round(one.relative_delta_error, 4),
        }
        for one in found.adapters
    ]
    result = {
        "machine": machine(),
        "model": Path(given.model).name,
        "steps": STEPS,
        "margin": MARGIN,
        "held_out": HELD_OUT,
        "rank": found.rank,
        "sentence": found.sentence,
        "max_lora_rank": found.max_lora_rank,
        "saved_share": found.saved_share,
        "adapters": rows,
    }
    store(result, OUT)
    print(found.sentence)


if __name__ == "__main__":
    main()
