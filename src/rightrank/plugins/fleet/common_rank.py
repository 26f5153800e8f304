"""`fleet`: the smallest rank that every adapter of a server can be truncated to without losing its margin.

Each adapter is measured on its own data as `resize --data` measures it, over the same ranks. All hold at the fleet's rank, each
with 95%: the claim "all hold" fails where one fails, so no correction is needed. Each is written at its truncation to that rank;
one that has a lower rank already stays as it is.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from rightrank.adapters.held_out import TruncationCurve, scored_data, truncation_curve
from rightrank.adapters.resize import require_plain_update
from rightrank.data.files import creating, replacing_folder, require_absent
from rightrank.models.adapter_files import AdapterFolder, open_adapter, write_adapter
from rightrank.models.base_models import load_base
from rightrank.models.places import BASE_FILE
from rightrank.models.ranks import SERVING, max_module_rank, slot_bytes
from rightrank.report.format import size
from rightrank.schema.decision import AdapterCandidate
from rightrank.schema.errors import DataError, ModelError, SettingsError
from rightrank.schema.results import Resized
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import Record, Whole
from rightrank.train.adapter_runtime import DataUse, adapter_runtime, require_base

MAX_NAMED = 3  # adapters that a sentence names


class FleetAdapter(Record):
    """One adapter of the fleet."""

    adapter: str
    rank_before: Whole  # the largest of its modules
    rank: Whole  # the smallest at which it is not worse than itself by more than the margin
    value: float  # held-out, of the adapter as it is
    margin: float
    candidates: list[AdapterCandidate]  # what it loses at every rank, by descending rank
    out: str
    relative_delta_error: float
    notes: list[str] = Field(default_factory=list)


class Fleet(Record):
    """`fleet --json`."""

    rank: Whole  # the smallest that every adapter can be truncated to
    sentence: str
    model: str
    adapters: list[FleetAdapter]
    max_lora_rank: Whole  # of vLLM, for the adapters as written
    saved_share: float  # of the bytes of its slot for an adapter
    slot_bytes: Whole  # of one slot at that rank, in 16 bits
    notes: list[str]
    out: str


def _open_adapters(paths: Sequence[Path], out: Path) -> list[AdapterFolder]:
    if len(paths) < 2:
        raise SettingsError(f"{len(paths)} adapter given: a fleet has two or more; `rightrank resize` takes one")
    require_absent(out)
    names = _folder_names(paths)
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise SettingsError(
            f"two adapters are in folders named {twice!r}; rename one, since OUT gets one folder for each adapter"
        )
    adapters = [open_adapter(path) for path in paths]
    for adapter in adapters:
        require_plain_update(adapter)
    for adapter in adapters:
        own = {module.name for module in adapter.modules}
        others = {module.name for other in adapters if other is not adapter for module in other.modules}
        if not own & others:
            raise ModelError(
                f"{adapter.path}: it has no module in common with the others (it adapts {sorted(own)[0]}, they {sorted(others)[0]}); "
                "a fleet shares one base and its modules: leave it out"
            )
    return adapters


def _folder_names(paths: Sequence[Path]) -> list[str]:
    """The name under which each adapter is written: that of its folder, of its run where several are called `adapter`.

    Other folders of one name get that of the folder around them in front.
    """
    places = [path.resolve() for path in paths]
    names = [place.name for place in places]
    return [
        name if names.count(name) == 1 else place.parent.name if name == "adapter" else f"{place.parent.name}-{name}"
        for place, name in zip(places, names, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class _Measured:
    """An adapter and its truncations, in a folder of their own."""

    adapter: AdapterFolder
    curve: TruncationCurve
    folder: Path


def run_fleet(
    paths: Sequence[Path],
    out: Path,
    *,
    model: str,
    files: Sequence[Path],
    settings: SelectSettings,
    notice: Callable[[str], None],
) -> Fleet:
    """Measure, decide and write; see `rightrank.plugins.fleet.fleet`."""
    adapters = _open_adapters(paths, out)
    if len(files) not in (1, len(adapters)):
        raise SettingsError(
            f"{len(files)} data files for {len(adapters)} adapters; give one for all, or one for each in their order"
        )
    data = list(files) * len(adapters) if len(files) == 1 else list(files)
    scored = [scored_data(adapter, file, None, settings) for adapter, file in zip(adapters, data, strict=True)]
    classes = {
        None if held_out.splits.summary.classes is None else tuple(held_out.splits.summary.classes)
        for held_out in scored
    }
    if len(classes) > 1:
        raise DataError(
            "the data files have different labels: adapters of one fleet share one head; give data of one kind"
        )
    loaded = load_base(model, settings, classes.pop())
    names = {name for name, _ in loaded.model.named_modules()}
    for adapter in adapters:
        whole = [module.name for module in adapter.modules if module.kind.name != "expert"]
        missing = next((name for name in whole if name not in names), None)
        if missing is not None:
            raise ModelError(f"{adapter.path}: {model} has no module {missing}: it is an adapter of another base")
        require_base(adapter.path, loaded)
    powers = {2**power for power in range(max(adapter.rank for adapter in adapters).bit_length())}
    ranks = sorted({*powers, *(adapter.rank for adapter in adapters)})
    with tempfile.TemporaryDirectory(prefix="rightrank-") as name:
        measured = []
        for place, (adapter, held_out) in enumerate(zip(adapters, scored, strict=True)):
            notice(f"{adapter.path}: {held_out.note}")
            working = Path(name) / str(place)
            working.mkdir()
            use = DataUse(data[place], settings, working / "cache", 0, held_out.splits, loaded)
            own = [rank for rank in ranks if rank < adapter.rank] + [adapter.rank]
            halves = held_out.scores_training_examples and len(own) > 1
            curve = truncation_curve(adapter, adapter_runtime(adapter, model, use), own, working, by_halves=halves)
            measured.append(_Measured(adapter, curve, working))
            notice(f"{adapter.path}: rank {curve.answer.rank} is enough of {adapter.rank}")
        return _written(measured, out, model, {BASE_FILE: loaded.identity.content()})


def _written(measured: Sequence[_Measured], out: Path, model: str, base: dict[str, bytes]) -> Fleet:
    rank = max(member.curve.answer.rank for member in measured)
    chosen = [_at(member, rank) for member in measured]
    served = max(open_adapter(folder).rank for folder, _ in chosen)
    names = _folder_names([member.adapter.path for member in measured])
    with creating(out), replacing_folder(out) as temporary:
        for name, (folder, _) in zip(names, chosen, strict=True):
            source = open_adapter(folder)
            tensors = {key: source.tensor(key) for key in source.keys}
            write_adapter(temporary / name, source.config, tensors, folder, base)
    written = [
        resized.model_copy(update={"out": str(out / name)}) for name, (_, resized) in zip(names, chosen, strict=True)
    ]
    before = max_module_rank(max(member.adapter.rank for member in measured))
    after = max_module_rank(served)
    shapes = {module.name: (module.rows, module.columns) for member in measured for module in member.adapter.modules}
    slot, slot_before = (slot_bytes(shapes.values(), slot_rank) for slot_rank in (after, before))
    note = f"a slot takes {size(slot)} at --max-lora-rank {after} ({size(slot_before)} at {before}), whatever the rank of the adapter in it"
    return Fleet(
        rank=rank,
        sentence=_sentence(measured, rank, before, after),
        model=model,
        adapters=[_record(member, resized) for member, resized in zip(measured, written, strict=True)],
        max_lora_rank=after,
        saved_share=1 - after / before,
        slot_bytes=slot,
        notes=[note, SERVING],
        out=str(out),
    )


def _at(member: _Measured, rank: int) -> tuple[Path, Resized]:
    """The folder of the adapter at the fleet's rank, and how it was made: the best that holds there; or as it is, if it is lower."""
    own = min(rank, member.adapter.rank)
    holding = [candidate for candidate in member.curve.answer.candidates if candidate.rank == own and candidate.holds]
    best = min(holding, key=lambda candidate: candidate.difference)
    return member.folder / best.trial_id, member.curve.written[own]


