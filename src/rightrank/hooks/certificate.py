"""The certificate of a selection: one arm is trained again, alone, and compared with its result in the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

import torch
from safetensors.torch import load_file

from rightrank.runs.hook import Hook, Run
from rightrank.runs.values import Selected
from rightrank.schema.errors import RunError
from rightrank.schema.events import Certified, Event, Listener, StepDone
from rightrank.schema.trials import Trial, TrialFinished
from rightrank.train.loop import run_trial
from rightrank.train.runtime import Runtime
from rightrank.train.trial import TrialFolders


class Certificate(Hook):
    """Trains one arm again, alone, and journals how far it is from its trial. A run that has a certificate keeps it.

    The arm is the one handed over. If that one was truncated from another adapter, it is the arm that shared its
    passes with the most others.
    """

    def on_end(self, run: Run, _selected: Selected) -> None:
        records, prepared = run.records, run.prepared
        assert prepared is not None
        if not records.certificates:
            handed_over = records.adapters[-1].answer.trial_id
            trained = [trial for trial in records.finished() if trial.rank > 0 and trial.is_direct]
            fullest = max(trained, key=lambda one: (one.adapters_per_pass, one.steps))
            trial = next((one for one in trained if one.trial_id == handed_over), fullest)
            adapter, scratch = run.folder.finished_adapter(trial.trial_id), run.folder.cache / "certify"
            run.on_event(certify(prepared.runtime, trial, adapter, scratch, _StepsOnly(run), _seed_difference(trained)))
        run.notice(records.certificates[-1].sentence())


class _StepsOnly(Listener):
    """Passes on the steps of the certificate's training, which is no trial of the run."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def on_event(self, event: Event) -> None:
        if isinstance(event, StepDone):
            self._run.on_event(event)

    def should_stop(self) -> bool:
        return self._run.should_stop()


def _seed_difference(trials: Sequence[TrialFinished]) -> float | None:
    """The mean absolute difference of the held-out value between two seeds of one rank and learning rate.

    None if no cell has two seeds.
    """
    cells: dict[tuple[int, float, int], list[float]] = {}
    for trial in trials:
        cells.setdefault((trial.rank, trial.learning_rate, trial.steps), []).append(trial.value)
    pairs = [abs(a - b) for values in cells.values() for a, b in combinations(values, 2)]
    return sum(pairs) / len(pairs) if pairs else None


STEP_BOUND = 1e-5  # relative, of the loss of one step from the same state, float32
RUN_BOUND = 1e-3  # relative, of losses and adapter over a whole training, float32
MAX_SEED_SHARE = 0.1  # below float32: of the difference between two seeds


def certify(
    runtime: Runtime,
    trial: TrialFinished,
    adapter: Path,
    scratch: Path,
    listener: Listener,
    seed_difference: float | None,
) -> Certified:
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
        raise RunError(f"{arm.label()} ended without a result when trained again alone: {again.reason}")
    losses = zip(trial.train_losses, again.train_losses, strict=True)
    differences = [abs(a - b) / max(abs(b), 1e-12) for a, b in losses] or [0.0]
    step, run = differences[0], max(differences)
    tensors = _tensor_difference(
        load_file(adapter / "adapter_model.safetensors"), load_file(folders.adapter / "adapter_model.safetensors")
    )
    value = abs(trial.value - again.value)
    exact = next(runtime.model.parameters()).dtype == torch.float32
    exact_enough = step <= STEP_BOUND and run <= RUN_BOUND and tensors <= RUN_BOUND
    within_noise = None if seed_difference is None else value <= MAX_SEED_SHARE * seed_difference
    return Certified(
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


def _tensor_difference(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    """‖one − other‖ / ‖other‖ over all A, over all B and over any other tensors; the largest of the three."""
    assert one.keys() == other.keys()
    found = 0.0
    for part in ("_A", "_B", ""):
        names = [name for name in one if (part in name if part else "_A" not in name and "_B" not in name)]
        norm = sum(float(other[name].double().square().sum()) for name in names)
        difference = sum(float((one[name].double() - other[name].double()).square().sum()) for name in names)
        if norm > 0:
            found = max(found, (difference / norm) ** 0.5)
    return found
