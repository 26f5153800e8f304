"""The guard of a selection: its files are read before the start, and every finished adapter is measured on them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rightrank.data.rows import held_out_fields
from rightrank.data.splits import load_data
from rightrank.decision.guard import GUARD_MARGIN, guarded
from rightrank.decision.metrics import default_margin
from rightrank.decision.run import question_of
from rightrank.models.base_models import LoadedModel
from rightrank.runs.loop import Selection
from rightrank.schema.decision import AdapterAnswer
from rightrank.schema.errors import DataError, InputError
from rightrank.schema.events import GuardAnswer, GuardEvaluated
from rightrank.schema.settings import SelectSettings
from rightrank.train.adapter_runtime import adapter_attached
from rightrank.train.runtime import Runtime
from rightrank.train.tokens import EncodedData, encode

MIN_ROWS = 4


@dataclass(frozen=True, slots=True)
class GuardData:
    file: str
    fingerprint: str
    encoded: EncodedData
    settings: SelectSettings


def load_guards(settings: SelectSettings, loaded: LoadedModel, classes: Sequence[str] | None) -> list[GuardData]:
    """Read every guard file; at most `eval_items` examples of each are used.

    Raises:
        InputError: a file can't be read, has a form that the base of this run can't be scored on, or other labels.
    """
    return [_load(file, settings, loaded, classes) for file in settings.guard]


def _load(file: str, settings: SelectSettings, loaded: LoadedModel, classes: Sequence[str] | None) -> GuardData:
    own = settings.of_other_data()
    try:
        listed = held_out_fields(Path(file))
        if len(listed) < MIN_ROWS:
            raise DataError(f"{len(listed)} rows; give {MIN_ROWS} or more")
        splits = load_data({"train": listed, "validation": listed, "test": listed}, own)
    except InputError as error:
        raise type(error)(f"guard {error}" if str(file) in str(error) else f"guard {file}: {error}") from None
    if splits.form == "preference" or (splits.form == "classification") != (classes is not None):
        task = "classes" if classes is not None else "tokens"
        raise DataError(
            f"guard {file}: the data has the form {splits.form!r}, and this run trains on {task}: give guard data that the same "
            "model can be scored on"
        )
    if classes is not None and splits.classes != list(classes):
        raise DataError(
            f"guard {file}: labels {splits.classes}, and the data of the run has {list(classes)}: give the same"
        )
    return GuardData(file, splits.fingerprint, encode(splits, loaded, own), own)


def measure_guards(selection: Selection, runtime: Runtime, guards: Sequence[GuardData]) -> list[GuardEvaluated]:
    """The losses of the base and of every finished adapter on every guard file; what the journal has is not computed again."""
    records = selection.records
    known = {(one.trial_id, one.file): one for one in records.guards}
    found = []
    for place, guard in enumerate(guards):
        missing = [
            trial
            for trial in records.finished()
            if trial.stop_at is None and not _is_current(known.get((trial.trial_id, guard.file)), guard)
        ]
        if missing:
            cache = selection.folder.cache / f"guard{place}"
            cache.mkdir(parents=True, exist_ok=True)
            own = Runtime(runtime.loaded, guard.encoded, guard.settings, 1, cache)
        for trial in missing:
            adapter: AbstractContextManager[Any] = (
                nullcontext()
                if trial.rank == 0
                else adapter_attached(own, selection.folder.finished_adapter(trial.trial_id))
            )
            with adapter:
                scores = own.evaluate("selection")
            record = GuardEvaluated(
                file=guard.file,
                fingerprint=guard.fingerprint,
                trial_id=trial.trial_id,
                rank=trial.rank,
                item_losses=scores.losses,
                item_tokens=scores.tokens,
            )
            selection.folder.journal.append(record)
            records.guards.append(record)
            known[trial.trial_id, guard.file] = record
        found += [one for (_, file), one in known.items() if file == guard.file and _is_current(one, guard)]
    return found


def _is_current(known: GuardEvaluated | None, guard: GuardData) -> bool:
    return known is not None and known.fingerprint == guard.fingerprint


def apply_guards(
    selection: Selection, runtime: Runtime, guards: Sequence[GuardData], answer: AdapterAnswer
) -> tuple[AdapterAnswer, GuardAnswer | None]:
    """The answer among the adapters that keep the guard; unchanged without a guard."""
    if not guards:
        return answer, None
    records = selection.records
    evaluated = measure_guards(selection, runtime, guards)
    before = records.adapters[-1].guard if records.adapters else None
    margin = _margin(guards[0].settings, evaluated)
    return guarded(answer, records.plain(), question_of(records), evaluated, margin, before)


def _margin(settings: SelectSettings, evaluated: Sequence[GuardEvaluated]) -> float:
    """The margin given; else .02 nats a token, or 1% of the base's loss for classes."""
    if settings.guard_margin is not None:
        return settings.guard_margin
    base = next(one for one in evaluated if one.rank == 0)
    if all(tokens == 1 for tokens in base.item_tokens):
        value = sum(base.item_losses) / sum(base.item_tokens)
        return default_margin("loss", value, [value])
    return GUARD_MARGIN
