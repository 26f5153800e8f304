"""The guard of a selection: its files are read before the start, and every finished adapter is measured on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rightrank.data.splits import load_all
from rightrank.decision.guard import GUARD_MARGIN, guarded
from rightrank.decision.run import criterion_of
from rightrank.models.base_models import LoadedModel
from rightrank.runs.hook import Hook, Run
from rightrank.runs.values import Prepared
from rightrank.schema.decision import AdapterAnswer
from rightrank.schema.errors import DataError, InputError
from rightrank.schema.events import GuardAnswer, GuardEvaluated
from rightrank.schema.metrics import default_margin
from rightrank.schema.settings import SelectSettings
from rightrank.train.runtime import Runtime, adapter_attached
from rightrank.train.tokens import EncodedData, encode

MIN_ROWS = 4


@dataclass(frozen=True, slots=True)
class _GuardData:
    file: str
    fingerprint: str
    encoded: EncodedData
    settings: SelectSettings


class Guard(Hook):
    """Lets an adapter be handed over that is no worse than the base on every guard file; at most `eval_items` examples of each count."""

    def __init__(self) -> None:
        self._guards: list[_GuardData] = []

    def on_prepared(self, run: Run) -> None:
        prepared = _prepared(run)
        loaded, classes = prepared.runtime.loaded, run.started.data.classes
        self._guards = [_load(file, run.settings, loaded, classes) for file in run.settings.guard]

    def on_adapter(self, answer: AdapterAnswer, run: Run) -> tuple[AdapterAnswer, GuardAnswer] | None:
        """The answer among the adapters that keep the guard."""
        if not self._guards:
            return None
        records = run.records
        evaluated = [one for place, guard in enumerate(self._guards) for one in _measured(run, guard, place)]
        before = records.adapters[-1].guard if records.adapters else None
        margin = _margin(self._guards[0].settings, evaluated)
        return guarded(answer, records.outcomes, criterion_of(records), evaluated, margin, before)


def _prepared(run: Run) -> Prepared:
    assert run.prepared is not None
    return run.prepared


def _load(file: str, settings: SelectSettings, loaded: LoadedModel, classes: Sequence[str] | None) -> _GuardData:
    # Scored by its loss, each file whole and under its own columns.
    by_loss = settings.model_copy(update={"metric": "loss", "metrics": ()})
    own = by_loss.model_copy(update={"columns": (), "validation": ""})
    try:
        splits, own = load_all(Path(file), own, classes, least=MIN_ROWS, at_most=own.eval_items)
    except InputError as error:
        raise type(error)(f"guard {error}" if str(file) in str(error) else f"guard {file}: {error}") from None
    if splits.form == "preference" or (splits.form == "classification") != (classes is not None):
        task = "classes" if classes is not None else "tokens"
        raise DataError(
            f"guard {file}: the data has the form {splits.form!r}, and this run trains on {task}: give guard data that the same "
            "model can be scored on"
        )
    return _GuardData(file, splits.fingerprint, encode(splits, loaded, own), own)


def _measured(run: Run, guard: _GuardData, place: int) -> list[GuardEvaluated]:
    """The losses of the base and of every finished adapter on a guard file; what the journal has is not computed again."""
    runtime = _prepared(run).runtime
    known = _current(run, guard)
    whole = [trial for trial in run.records.finished() if trial.stop_at is None and trial.trial_id not in known]
    if whole:
        cache = run.folder.cache / f"guard{place}"
        cache.mkdir(parents=True, exist_ok=True)
        own = Runtime(runtime.loaded, guard.encoded, guard.settings, 1, cache)
    for trial in whole:
        with adapter_attached(own, run.folder.adapter_of(trial)):
            scores = own.evaluate("selection")
        run.on_event(
            GuardEvaluated(
                file=guard.file,
                fingerprint=guard.fingerprint,
                trial_id=trial.trial_id,
                rank=trial.rank,
                item_losses=scores.losses,
                item_tokens=scores.tokens,
                item_groups=scores.groups,
            )
        )
    return list(_current(run, guard).values())


def _current(run: Run, guard: _GuardData) -> dict[str, GuardEvaluated]:
    """By trial, what the journal has on the guard's examples as they are now."""
    found = [one for one in run.records.guards if (one.file, one.fingerprint) == (guard.file, guard.fingerprint)]
    return {one.trial_id: one for one in found}


def _margin(settings: SelectSettings, evaluated: Sequence[GuardEvaluated]) -> float:
    """The margin given; else .02 nats a token, or 1% of the base's loss for classes."""
    if settings.guard_margin is not None:
        return settings.guard_margin
    base = next(one for one in evaluated if one.rank == 0)
    if all(tokens == 1 for tokens in base.item_tokens):
        value = sum(base.item_losses) / sum(base.item_tokens)
        return default_margin("loss", value, [value])
    return GUARD_MARGIN
