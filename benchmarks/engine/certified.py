"""Certify an arm that trained in a pass of three: train it again alone, in float32 and in bfloat16.

python -m benchmarks.engine.certified MODEL DATA [--layers 28,29] [--steps 6] [--out certified.json]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.engine.common import describe_machine, make_runtime
from rightrank.schema.errors import RunError
from rightrank.schema.events import Listener
from rightrank.schema.trials import Arm, Trial, TrialFinished
from rightrank.training.loop import run_trial, train_trials
from rightrank.training.runtime import Runtime
from rightrank.training.trial import TrialFolders

ARMS = (
    (16, 0),
    (16, 1),
    (4, 0),
)  # rank and seed; the first is certified, the second measures the difference between seeds


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """A comparison of an arm that was trained alone with its multi-LoRA training. Differences are relative unless stated."""

    trial_id: str
    rank: int
    adapters_per_pass: int
    steps: int
    first_step_difference: float  # of the training loss
    loss_difference: float  # of the training loss, the maximum over all steps
    adapter_difference: float  # of the norm of the final adapter's tensors
    value_difference: float  # of the held-out value; absolute
    seed_difference: float | None  # between two seeds of the same rank and learning rate; absolute; None with one seed
    exact: bool  # the model is in float32
    passed: bool | None  # None if not in float32 and without a second seed

    def format_sentence(self) -> str:
        """Describe the comparison in one paragraph."""
        pass_text = f"with {self.adapters_per_pass} adapters per pass" if self.adapters_per_pass > 1 else "alone"
        yardstick = "" if self.seed_difference is None else f" (two seeds differ by {self.seed_difference:.2g})"
        verdict = {True: "the same", False: "NOT the same", None: "no second seed to compare with"}[self.passed]
        return (
            f"Rank {self.rank} was trained {pass_text} and again alone: {verdict}. Relative differences: "
            f"{self.first_step_difference:.1e} in the first step's loss, {self.loss_difference:.1e} at most in "
            f"{self.steps} steps, {self.adapter_difference:.1e} in the adapter; held-out {self.value_difference:.1e}{yardstick}."
        )


STEP_BOUND = 1e-5  # relative, of the loss of one step from the same state, float32
RUN_BOUND = 1e-3  # relative, of losses and adapter over a full training, float32
MAX_SEED_SHARE = 0.1  # below float32, relative to the difference between two seeds


def certify(
    runtime: Runtime,
    trial: TrialFinished,
    adapter: Path,
    scratch: Path,
    listener: Listener,
    seed_difference: float | None,
) -> Certificate:
    """Train the arm of `trial` again, alone and from its start, and return the differences.

    Args:
        adapter: the folder of its trained adapter.
        seed_difference: the difference of the held-out value between two seeds of one rank and learning rate; None if
            the run has one seed. It sets the bound for a model that is not in float32.

    Raises:
        RunError: the repeated training ended without a result.
        InterruptedRun: the listener asked to stop; a checkpoint was written.
    """
    arm = trial.arm.model_copy(update={"continue_from": None})
    folders = TrialFolders(scratch / f"{trial.trial_id}.safetensors", scratch / trial.trial_id)
    again = run_trial(runtime, Trial(trial_id=trial.trial_id, arm=arm), None, folders, listener)
    if not isinstance(again, TrialFinished):
        raise RunError(f"{arm.format_label()} ended without a result when trained again alone: {again.reason}")
    losses = zip(trial.train_losses, again.train_losses, strict=True)
    differences = [abs(a - b) / max(abs(b), 1e-12) for a, b in losses] or [0.0]
    step, run = differences[0], max(differences)
    tensors = _compute_tensor_difference(
        load_file(adapter / "adapter_model.safetensors"), load_file(folders.adapter / "adapter_model.safetensors")
    )
    value = abs(trial.value - again.value)
    exact = next(runtime.model.parameters()).dtype == torch.float32
    exact_enough = step <= STEP_BOUND and run <= RUN_BOUND and tensors <= RUN_BOUND
    within_noise = None if seed_difference is None else value <= MAX_SEED_SHARE * seed_difference
    return Certificate(
        trial_id=trial.trial_id,
        rank=trial.rank,
        adapters_per_pass=trial.adapters_per_pass,
        steps=len(trial.train_losses),
        first_step_difference=step,
        loss_difference=run,
        adapter_difference=tensors,
        value_difference=value,
        seed_difference=seed_difference,
        exact=exact,
        passed=exact_enough if exact else within_noise,
    )


def _compute_tensor_difference(
    tensors: Mapping[str, torch.Tensor], expected_tensors: Mapping[str, torch.Tensor]
) -> float:
    """Return the largest of ‖A − B‖ / ‖B‖ over all lora_A, all lora_B, and all other tensors."""
    assert tensors.keys() == expected_tensors.keys()
    largest = 0.0
    for suffix in ("_A", "_B", ""):
        names = [name for name in tensors if (suffix in name if suffix else "_A" not in name and "_B" not in name)]
        norm = sum(float(expected_tensors[name].double().square().sum()) for name in names)
        difference = sum(
            float((tensors[name].double() - expected_tensors[name].double()).square().sum()) for name in names
        )
        if norm > 0:
            largest = max(largest, (difference / norm) ** 0.5)
    return largest


def measure(arguments: argparse.Namespace, dtype: str) -> dict[str, Any]:
    work = arguments.work / dtype
    changes: dict[str, Any] = {"layers_to_transform": arguments.layers, "max_eval_examples": 24, "seeds": (0, 1)}
    runtime = make_runtime(arguments.model, arguments.data, arguments.steps, work / "cache", dtype=dtype, **changes)
    trials = [
        Trial(
            trial_id=f"c{number}",
            arm=Arm(rank=rank, learning_rate=1e-3, lora_alpha=32.0, seed=seed, steps=arguments.steps),
        )
        for number, (rank, seed) in enumerate(ARMS)
    ]

    def folders(trial: Trial) -> TrialFolders:
        return TrialFolders(work / f"{trial.trial_id}.safetensors", work / trial.trial_id)

    ended = list(train_trials(runtime, trials, None, folders, Listener(), len(ARMS)))
    finished = {outcome.trial_id: outcome for outcome in ended if isinstance(outcome, TrialFinished)}
    seeds = abs(finished["c0"].value - finished["c1"].value)
    certified = certify(runtime, finished["c0"], work / "c0", work / "again", Listener(), seeds)
    return asdict(certified) | {"dtype": dtype, "sentence": certified.format_sentence()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--layers", type=lambda text: tuple(map(int, text.split(","))), default=(28, 29))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--work", type=Path, default=Path("bench-work"))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    result = {"machine": describe_machine(), "runs": [measure(arguments, dtype) for dtype in ("float32", "bfloat16")]}
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