def _record(member: _Measured, resized: Resized) -> FleetAdapter:
    answer = member.curve.answer
    top = next(candidate for candidate in answer.candidates if candidate.trial_id == answer.trained_id)
    return FleetAdapter(
        adapter=str(member.adapter.path),
        rank_before=member.adapter.rank,
        rank=answer.rank,
        value=top.value,
        margin=answer.margin,
        candidates=answer.candidates,
        out=resized.out,
        relative_delta_error=resized.relative_delta_error,
        notes=[*resized.notes, *member.curve.gathered.notices],
    )


def _sentence(measured: Sequence[_Measured], rank: int, slot_before: int, slot: int) -> str:
    """The answer; `slot` is vLLM's `--max-lora-rank`."""
    before = max(member.adapter.rank for member in measured)
    every = _folder_names([member.adapter.path for member in measured])
    names = [name for name, member in zip(every, measured, strict=True) if member.curve.answer.rank == rank]
    binding = ", ".join(names) if len(names) <= MAX_NAMED else f"{len(names)} of them"
    if rank == before:
        return f"The {len(measured)} adapters need rank {rank}: {binding} would lose more than the margin below it."
    return (
        f"All {len(measured)} adapters can be truncated to rank {rank} (from {before}) without losing more than the margin; "
        f"{binding} {'needs' if len(names) == 1 else 'need'} it. A slot of vLLM shrinks from rank {slot_before} to {slot}, by {1 - slot / slot_before:.0%}."
    )
