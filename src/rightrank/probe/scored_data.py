"""The data of `resize --data`: which rows are scored, and which training examples of the adapter are kept out of its judgement.

A file without splits is scored whole. Training examples are left out where they are known: from `--train`, or from the run
folder that holds the adapter. The run's own data are scored on its validation split, so that the answer is that of `select`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from rightrank.errors import DataError
from rightrank.io.adapter_folder import AdapterFolder
from rightrank.io.data import DataSplits, load_data
from rightrank.io.example_store import Example
from rightrank.io.journal import Journal
from rightrank.io.rows import read_rows
from rightrank.records import RunStarted
from rightrank.settings import SelectSettings, make_settings

OF_DATA = ("columns", "validation", "test_fraction", "validation_fraction", "eval_items")


@dataclass(frozen=True, slots=True)
class ScoredData:
    """Examples to score in the validation split, and training examples in the train split."""

    splits: DataSplits
    scores_training_examples: bool  # the train split is the validation split: nothing else is known
    note: str


def scored_data(adapter: AdapterFolder, data: Path, train: Path | None, settings: SelectSettings) -> ScoredData:
    """The rows of `data` to score, without those that the adapter is known to be trained on.

    Raises:
        DataError: rows that can't be used, or fewer than two that the adapter was not trained on.
    """
    source, started = _data_of_run(adapter) if train is None else (None, None)
    trained = _trained_on(train, data, settings) if train is not None else _trained_in(source, started, settings)
    if trained is None and None not in read_rows(data):
        splits = load_data(data, _all(settings, sum(len(list(rows)) for rows in read_rows(data).values())))
        scored = _at_most(splits.examples["selection"], settings)
        return ScoredData(_with(splits, scored), False, _note(data, scored, "its validation split"))
    if trained is not None and source is not None and data.exists() and source.resolve() == data.resolve():
        scored = trained.examples["selection"]
        return ScoredData(
            _with(trained, scored), False, _note(data, scored, "the validation split of the adapter's run")
        )
    whole = _whole(data, settings)
    if trained is None:
        scored = _at_most(whole.examples["selection"], settings)
        unknown = "if the adapter was trained on some of them, name its training data with --train"
        return ScoredData(_with(whole, scored), True, f"{_note(data, scored, 'all rows')}; {unknown}")
    if whole.form != trained.form:
        raise DataError(f"{data}: has the form {whole.form}, and the adapter's training data {trained.form}")
    seen = _ids(trained.examples["train"])
    unseen = [example for example in whole.examples["selection"] if example.item_id not in seen]
    left_out = len(whole.examples["selection"]) - len(unseen)
    if len(unseen) < 2:
        raise DataError(
            f"{data}: {left_out} of {left_out + len(unseen)} distinct rows are among the adapter's training examples; "
            "give rows that it was not trained on"
        )
    scored = _at_most(unseen, settings)
    note = f"{_note(data, scored, 'not in its training data')}; {left_out:,} training examples of the adapter left out"
    return ScoredData(_with(trained, scored), False, note)


def _with(splits: DataSplits, scored: Sequence[Example]) -> DataSplits:
    return replace(splits, examples={"train": splits.examples["train"], "selection": scored, "test": []})


def _at_most(examples: Sequence[Example], settings: SelectSettings) -> Sequence[Example]:
    """All examples; `eval_items` of them if that was given."""
    return examples[: settings.eval_items] if "eval_items" in settings.model_fields_set else examples


def _note(data: Path, scored: Sequence[Example], what: str) -> str:
    return f"scored on {len(scored):,} examples of {data} ({what})"


def _ids(examples: Sequence[Example]) -> set[str]:
    return {example.item_id for example in examples}


def _trained_on(train: Path, data: Path, settings: SelectSettings) -> DataSplits:
    """The training examples in the file `train`.

    Where training data and scored data are one file without splits, `select`'s training split of it.
    """
    if train.exists() and data.exists() and train.resolve() == data.resolve():
        return load_data(train, settings)
    return load_data(train, settings) if None not in read_rows(train) else _whole(train, settings)


def _trained_in(source: Path | None, started: RunStarted | None, settings: SelectSettings) -> DataSplits | None:
    """The splits that a run made of its data; None where they are not known."""
    if started is None or source is None:
        return None
    values = {name: started.settings[name] for name in OF_DATA if name in started.settings}
    return load_data(source, settings.model_copy(update=make_settings(values).model_dump(include=set(values))))


def _data_of_run(adapter: AdapterFolder) -> tuple[Path | None, RunStarted | None]:
    """`(the data of the run that holds the adapter, if they still exist; its start)`."""
    started = _run_of(adapter)
    source = None if started is None else started.settings.get("data")
    return (Path(source) if isinstance(source, str) and Path(source).exists() else None), started


def _run_of(adapter: AdapterFolder) -> RunStarted | None:
    """The start of the run whose `adapter/` or `trials/<trial_id>/` this is."""
    parent = adapter.path.resolve().parent
    for folder in (parent, parent.parent):
        if (folder / "journal.jsonl").is_file():
            first = next(iter(Journal(folder / "journal.jsonl").read_settled()), None)
            return first if isinstance(first, RunStarted) else None
    return None


def _whole(data: Path, settings: SelectSettings) -> DataSplits:
    """Every row of `data` in the train split and in the validation split; of given splits, the held-out ones."""
    found = read_rows(data)
    kept = [found[split] for split in ("selection", "test") if split in found] or list(found.values())
    listed = [row.fields for row in chain.from_iterable(kept)]
    return load_data({"train": listed, "validation": listed}, _all(settings, len(listed)))


def _all(settings: SelectSettings, count: int) -> SelectSettings:
    """Settings that hold all of `count` rows in the validation split."""
    small = {"batch_size": 1, "gradient_accumulation_steps": 1}  # the rows need not fill a step of training
    whole = {"eval_items": max(2, count), "test_fraction": 0.0, "validation": ""}
    return settings.model_copy(update=whole | small)
