"""Truncation with and without recovery against direct training at the same rank, on adapters of a finished run.

    python -m benchmarks.probe.real_adapters RUN DATA [--recover 12] [--top 64]

RUN is a run folder of `rightrank select` (or `demo/run`) with several ranks; DATA is what it was trained on. For each
learning rate the top rank's adapter is truncated to the other ranks and measured on the run's own held-out examples;
differences from direct training at that rank are paired over the examples. Recovery trains all candidates, the top too.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tests.helpers import made_trainable

from benchmarks.probe.common import store
from rightrank.adapters.compare import finished_trial
from rightrank.adapters.held_out import truncation_curve
from rightrank.decision.comparison import estimate
from rightrank.models.adapter_files import open_adapter
from rightrank.schema.settings import SelectSettings
from rightrank.train.adapter_runtime import DataUse, adapter_runtime
from rightrank.train.optimizer import ArmOptimizer, learning_rate_schedule, take_step
from rightrank.train.runtime import Runtime, adapter_attached


def run_settings(run: Path) -> SelectSettings:
    """The run's own settings, as far as data and evaluation go."""
    values = yaml.safe_load((run / "config.yaml").read_text())
    known = {name: value for name, value in values.items() if name in SelectSettings.model_fields and value is not None}
    return SelectSettings(**known | {"layers_to_transform": None, "target_modules": ["all-linear"]})


def difference(left: Any, right: Any) -> dict[str, float]:
    """Left minus right, nats a token, with its 95% interval, paired over examples."""
    sums = np.array([left.item_losses]) - np.array([right.item_losses])
    found = estimate(sums, np.array(left.item_tokens, dtype=float))
    return {"difference": found.mean, "low": found.bound(0.025), "high": found.bound(0.975)}


def recover(runtime: Runtime, peft_model: Any, learning_rate: float, seed: int) -> None:
    """Train the attached adapter for the runtime's steps."""
    schedule, plan = learning_rate_schedule(runtime.settings, runtime.steps), runtime.batch_plan(seed)
    optimizer = ArmOptimizer(runtime, made_trainable(peft_model), learning_rate, plan, schedule)
    for _ in range(runtime.steps):
        take_step(
            [optimizer],
            lambda batches, _: [
                runtime.losses("train", batches[0], 1 / optimizer.labels, backward=True).example_losses
            ],
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--recover", type=int, default=12)
    parser.add_argument("--top", type=int, default=64)
    parser.add_argument("--name", default="real_adapters")
    arguments = parser.parse_args()
    from rightrank.schema.trials import TrialFinished

    lines = [json.loads(line) for line in (arguments.run / "journal.jsonl").read_text().splitlines()]
    trials = [TrialFinished.model_validate(line) for line in lines if line["type"] == "trial_finished"]
    settings = run_settings(arguments.run)
    rows: list[dict[str, Any]] = []
    for top in (trial for trial in trials if trial.rank == arguments.top):
        direct = {t.rank: t for t in trials if t.learning_rate == top.learning_rate and t.seed == top.seed}
        adapter = open_adapter(arguments.run / "trials" / top.trial_id)
        with tempfile.TemporaryDirectory() as name:
            use = DataUse(arguments.data, settings, Path(name) / "cache", arguments.recover)
            runtime = adapter_runtime(adapter, None, use)
            found = truncation_curve(adapter, runtime, sorted(direct), Path(name)).trials
            for plain in [trial for trial in found if trial.rank]:
                with adapter_attached(runtime, Path(name) / plain.trial_id) as model:
                    recover(runtime, model, top.learning_rate, top.seed + 1)
                    scores = runtime.evaluate("selection")
                steps = arguments.recover
                found.append(finished_trial(plain.trial_id, plain.rank, scores, settings.metric, steps=steps))
        for measured in sorted(found, key=lambda trial: (trial.steps, trial.rank)):
            if measured.rank == 0:
                continue
            row = {
                "learning_rate": top.learning_rate,
                "seed": top.seed,
                "rank": measured.rank,
                "recovery_steps": measured.steps,
                "value": measured.value,
                "direct": direct[measured.rank].value,
                "against_direct": difference(measured, direct[measured.rank]),
            }
            rows.append(row)
            print(
                f"lr {top.learning_rate:g} rank {measured.rank:>3} recovery {measured.steps:>3}: {measured.value:.4f} "
                f"direct {row['direct']:.4f} difference {row['against_direct']['difference']:+.4f} "
                f"[{row['against_direct']['low']:+.4f}, {row['against_direct']['high']:+.4f}]",
                flush=True,
            )
    store(arguments.name, {"run": {"steps": trials[-1].steps, "top": arguments.top}, "rows": rows})


if __name__ == "__main__":
    main()
