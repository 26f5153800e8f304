"""`average`: the mean of several adapters' updates, truncated to the smallest rank that is enough on held-out rows.

The mean of trainings that differ by their seed or the order of their batches has a lower loss than they have, as for the "model
soups" of full fine-tunes (Wortsman et al. 2022). The mean of s₁·B₁·A₁, …, sₙ·Bₙ·Aₙ is an adapter whose rank is the sum of theirs. The
members and the truncations of the mean are scored on one half of the rows. The chosen adapter is compared with the best ones on the
other half, which chose nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import takewhile
from pathlib import Path

import torch

from rightrank.adapters.adapter_folders import BASE_FILE
from rightrank.adapters.adapter_reader import AdapterFolder, open_adapter
from rightrank.adapters.adapter_writer import write_adapter
from rightrank.adapters.rank_math import build_exact_pattern
from rightrank.adapters.resizing import list_candidate_ranks, require_plain_update
from rightrank.data.splits import DataSplits, load_held_out
from rightrank.decision.adapter import Criterion, ReferenceComparison, build_adapter_files
from rightrank.runs.compare import compare_trials, drop_training_examples, find_shared_labels
from rightrank.runs.resize_by_data import measure_truncation_curve
from rightrank.schema.errors import DataError, ModelError, SettingsError
from rightrank.schema.events import EvaluationProgress, Notice
from rightrank.schema.results import Averaged, ComparisonVerdict, MetricComparison
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import SplitName, TrialFinished
from rightrank.training.adapter_runtime import (
    RuntimeInputs,
    make_adapter_runtime,
    report_evaluation_progress,
    require_matching_base,
)
from rightrank.training.evaluation import build_trial_record
from rightrank.training.runtime import Runtime, attach_adapter

CLAIMS: dict[ComparisonVerdict, str] = {
    "not_worse": "not worse by more than",
    "worse": "worse by more than",
    "cannot_tell": "these rows cannot tell whether it is worse by more than",
}


def write_average(members: Sequence[AdapterFolder], out: Path) -> AdapterFolder:
    """Write the mean of the members' updates as one adapter, at the sum of their ranks and at scale 1.

    Raises:
        ModelError: A member's update is more than s·B·A, or the members adapt different matrices.
        RunFolderError: `out` exists or can't be written.
    """
    first = members[0]
    for member in members:
        _require_averageable(member, first)
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    for pairs in zip(*(member.pairs for member in members), strict=True):
        pair, scaled_factors = pairs[0][0], []
        for member, (module, *_) in zip(members, pairs, strict=True):
            share = module.scaling / len(members)
            scaled_factors.append([(share * b, a) for b, a in member.load_pair_factors(module)])
        factors = [
            tuple(torch.cat([torch.from_numpy(factor[index]) for factor in matrix], 1 - index) for index in (0, 1))
            for matrix in zip(*scaled_factors, strict=True)
        ]
        old_a, old_b = first.load_tensor(pair.a_key), first.load_tensor(pair.b_key)
        new_a, new_b = pair.kind.pack_factors([(b, a) for b, a in factors], old_a, old_b)
        dtypes = [member.load_tensor(module.a_key).dtype for member, (module, *_) in zip(members, pairs, strict=True)]
        dtype = reduce(torch.promote_types, dtypes)
        tensors |= {pair.a_key: new_a.to(dtype), pair.b_key: new_b.to(dtype)}
        ranks[pair.address] = sum(module.rank for module, *_ in pairs)
    r = max(ranks.values())
    pattern = build_exact_pattern(ranks, r, ranks)
    config = dict(first.config) | {"r": r, "lora_alpha": r, "rank_pattern": pattern, "alpha_pattern": pattern}
    config |= {"use_rslora": False, "init_lora_weights": True, "eva_config": None}
    write_adapter(out, config, tensors, first.path)
    return open_adapter(out)


def _require_averageable(member: AdapterFolder, first: AdapterFolder) -> None:
    """Raise if the mean of the updates of two adapters is not an adapter."""
    require_plain_update(member)
    bias = next((module.bias_key for module in member.modules if module.bias_key), None)
    if member.use_dora or bias or member.other_keys:
        fault = "it uses DoRA" if member.use_dora else f"it trains {bias or member.other_keys[0]} as well"
        raise ModelError(f"{member.path}: {fault}, and only updates s·B·A can be averaged; give plain LoRA adapters")
    shapes, first_shapes = (
        {module.name: (module.rows, module.columns) for module in adapter.modules} for adapter in (member, first)
    )
    if different := sorted(shapes.items() ^ first_shapes.items()):
        raise ModelError(
            f"{member.path} and {first.path} adapt different matrices, such as {different[0][0]}; give adapters of the same target "
            "modules of one base model"
        )


@dataclass(frozen=True, slots=True)
class AverageRequest:
    """The adapters to average, and the held-out rows that decide; see `rightrank.average` for each field."""

    members: Sequence[Path]
    data: Path
    base: str | None
    settings: SelectSettings
    on_event: Callable[[EvaluationProgress | Notice], None]


def average_adapters(request: AverageRequest, out: Path) -> Averaged:
    """Measure the members and the truncations of their mean, and write the chosen adapter to `out`.

    Raises:
        InputError: An adapter or the data can't be used, or the adapters do not fit the base model.
    """
    paths = [member.resolve() for member in request.members]
    if len(set(paths)) < max(2, len(paths)):
        names = ", ".join(map(str, request.members)) or "none"
        raise SettingsError(f"adapters to average: {names}; give two or more different folders")
    members = [open_adapter(path) for path in paths]
    with tempfile.TemporaryDirectory(prefix="rightrank-") as name:
        folder = Path(name)
        average = write_average(members, folder / "average")
        splits = _split_rows(request)
        inputs = RuntimeInputs(request.data, request.settings, folder / "cache", splits=splits)
        runtime = make_adapter_runtime(average, request.base, inputs)
        for member in members:
            require_matching_base(member.path, runtime.loaded)
        averaged = _measure_candidates(members, average, runtime, request, folder)
        chosen = open_adapter(folder / averaged.trial_id)
        tensors = {key: chosen.load_tensor(key) for key in chosen.keys}
        write_adapter(out, chosen.config, tensors, chosen.path, {BASE_FILE: runtime.loaded.identity.to_json()})
    return averaged.model_copy(update={"out": str(out)})


def _split_rows(request: AverageRequest) -> DataSplits:
    """Return the rows that no member was trained on: one half to choose by, as training and validation split, and one to test.

    Rows that belong together are in the same half.

    Raises:
        DataError: A half has fewer than two rows.
    """
    names, settings = [str(member) for member in request.members], request.settings
    held_out, _ = load_held_out(request.data, settings, find_shared_labels(names))
    unseen = drop_training_examples(held_out, names, settings, request.data)
    examples = unseen.examples["validation"]
    if "max_eval_examples" in settings.model_fields_set:
        examples = examples[: settings.max_eval_examples]
    halves = [[example for example in examples if example.group % 2 == parity] for parity in (0, 1)]
    if min(map(len, halves)) < 2:
        raise DataError(
            f"{request.data}: {len(examples)} rows fall into halves of {len(halves[0])} and {len(halves[1])}; give more rows, since each "
            "half needs 2 or more"
        )
    return replace(unseen, examples={"train": halves[0], "validation": halves[0], "test": halves[1]})


def _measure_candidates(
    members: Sequence[AdapterFolder], average: AdapterFolder, runtime: Runtime, request: AverageRequest, folder: Path
) -> Averaged:
    """Choose a candidate on one half of the rows, and compare it with the best candidate and the best member on the other."""
    settings, metric = runtime.settings, runtime.settings.metric_name

    def evaluate(trial_id: str, rank: int, split: SplitName) -> TrialFinished:
        report_evaluation_progress(runtime, names.get(trial_id, "the average"), request.on_event)
        with attach_adapter(runtime, folder / trial_id):  # a member has its absolute path
            return build_trial_record(trial_id, rank, runtime.evaluate(split), settings.metric)

    names = {str(member.path): str(path) for member, path in zip(members, request.members, strict=True)}
    trials = [evaluate(str(member.path), member.rank, "validation") for member in members]
    curve = measure_truncation_curve(
        average, runtime, list_candidate_ranks(average), folder, cross_fit=True, on_event=request.on_event
    )
    higher = settings.is_higher_better(metric)
    criterion = Criterion(metric, higher, settings.margin, runtime.data.summary.loss_kind)
    files = build_adapter_files([*trials, *curve.trials], criterion)
    truncation_ids = [trial.trial_id for trial in curve.trials if trial.rank > 0]  # in descending order of the rank
    best_member = min((trial.trial_id for trial in trials), key=lambda trial_id: files[trial_id].cell.loss)
    best = min((truncation_ids[0], best_member), key=lambda trial_id: files[trial_id].cell.loss)
    comparison = ReferenceComparison(files[best], files, criterion)
    candidates = {trial_id: comparison.build_candidate(file) for trial_id, file in files.items()}
    passing = list(takewhile(lambda trial_id: candidates[trial_id].is_within_margin, truncation_ids))
    chosen = passing[-1] if passing else best_member
    tests = {
        trial_id: evaluate(trial_id, candidates[trial_id].rank, "test")
        for trial_id in dict.fromkeys((chosen, best, best_member))
    }
    settings = settings.model_copy(update={"margin": comparison.margin})
    against_best, against_member = (
        compare_trials(tests[trial_id], tests[chosen], metric, str(request.data), settings)
        for trial_id in (best, best_member)
    )
    names |= {trial_id: f"the average at rank {candidates[trial_id].rank}" for trial_id in truncation_ids}
    return Averaged(
        out="",
        rank=candidates[chosen].rank,
        trial_id=chosen,
        reference_id=best,
        member_id=best_member,
        candidates=list(candidates.values()),
        against_best=against_best,
        against_member=against_member,
        sentence=_format_sentence(names[chosen], names[best], names[best_member], against_best, against_member),
    )


def _format_sentence(
    chosen: str, best: str, best_member: str, against_best: MetricComparison, against_member: MetricComparison
) -> str:
    examples, metric = against_best.examples, against_best.metric
    measured = f"its {metric} is {against_best.value_b:.4f} on {examples} rows that chose nothing"
    margin = f"the margin of {against_best.margin:g}"
    if chosen == best_member:
        return f"No rank of the average is shown to be within {margin} of {best_member}, which is written unchanged; {measured}."
    sentence = (
        f"Written: {chosen}; {measured}, {_format_difference(against_member)} from the best member, {best_member}"
    )
    if best in (chosen, best_member):
        return f"{sentence}, {CLAIMS[against_member.verdict]} {margin}."
    difference = _format_difference(against_best)
    return f"{sentence}, and {difference} from {best}, {CLAIMS[against_best.verdict]} {margin}."


def _format_difference(comparison: MetricComparison) -> str:
    low, high = comparison.difference_low, comparison.difference_high
    return f"{comparison.difference:+.3g} (95% bounds {low:+.3g} to {high:+.3g})"
