"""Does a process that trains arm after arm grow? Resident memory along 500 arms of one executor.

Each arm joins the base, trains, is evaluated, checkpointed, saved, journalled, and leaves. Returns
resident memory at every tenth of the way, and its growth from the first fifth (by when all caches are filled) to the
end.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rightrank.runs.folder import RunFolder
from rightrank.runs.local import LocalExecutor
from rightrank.schema.events import Event
from rightrank.schema.trials import Arm, Trial, TrialFinished, TrialStarted, trial_id
from tests.helpers import make_runtime
from tests.tiny import save_tiny_llama, small_settings, write_completions
from tests.watch import Watch

RANKS = (1, 2, 4, 8)
STATUS = Path("/proc/self/status")


def resident_bytes() -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def trials_of(arms: int) -> list[Trial]:
    """So many arms of four ranks, each fourth with a new seed: its own batches, first A and order."""
    made = [
        Arm(rank=RANKS[number % 4], learning_rate=1e-3, lora_alpha=32.0, seed=number // 4, steps=3)
        for number in range(arms)
    ]
    return [Trial(trial_id=trial_id("leak", arm), arm=arm) for arm in made]


def measure(arms: int, root: Path) -> dict[str, Any]:
    """Train them all, one after the other."""
    model, data = save_tiny_llama(root / "model"), write_completions(root / "data.jsonl")
    settings = small_settings(ranks=RANKS, max_steps=3, eval_points=1, checkpoint_seconds=0.01)
    runtime = make_runtime(model, data, settings, root / "cache")
    folder = RunFolder(root / "run")
    folder.path.mkdir()

    def journal_start(event: Event) -> None:
        if isinstance(event, TrialStarted):
            folder.journal.append(event)

    executor = LocalExecutor(runtime, folder, Watch(on_event=journal_start))
    resident: list[int] = []
    ended = 0
    for outcome in executor.run(trials_of(arms), base_loss=None):
        assert isinstance(outcome, TrialFinished)
        folder.journal.append(outcome)
        ended += 1
        resident.append(resident_bytes())
    tenths = [resident[max(0, ended * part // 10 - 1)] for part in range(1, 11)]
    begun, last = tenths[1], tenths[-1]
    return {
        "arms": ended,
        "resident_mib_by_tenth": [round(value / 2**20, 1) for value in tenths],
        "growth_after_first_fifth": round(last / begun - 1, 4),
        "growth_kib_an_arm": round((last - begun) / 1024 / (ended - ended // 5), 2),
    }
