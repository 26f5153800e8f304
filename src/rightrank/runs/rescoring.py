"""A run continued with more validation examples: adapters that exist are scored on all of them, and nothing is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rightrank.models.adapter_files import restore_adapter
from rightrank.runs.folder import RunFolder
from rightrank.runs.hook import Run
from rightrank.schema.trials import TrialFinished
from rightrank.train.adapter_runtime import adapter_attached
from rightrank.train.metrics import measure
from rightrank.train.runtime import Runtime


def rescore(run: Run) -> None:
    """Score every trial again that was scored on fewer examples, and journal it as the trial's outcome.

    Training that stopped early keeps its score: it has no adapter, and is compared with others of its stage alone.
    """
    if run.prepared is None:
        return
    records, folder = run.records, run.folder
    count = len(records.started.evaluation_items)
    stale = [trial for trial in records.finished() if trial.item_losses and len(trial.item_losses) < count]
    stale = [trial for trial in stale if trial.rank == 0 or folder.trial_adapter(trial.trial_id).is_dir()]
    if not stale:
        return
    before = len(stale[0].item_losses)
    run.notice(f"scoring {len(stale)} adapters on {count:,} validation examples, in place of {before:,}")
    records.adapters.clear()  # the first question is answered again, on all examples
    for trial in stale:
        run.record(_rescored(folder, run.prepared.runtime, trial, records.started.metric))


def _rescored(folder: RunFolder, runtime: Runtime, trial: TrialFinished, metric: str) -> TrialFinished:
    with adapter_of(folder, runtime, trial):
        scores = runtime.evaluate("selection")
        measured = measure(runtime, "selection")
    values = scores.metrics | measured.values
    return trial.model_copy(
        update={
            "value": values.get(trial.value_metric or metric, scores.loss),
            "metrics": values,
            "item_losses": scores.losses,
            "item_tokens": scores.tokens,
            "item_correct": scores.correct,
            "item_metrics": scores.item_metrics | measured.items,
            "failed_metrics": measured.failed,
        }
    )


@contextmanager
def adapter_of(folder: RunFolder, runtime: Runtime, trial: TrialFinished) -> Iterator[None]:
    """The base with the trial's adapter inside the block; the base alone for rank 0."""
    if trial.truncate_from is not None:  # its modules may have ranks of their own, which its configuration names
        with adapter_attached(runtime, folder.finished_adapter(trial.trial_id)):
            yield
        return
    with runtime.arm(trial.arm) as model:
        if trial.rank > 0:
            restore_adapter(model, folder.finished_adapter(trial.trial_id))
        yield
