"""Trials trained together: up to so many arms on one base, each step of all of them in one pass.

An arm that ends, diverges or is stopped leaves the pass, and the next one joins. When a pass runs out of memory half
of the arms are set aside with a checkpoint and the others go on; nothing is lost, and the result is the same. An arm
that runs out of memory alone is tried once more from where it was; then it ends as `out_of_memory`. A checkpoint goes
when whoever asked for outcomes asks for the next: only then is the outcome known to be kept.
"""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch

from rightrank.engine.arm_training import ArmTraining, TrialFolders, adapter_name
from rightrank.engine.memory import PeakMemory, is_recoverable_oom
from rightrank.engine.multi_lora import MultiLora
from rightrank.engine.outcome import Diverged, Progress, Seen, finished
from rightrank.engine.runtime import Runtime
from rightrank.engine.scoring import measure
from rightrank.errors import InterruptedRun, MetricError, first_line
from rightrank.records import Trial, TrialFailed, TrialFinished, TrialOutcome, TrialStarted
from rightrank.records.observer import Observer

Folders = Callable[[Trial], TrialFolders]


def run_trial(
    runtime: Runtime, trial: Trial, base_loss: float | None, folders: TrialFolders, observer: Observer
) -> TrialOutcome:
    """Train (or, for rank 0, only evaluate) one trial alone; see `train_trials`."""
    return next(train_trials(runtime, [trial], base_loss, lambda _: folders, observer))


def train_trials(
    runtime: Runtime,
    trials: Sequence[Trial],
    base_loss: float | None,
    folders: Folders,
    observer: Observer,
    adapters_per_pass: int = 1,
) -> Iterator[TrialOutcome]:
    """Outcomes in the order in which the trials end; each finished one's adapter is saved.

    `base_loss` is the base's held-out loss, against which divergence is judged; None only for the base itself.
    Closed early, it leaves a checkpoint of every arm under way.

    Raises:
        InterruptedRun: the observer asked to stop; checkpoints were written.
    """
    for trial in trials:
        if trial.arm.rank == 0:
            observer.on_event(started(trial))
            yield evaluate_base(runtime, trial, folders(trial))
    trained = [trial for trial in trials if trial.arm.rank > 0]
    if trained:
        with MultiLora(runtime.model, runtime.settings) as multi_lora, runtime.recomputing():
            yield from _Together(runtime, multi_lora, base_loss, folders, observer, adapters_per_pass).run(trained)


def evaluate_base(runtime: Runtime, trial: Trial, folders: TrialFolders) -> TrialFinished:
    """Rank 0: the base itself. A metric that fails here would fail everywhere: nothing is trained.

    Raises:
        MetricError: one failed.
    """
    with PeakMemory(runtime.loaded.device) as memory:
        begun = time.perf_counter()
        scores = runtime.evaluate("selection")
        evaluated = time.perf_counter()
        measured = measure(runtime, "selection", folders.answers)
        measured.require(list(measured.failed))
        ended = time.perf_counter()
        progress = Progress(eval_seconds=ended - begun, answer_seconds=ended - evaluated)
        return finished(trial, runtime, progress, Seen(scores, measured), 0, memory.peak_bytes(), [trial.arm.rank])


