"""`resize --data`: the smallest truncation that is not worse than the adapter by the margin, by the rule of `select`.

Every candidate is truncated by K-FAC over training examples, written as an adapter folder, attached to the base by PEFT,
and measured on the same examples.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from peft import LoraConfig

from rightrank.adapters.compare import finished_trial, labels_of_side, splits_of_run
from rightrank.adapters.resize import (
    candidate_ranks,
    capped,
    require_plain_update,
    write_like,
    write_resized,
    write_truncated,
)
from rightrank.data.forms import Example
from rightrank.data.rows import read_rows
from rightrank.data.splits import DataSplits, load_all, load_data
from rightrank.decision.adapter import SEARCH, Criterion, adapter_answer, trained_answer
from rightrank.decision.comparison import bounds_of_files
from rightrank.decision.table import minus, table_of
from rightrank.models.adapter_folders import BASE_FILE
from rightrank.models.adapter_reader import AdapterFolder, open_adapter
from rightrank.models.truncation import Moments
from rightrank.schema.command import reproduce_command
from rightrank.schema.configs import stated_settings
from rightrank.schema.decision import AdapterAnswer
from rightrank.schema.errors import DataError
from rightrank.schema.events import Evaluating, Notice
from rightrank.schema.results import HeldOut, Resized
from rightrank.schema.setting_table import given_values
from rightrank.schema.settings import NO_SPLIT_OVERRIDES, SelectSettings
from rightrank.schema.trials import TrialFinished
from rightrank.train.adapter_runtime import RuntimeInputs, make_adapter_runtime, report_evaluation_progress
from rightrank.train.covariances import GatheredMoments, gather_moments, gather_unseen_moments
from rightrank.train.evaluation import Scores
from rightrank.train.runtime import Runtime, attach_adapter


@dataclass(frozen=True, slots=True)
class _ScoredData:
    """Examples to score in the validation split, and training examples in the train split."""

    splits: DataSplits
    scores_training_examples: bool  # the train split is the validation split: nothing else is known
    note: str


def scored_data(adapter: AdapterFolder, data: Path, train: Path | None, settings: SelectSettings) -> _ScoredData:
    """The rows of `data` to score, without those that the adapter is known to be trained on.

    Raises:
        DataError: rows that can't be used, or fewer than two that the adapter was not trained on.
    """
    classes = labels_of_side(str(adapter.path))
    trained, source = _trained(adapter, data, train, settings, classes)
    if trained is None and None not in read_rows(data):
        count = sum(len(list(rows)) for rows in read_rows(data).values())
        every = settings.model_copy(update=NO_SPLIT_OVERRIDES | {"max_eval_examples": max(2, count)})
        splits = load_data(data, every, classes=classes)
        return _scored(splits, _at_most(splits.examples["selection"], settings), f"{data} (its validation split)")
    if trained is not None and source is not None and data.exists() and source.resolve() == data.resolve():
        own = trained.examples["selection"]
        return _scored(trained, own, f"{data} (the validation split of the adapter's run)")
    whole, _ = load_all(data, settings, classes)
    every_row = whole.examples["selection"]
    if trained is None:
        unknown = "if the adapter was trained on some of them, name its training data with --train"
        return _scored(whole, _at_most(every_row, settings), f"{data} (all rows); {unknown}", of_training=True)
    if whole.form != trained.form:
        raise DataError(f"{data}: has the form {whole.form}, and the adapter's training data {trained.form}")
    seen = {example.example_id for example in trained.examples["train"]}
    unseen = [example for example in every_row if example.example_id not in seen]
    left_out = len(every_row) - len(unseen)
    if len(unseen) < 2:
        raise DataError(
            f"{data}: {left_out} of {len(every_row)} distinct rows are among the adapter's training examples; "
            "give rows that it was not trained on"
        )
    without = f"{data} (not in its training data); {left_out:,} training examples of the adapter left out"
    return _scored(trained, _at_most(unseen, settings), without)


def _scored(splits: DataSplits, scored: Sequence[Example], where: str, of_training: bool = False) -> _ScoredData:
    kept = replace(splits, examples={"train": splits.examples["train"], "selection": scored, "test": []})
    return _ScoredData(kept, of_training, f"scored on {len(scored):,} examples of {where}")


def _at_most(examples: Sequence[Example], settings: SelectSettings) -> Sequence[Example]:
    """All examples; `max_eval_examples` of them if that was given."""
    return examples[: settings.max_eval_examples] if "max_eval_examples" in settings.model_fields_set else examples


def _trained(
    adapter: AdapterFolder, data: Path, train: Path | None, settings: SelectSettings, classes: Sequence[str] | None
) -> tuple[DataSplits | None, Path | None]:
    """`(the splits with the adapter's training examples, the data of its run)`; None for what is not known.

    They are in the file `train`, or they are those of the run whose `adapter/` or `trials/<trial_id>/` this is. Where training data and
    scored data are one file without splits, `select`'s training split of it.
    """
    if train is not None:
        is_same = train.exists() and data.exists() and train.resolve() == data.resolve()
        split = is_same or None not in read_rows(train)
        return (load_data(train, settings, classes=classes) if split else load_all(train, settings, classes)[0]), None
    return splits_of_run(adapter.path, settings, classes) or (None, None)


@dataclass(frozen=True, slots=True)
class TruncationCurve:
    """Held-out results by rank, with the base as rank 0, and the answer that they give."""

    trials: list[TrialFinished]
    written: dict[int, Resized]
    gathered: GatheredMoments
    answer: AdapterAnswer


MANY_EXAMPLES = 2000  # above which scoring may take long, and fewer are proposed


@dataclass(frozen=True, slots=True)
class DataRule:
    """The smallest rank that is enough on held-out rows; see `rightrank.resize` for each field."""

    data: Path
    train: Path | None
    base: str | None
    settings: SelectSettings
    ranks: Sequence[int] | None
    on_event: Callable[[Evaluating | Notice], None]


def resize_by_data(adapter: AdapterFolder, out: Path, rule: DataRule) -> Resized:
    """Measure the candidates, decide, and write the chosen one to `out`.

    Raises:
        InputError: the adapter or the data can't be used, or the adapter does not fit the base.
    """
    require_plain_update(adapter)
    ranks = candidate_ranks(adapter, rule.ranks)
    scored = scored_data(adapter, rule.data, rule.train, rule.settings)
    rule.on_event(Notice(text=scored.note))
    measured = ", ".join(map(str, sorted(ranks, reverse=True)))
    count = len(scored.splits.examples["selection"])
    fewer = "" if count <= MANY_EXAMPLES else "; --set max_eval_examples=1000 measures on fewer"
    text = f"measuring the base, then ranks {measured}, each on {count:,} examples{fewer}"
    rule.on_event(Notice(text=text))
    with tempfile.TemporaryDirectory(prefix="rightrank-") as name:
        use = RuntimeInputs(rule.data, rule.settings, Path(name) / "cache", splits=scored.splits)
        runtime = make_adapter_runtime(adapter, rule.base, use)
        halves = scored.scores_training_examples
        curve = truncation_curve(adapter, runtime, ranks, Path(name), by_halves=halves, on_event=rule.on_event)
        chosen = open_adapter(Path(name) / curve.answer.trial_id)
        tensors = {key: chosen.tensor(key) for key in chosen.keys}
        write_like(adapter, out, chosen.config, tensors, {BASE_FILE: runtime.loaded.identity.content()})
        resized = _resized(curve, chosen, runtime, rule)
    further = {"out": str(out), "notes": [*resized.notes, scored.note], "scored_examples": count}
    return resized.model_copy(update=further)


def _resized(curve: TruncationCurve, chosen: AdapterFolder, runtime: Runtime, rule: DataRule) -> Resized:
    """What is reported of the chosen candidate."""
    answer, written = curve.answer, curve.written[curve.answer.rank]
    notes = [*written.notes, *curve.gathered.notices]
    if curve.gathered.moments:
        notes.append(f"truncated by K-FAC over {curve.gathered.tokens} tokens of the training split")
    if chosen.config["rank_pattern"]:
        notes.append(
            f"rank {chosen.rank_text}: the parameters of rank {answer.rank} are shared out over the modules (rank_pattern), all at the scale "
            "of lora_alpha and r (alpha_pattern)"
        )
    gain = _gain(curve.trials, answer, runtime)
    ranks = tuple(sorted({candidate.rank for candidate in answer.candidates}))
    config = LoraConfig(
        **{name: value for name, value in chosen.config.items() if name in vars(LoraConfig()) and value is not None}
    )
    config.rank_pattern, config.alpha_pattern = {}, {}
    stated, unsaid = stated_settings(config, **given_values(rule.settings) | {"ranks": ranks})
    search = reproduce_command(runtime.loaded.name, "TRAINING_DATA", SelectSettings.stored(stated))
    notes += [f"the select command does not say {', '.join(unsaid)}"] if unsaid else []
    named = {"notes": [note.replace(SEARCH, f"({search})") for note in answer.notes]}
    return written.model_copy(
        update={
            "rank": answer.rank,
            "bytes_after": chosen.weights.stat().st_size,
            "chosen_by": f"data, margin {answer.margin:g}",
            "held_out": [HeldOut(rank=trial.rank, value=trial.value) for trial in curve.trials],
            "answer": answer.model_copy(update=gain | named),
            "no_gain": bool(gain),
            "notes": notes,
        }
    )


def _gain(trials: Sequence[TrialFinished], answer: AdapterAnswer, runtime: Runtime) -> dict[str, str]:
    """The sentence of an answer whose reference is not better than the base by more than the margin; else empty."""
    metric = runtime.settings.metric_name
    reference = next(trial for trial in trials if trial.trial_id == answer.reference_id)
    cells = table_of([trials[0], reference], metric, runtime.settings.is_higher_better(metric)).cells.values()
    base, best = sorted(cells, key=lambda cell: cell.trial_id != trials[0].trial_id)
    worse = minus(base, best)
    if not bounds_of_files(worse.sums, worse.weights, worse.span, worse.groups).is_enough(answer.margin):
        return {}
    return {
        "sentence": f"No gain: the base alone has {base.value:.4f} and the adapter {best.value:.4f}, within the margin of "
        f"{answer.margin:g}, so every rank is within it. {answer.sentence}"
    }


def truncation_curve(
    adapter: AdapterFolder,
    runtime: Runtime,
    ranks: Sequence[int],
    working: Path,
    *,
    by_halves: bool = False,
    on_event: Callable[[Evaluating | Notice], None] = lambda _: None,
) -> TruncationCurve:
    """The held-out loss of every truncation to `ranks`; `working` keeps them as r1, r2, …

    With `by_halves`, where moments and scores come from the same examples, each half is scored with the other's moments.

    Raises:
        ModelError: the adapter does not fit the base.
    """
    settings = runtime.settings
    # Over the examples that `select` reads after a training with these settings: which ones another training saw is not known.
    steps = settings.training_steps(len(runtime.data.splits["train"]))
    with attach_adapter(runtime, adapter.path) as peft_model:
        gathered = gather_unseen_moments(runtime, peft_model, settings.seeds[0], steps)
    halves = _halves(adapter, runtime) if by_halves else []
    report_evaluation_progress(runtime, "the base", on_event)
    trials = [finished_trial("base", 0, runtime.evaluate("selection"), settings.metric)]
    written: dict[int, Resized] = {}
    top = f"r{max(ranks)}"
    for rank in sorted(ranks, reverse=True):
        folder = working / f"r{rank}"
        written[rank] = write_resized(adapter, folder, capped(adapter, rank, gathered.moments), gathered.moments)
        report_evaluation_progress(runtime, f"rank {rank}", on_event)
        if halves:
            scores = _by_halves(adapter, runtime, halves, rank, working)
        else:
            with attach_adapter(runtime, folder):
                scores = runtime.evaluate("selection")
        parent = None if folder.name == top else top
        trials.append(finished_trial(folder.name, rank, scores, settings.metric, truncate_from=parent))
        on_event(Notice(text=f"rank {rank}: held-out {trials[-1].value:.4f}"))
    higher = settings.is_higher_better(settings.metric_name)
    criterion = Criterion(settings.metric_name, higher, settings.margin, runtime.data.summary.loss_kind)
    return TruncationCurve(trials, written, gathered, smallest_of(trials, criterion))


def smallest_of(trials: Sequence[TrialFinished], criterion: Criterion) -> AdapterAnswer:
    """The smallest adapter that holds."""
    return adapter_answer(trials, criterion) or trained_answer(max(trials, key=lambda trial: trial.rank), criterion)


_Half: TypeAlias = tuple[list[int], Mapping[str, Moments]]  # half of the scored examples, moments over the other half


def _halves(adapter: AdapterFolder, runtime: Runtime) -> list[_Half]:
    """Two halves of the validation split, so that no example is scored by a truncation that was fitted to it.

    The written adapter has moments over all examples, like each half's but of twice as many.
    """
    held_out = [example.example_id for example in runtime.data.splits["selection"]]
    halves = [[index for index, name in enumerate(held_out) if int(name[:16], 16) % 2 == half] for half in (0, 1)]
    names = [{held_out[index] for index in half} for half in halves]
    train = [example.example_id for example in runtime.data.splits["train"]]
    with attach_adapter(runtime, adapter.path) as peft_model:
        return [
            (half, gather_moments(runtime, peft_model, [i for i, name in enumerate(train) if name in other]).moments)
            for half, other in zip(halves, reversed(names), strict=True)
        ]


def _by_halves(adapter: AdapterFolder, runtime: Runtime, halves: Sequence[_Half], rank: int, working: Path) -> Scores:
    """The scores of every example under the truncation whose moments come from the half without it."""
    halved = []
    for number, (scored, moments) in enumerate(halves):
        folder = working / f"r{rank}-half{number}"
        write_truncated(adapter, folder, capped(adapter, rank, moments), moments)
        with attach_adapter(runtime, folder):
            halved.append(runtime.evaluate("selection", scored))
    return halved[0].with_others(halved[1])
