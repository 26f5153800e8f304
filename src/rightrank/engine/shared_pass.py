"""One optimizer step, or one evaluation, of several arms in one pass over the base."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rightrank.engine.arm_training import ArmTraining
from rightrank.engine.evaluation import Scores
from rightrank.engine.memory import free_memory, is_recoverable_oom
from rightrank.engine.multi_lora import MultiLora
from rightrank.engine.outcome import Diverged
from rightrank.engine.runtime import Runtime
from rightrank.errors import first_line
from rightrank.records import Trial, TrialFailed, TrialOutcome

Ended = dict[str, TrialOutcome]  # outcomes of trials that ended without a result, by trial id


def step_all(runtime: Runtime, multi_lora: MultiLora, trainings: Sequence[ArmTraining]) -> Ended:
    """One optimizer step of every training, with one pass over the base per micro-batch.

    The trainings share the wall time evenly. Returns the outcomes of those that end in the step without a result.
    """
    begun = time.perf_counter()
    batches = [training.micro_batches() for training in trainings]
    for micro in zip(*batches, strict=True):
        arm_batches = [training.arm_batch(batch) for training, batch in zip(trainings, micro, strict=True)]
        for training, losses in zip(trainings, runtime.accumulate_gradients(multi_lora, arm_batches), strict=True):
            training.add_losses(float(losses.sum()))
    for training in trainings:
        training.update()
    ended: Ended = {}
    seconds = (time.perf_counter() - begun) / len(trainings)
    for training in trainings:
        try:
            training.end_step(seconds)
        except Diverged as reason:
            ended[training.trial.trial_id] = reason.outcome()
    due = [t for t in trainings if t.wants_evaluation and t.trial.trial_id not in ended]
    return ended | (evaluate_all(runtime, multi_lora, due) if due else {})


def evaluate_all(
    runtime: Runtime, multi_lora: MultiLora, trainings: Sequence[ArmTraining], retry: bool = True
) -> Ended:
    """Held-out scores of every training; returns the outcomes of those that end without a result.

    On running out of memory each half is evaluated in its own pass, and a single training is retried once.
    """
    begun = time.perf_counter()
    try:
        all_scores = runtime.evaluate_adapters("selection", multi_lora, [training.adapter for training in trainings])
    except (RuntimeError, MemoryError) as error:
        if not is_recoverable_oom(error):
            raise
        reason = first_line(error)
    else:
        return _take_scores(trainings, all_scores, (time.perf_counter() - begun) / len(trainings))
    # Outside the `except` block, whose traceback keeps the tensors of the failed pass.
    if len(trainings) > 1:
        half = len(trainings) // 2
        return evaluate_all(runtime, multi_lora, trainings[:half]) | evaluate_all(runtime, multi_lora, trainings[half:])
    if retry:
        free_memory(runtime.loaded.device)
        return evaluate_all(runtime, multi_lora, trainings, retry=False)
    trial = trainings[0].trial
    return {trial.trial_id: out_of_memory(trial, runtime, reason)}


def _take_scores(trainings: Sequence[ArmTraining], all_scores: Sequence[Scores], seconds: float) -> Ended:
    ended: Ended = {}
    for training, scores in zip(trainings, all_scores, strict=True):
        try:
            training.take_scores(scores, seconds)
        except Diverged as reason:
            ended[training.trial.trial_id] = reason.outcome()
    return ended


def out_of_memory(trial: Trial, runtime: Runtime, reason: str) -> TrialFailed:
    return TrialFailed(
        **trial.fields,
        error="out_of_memory",
        reason=f"{trial.arm.label()} ran out of memory on {runtime.loaded.device}: {reason}",
    )