class _Together:
    """The arms under way and those that wait."""

    def __init__(
        self,
        runtime: Runtime,
        multi_lora: MultiLora,
        base_loss: float | None,
        folders: Folders,
        observer: Observer,
        adapters_per_pass: int,
    ) -> None:
        self._runtime = runtime
        self._multi_lora = multi_lora
        self._base_loss = base_loss
        self._folders = folders
        self._observer = observer
        self._limit = adapters_per_pass
        self._waiting: deque[Trial] = deque()
        self._running: list[ArmTraining] = []
        self._started: set[str] = set()
        self._retried: set[str] = set()  # ran out of memory alone once

    def run(self, trials: Sequence[Trial]) -> Iterator[TrialOutcome]:
        self._waiting.extend(by_seed(trials))
        try:
            with PeakMemory(self._runtime.loaded.device) as memory:
                while self._waiting or self._running:
                    before = len(self._running)
                    yield from self._fill()
                    if len(self._running) > before:
                        memory.restart()
                    yield from self._finish(memory)  # one that goes on from its last step
                    if self._running:
                        yield from self._step()
                        yield from self._finish(memory)
                    self._pause_if_asked()
        except GeneratorExit:  # whoever asked wants no more for now
            for training in self._running:
                training.save()
            raise

    def _fill(self) -> Iterator[TrialOutcome]:
        """Let arms join up to the limit; the outcomes of those for which even alone there is no memory."""
        while self._waiting and len(self._running) < self._limit:
            trial = self._waiting.popleft()
            if trial.trial_id not in self._started:
                self._observer.on_event(started(trial))
                self._started.add(trial.trial_id)
            try:
                self._running.append(self._join(trial))
            except (RuntimeError, MemoryError) as error:
                if not is_recoverable_oom(error):
                    raise
                reason = first_line(error)
                self._multi_lora.remove(adapter_name(trial))
                self._free()
                if self._running:
                    self._waiting.appendleft(trial)
                    self._go_on_with(len(self._running), len(self._running) + 1)
                elif self._may_retry(trial):
                    self._waiting.appendleft(trial)
                else:
                    yield out_of_memory(trial, self._runtime, reason)
        # Neighbours of one rank share a batched product.
        self._running.sort(key=lambda training: training.trial.arm.rank)
        for training in self._running:
            training.note_pass([other.trial.arm.rank for other in self._running if other is not training])

    def _join(self, trial: Trial) -> ArmTraining:
        return ArmTraining(
            self._runtime, trial, self._multi_lora, self._base_loss, self._folders(trial), self._observer
        )

    def _step(self) -> Iterator[TrialOutcome]:
        """One step of all; the outcomes of those that end in it without a result."""
        try:
            lost = step_all(self._runtime, self._multi_lora, self._running)
        except (RuntimeError, MemoryError) as error:
            if not is_recoverable_oom(error):
                raise
            reason = first_line(error)
        else:
            yield from self._lose(lost)
            return
        self._free()
        trial = self._running[0].trial
        if len(self._running) > 1:
            self._halve()
        elif self._may_retry(trial):
            self._running.pop().set_aside()
            self._waiting.appendleft(trial)
        else:
            yield from self._lose({trial.trial_id: out_of_memory(trial, self._runtime, reason)})

    def _may_retry(self, trial: Trial) -> bool:
        """Once for each trial: what filled the memory may have been passing."""
        if trial.trial_id in self._retried:
            return False
        self._retried.add(trial.trial_id)
        self._observer.notice(
            f"{trial.arm.label()} ran out of memory on {self._runtime.loaded.device}: trying it once more"
        )
        return True

    def _lose(self, lost: dict[str, TrialOutcome]) -> Iterator[TrialOutcome]:
        for training in [training for training in self._running if training.trial.trial_id in lost]:
            self._running.remove(training)
            training.leave()
            yield lost[training.trial.trial_id]
            training.drop_checkpoint()

    def _halve(self) -> None:
        before = len(self._running)
        for training in reversed(self._running[before // 2 :]):
            training.set_aside()
            self._waiting.appendleft(training.trial)
        del self._running[before // 2 :]
        self._go_on_with(before // 2, before)

    def _go_on_with(self, limit: int, tried: int) -> None:
        self._limit = limit
        self._observer.notice(
            f"{tried} trainings together ran out of memory on {self._runtime.loaded.device}: going on with {limit}"
        )

    def _free(self) -> None:
        free_memory(self._runtime.loaded.device)

    def _finish(self, memory: PeakMemory) -> Iterator[TrialFinished]:
        for training in [training for training in self._running if training.is_done]:
            try:
                outcome = training.finish(memory.peak_bytes())
            except MetricError:  # nothing that was trained is lost
                for under_way in self._running:
                    under_way.save()
                raise
            self._running.remove(training)
            yield outcome
            if (
                training.trial.arm.stop_at is None or training.trial.arm.is_annealed
            ):  # from one stopped early another may go on
                training.drop_checkpoint()

    def _pause_if_asked(self) -> None:
        """Checkpoints now and then, and of all when asked to stop."""
        stopping = bool(self._running) and self._observer.should_stop()
        for training in self._running:
            if stopping or training.is_checkpoint_due:
                training.save()
        if stopping:
            first = self._running[0]
            others = f" and {len(self._running) - 1} more" if len(self._running) > 1 else ""
            raise InterruptedRun(
                f"stopped at step {first.progress.step} of {first.trial.arm.steps} of {first.trial.arm.label()}{others}"
            )


def step_all(runtime: Runtime, multi_lora: MultiLora, trainings: Sequence[ArmTraining]) -> dict[str, TrialOutcome]:
    """One optimizer step of every training in one pass over the base; the outcomes of those that are lost in it.

    The wall time is shared out evenly.
    """
    begun = time.perf_counter()
    batches = [training.micro_batches() for training in trainings]
    for micro in zip(*batches, strict=True):
        arm_batches = [training.arm_batch(batch) for training, batch in zip(trainings, micro, strict=True)]
        for training, losses in zip(trainings, runtime.accumulate_gradients(multi_lora, arm_batches), strict=True):
            training.add_losses(float(losses.sum()))
    for training in trainings:
        training.update()
    lost: dict[str, TrialOutcome] = {}
    seconds = (time.perf_counter() - begun) / len(trainings)
    for training in trainings:
        try:
            training.end_step(seconds)
        except Diverged as reason:
            lost[training.trial.trial_id] = reason.outcome()
    due = [t for t in trainings if t.wants_evaluation and t.trial.trial_id not in lost]
    return lost | (evaluate_all(runtime, multi_lora, due) if due else {})


def evaluate_all(
    runtime: Runtime, multi_lora: MultiLora, trainings: Sequence[ArmTraining], retry: bool = True
) -> dict[str, TrialOutcome]:
    """Held-out scores of all; where memory does not do, of each half, and of one once more. The outcomes of the lost."""
    begun = time.perf_counter()
    try:
        all_scores = runtime.evaluate_adapters("selection", multi_lora, [training.adapter for training in trainings])
    except (RuntimeError, MemoryError) as error:
        if not is_recoverable_oom(error):
            raise
        if len(trainings) == 1 and not retry:
            trial = trainings[0].trial
            return {trial.trial_id: out_of_memory(trial, runtime, first_line(error))}
        all_scores = []
    if not all_scores and len(trainings) == 1:
        free_memory(runtime.loaded.device)
        return evaluate_all(runtime, multi_lora, trainings, retry=False)
    half = len(trainings) // 2
    if not all_scores:
        return evaluate_all(runtime, multi_lora, trainings[:half]) | evaluate_all(runtime, multi_lora, trainings[half:])
    seconds = (time.perf_counter() - begun) / len(trainings)
    lost: dict[str, TrialOutcome] = {}
    for training, scores in zip(trainings, all_scores, strict=True):
        try:
            training.take_scores(scores, seconds)
        except Diverged as reason:
            lost[training.trial.trial_id] = reason.outcome()
    return lost


def free_memory(device: torch.device) -> None:
    """Give back what nobody holds; outside an `except` block, whose traceback holds the failed pass."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def by_seed(trials: Sequence[Trial]) -> list[Trial]:
    """The trials seed by seed, in the order asked for: arms of one seed share batches, and so pad nothing together."""
    seeds = list(dict.fromkeys(trial.arm.seed for trial in trials))
    return sorted(trials, key=lambda trial: seeds.index(trial.arm.seed))


def started(trial: Trial) -> TrialStarted:
    return TrialStarted(trial_id=trial.trial_id, **trial.arm.model_dump())


def out_of_memory(trial: Trial, runtime: Runtime, reason: str) -> TrialFailed:
    return TrialFailed(
        trial_id=trial.trial_id,
        **trial.arm.model_dump(),
        error="out_of_memory",
        reason=f"{trial.arm.label()} ran out of memory on {runtime.loaded.device}: {reason}",
    )
