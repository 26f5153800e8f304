"""The guard of a selection: its files are read before the start, and every finished adapter is measured on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rightrank.data.splits import load_all
from rightrank.decision.guard import GUARD_MARGIN, guarded
from rightrank.decision.records import Records, criterion_of
from rightrank.runs.hook import Answered, Hook, Started
from rightrank.runs.values import Prepared
from rightrank.schema.decision import AdapterAnswer
from rightrank.schema.errors import DataError, InputError
from rightrank.schema.events import Event, GuardAnswer, GuardEvaluated, Notice
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

    _started: Started
    _guards: Sequence[_GuardData] = ()

    def on_start(self, started: Started) -> None:
        plan = started.plan
        assert isinstance(plan, Prepared)
        classes = plan.started.data.classes
        self._started = started
        trained_on = plan.runtime.data.splits["train"].item_ids if plan.settings.guard else set[str]()
        self._guards = [_load(file, plan, classes, trained_on, started.tell) for file in plan.settings.guard]

    def on_adapter(self, answered: Answered) -> tuple[AdapterAnswer, GuardAnswer] | None:
        """The answer among the adapters that keep the guard."""
        if not self._guards:
            return None
        records = answered.records
        evaluated = [
            losses
            for number, guard in enumerate(self._guards)
            for losses in self._measured(guard, records, self._started.folder.cache / f"guard{number}")
        ]
        before = records.adapters[-1].guard if records.adapters else None
        margin = _margin(self._guards[0].settings, evaluated)
        return guarded(answered.answer, records.outcomes, criterion_of(records), evaluated, margin, before)

    def _measured(self, guard: _GuardData, records: Records, cache: Path) -> list[GuardEvaluated]:
        """The losses of the base and of every finished adapter on a guard file; what the journal has is not computed again."""
        plan, folder = self._started.plan, self._started.folder
        assert isinstance(plan, Prepared)
        known = {
            losses.trial_id: losses
            for losses in records.guards
            if (losses.file, losses.fingerprint) == (guard.file, guard.fingerprint)
        }
        missing = [trial for trial in records.finished() if trial.stop_at is None and trial.trial_id not in known]
        if missing:
            cache.mkdir(parents=True, exist_ok=True)
            runtime = Runtime(plan.runtime.loaded, guard.encoded, guard.settings, 1, cache)
        for trial in missing:
            with adapter_attached(runtime, folder.adapter_of(trial)):
                scores = runtime.evaluate("selection")
            known[trial.trial_id] = GuardEvaluated(
                file=guard.file,
                fingerprint=guard.fingerprint,
                trial_id=trial.trial_id,
                rank=trial.rank,
                item_losses=scores.losses,
                item_tokens=scores.tokens,
                item_groups=scores.groups,
            )
            self._started.tell(known[trial.trial_id])
        return list(known.values())


def _load(
    file: str, plan: Prepared, classes: Sequence[str] | None, trained_on: set[str], tell: Callable[[Event], None]
) -> _GuardData:
    settings = plan.settings
    # Scored by its loss, each file whole and under its own columns.
    by_loss = settings.model_copy(update={"metric": "loss", "metrics": ()})
    own = by_loss.model_copy(update={"columns": (), "validation": ""})
    try:
        splits, own = load_all(Path(file), own, classes, least=MIN_ROWS)
    except InputError as error:
        raise type(error)(f"guard {error}" if str(file) in str(error) else f"guard {file}: {error}") from None
    if splits.form == "preference" or (splits.form == "classification") != (classes is not None):
        task = "classes" if classes is not None else "tokens"
        raise DataError(
            f"guard {file}: the data has the form {splits.form!r}, and this run trains on {task}: give guard data that the same "
            "model can be scored on"
        )
    rows, unseen = (which.examples["selection"] for which in (splits, splits.without(trained_on)))
    if len(unseen) < len(rows):
        shared = f"guard {file}: {len(rows) - len(unseen):,} of {len(rows):,} rows are training examples, whose loss an adapter lowers"
        if len(unseen) < MIN_ROWS:
            raise DataError(f"{shared}; give rows that it does not train on")
        tell(Notice(text=f"{shared}; they are left out"))
    splits = replace(splits, examples=dict.fromkeys(splits.examples, unseen[: settings.eval_items]))
    return _GuardData(file, splits.fingerprint, encode(splits, plan.runtime.loaded, own), own)


def _margin(settings: SelectSettings, evaluated: Sequence[GuardEvaluated]) -> float:
    """The margin given; else .02 nats a token, or 1% of the base's loss for classes."""
    if settings.guard_margin is not None:
        return settings.guard_margin
    base = next(losses for losses in evaluated if losses.rank == 0)
    if all(tokens == 1 for tokens in base.item_tokens):
        value = sum(base.item_losses) / sum(base.item_tokens)
        return default_margin("loss", value, [value])
    return GUARD_MARGIN
