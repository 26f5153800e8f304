"""Measure the resident memory of a process along 500 arms of one executor.

Each arm joins the base, trains, is evaluated, checkpointed, saved and journalled, and leaves. The result is the
resident memory at every tenth of the arms, and its growth from the first fifth, when all caches are filled, to the end.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rightrank.runs.folder import RunFolder
from rightrank.runs.prepare import LocalExecutor
from rightrank.schema.events import Event
from rightrank.schema.trials import Arm, Trial, TrialFinished, TrialStarted, compute_trial_id
from tests.helpers import make_runtime
from tests.tiny import build_small_settings, save_tiny_llama, write_completions
from tests.watch import Watch

RANKS = (1, 2, 4, 8)
STATUS = Path("/proc/self/status")


def read_resident_bytes() -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def build_trials(arms: int) -> list[Trial]:
    """Build trials of four ranks, where each fourth trial has a new seed with its own batches, initial A and order."""
    arms_to_run = [
        Arm(rank=RANKS[number % 4], learning_rate=1e-3, lora_alpha=32.0, seed=number // 4, steps=3)
        for number in range(arms)
    ]
    return [Trial(trial_id=compute_trial_id("leak", arm), arm=arm) for arm in arms_to_run]


def measure(arms: int, root: Path) -> dict[str, Any]:
    """Train all arms, one after the other, and return the resident memory."""
    model, data = save_tiny_llama(root / "model"), write_completions(root / "data.jsonl")
    settings = build_small_settings(ranks=RANKS, max_steps=3, num_evaluations=1, checkpoint_seconds=0.01)
    runtime = make_runtime(model, data, settings, root / "cache")
    folder = RunFolder(root / "run")
    folder.path.mkdir()

    def journal_start(event: Event) -> None:
        if isinstance(event, TrialStarted):
            folder.journal.append(event)

    executor = LocalExecutor(runtime, folder, Watch(on_event=journal_start))
    resident: list[int] = []
    ended = 0
    for outcome in executor.run(build_trials(arms), base_loss=None):
        assert isinstance(outcome, TrialFinished)
        folder.journal.append(outcome)
        ended += 1
        resident.append(read_resident_bytes())
    tenths = [resident[max(0, ended * tenth // 10 - 1)] for tenth in range(1, 11)]
    begun, last = tenths[1], tenths[-1]
    return {
        "arms": ended,
        "resident_mib_by_tenth": [round(value / 2**20, 1) for value in tenths],
        "growth_after_first_fifth": round(last / begun - 1, 4),
        "growth_kib_an_arm": round((last - begun) / 1024 / (ended - ended // 5), 2),
    }
