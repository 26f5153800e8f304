"""`resize`: from the rule and the options to the folder that is written."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rightrank.adapters.rank_choice import (
    RankChoice,
    ResizeOptions,
    ResizeRule,
    by_energy,
    by_noise,
    by_rank,
    candidate_ranks,
)
from rightrank.adapters.rewrite import require_plain_update, write_resized
from rightrank.data.files import replacing_folder, require_absent
from rightrank.data.rows import read_rows
from rightrank.models.adapter_files import AdapterFolder, open_adapter
from rightrank.schema.errors import RunFolderError, SettingsError
from rightrank.schema.results import Resized, ResizedTogether

MANY_EXAMPLES = 2000  # above which scoring may take long, and fewer are proposed


def resize_adapter(path: Path, out: Path, rule: ResizeRule, options: ResizeOptions) -> Resized:
    """Write the adapter in `path` at other ranks to `out`.

    Raises:
        InputError: the adapter, the rule, the data or `out` cannot be used; nothing is written.
        RunError: recovery diverged.
    """
    rule.require_one()
    require_absent(out)
    adapter = open_adapter(path)
    require_plain_update(adapter)
    if rule.data is None:
        return write_resized(adapter, out, _choice(adapter, rule, options), options.dtype, base=options.base)
    return _by_data(adapter, out, rule.data, options)


def resize_together(paths: Sequence[Path], out: Path, rule: ResizeRule, options: ResizeOptions) -> ResizedTogether:
    """Several adapters at one common rank, each in a folder of its name under `out`.

    The common rank is that of the rule, or the largest that any module of any adapter needs: the `max_lora_rank` of a
    server.

    Raises:
        InputError: one of them cannot be used, or two have the same name; nothing is written.
    """
    rule.require_one()
    require_absent(out)
    if rule.data is not None:
        raise SettingsError(
            "--data measures one adapter on its own data; `rightrank fleet` measures several and brings them to one rank"
        )
    adapters = open_together(paths)
    choices = [_choice(adapter, rule, options) for adapter in adapters]
    rank = max(choice.common for choice in choices)
    for adapter in adapters:
        by_rank(adapter, rank)  # refuses a rank above a module's limit before anything is written

    def write(place: int, folder: Path) -> Resized:
        return write_resized(adapters[place], folder, choices[place].as_common(rank), options.dtype, base=options.base)

    return ResizedTogether(rank=rank, adapters=write_together(adapters, out, write))


def open_together(paths: Sequence[Path]) -> list[AdapterFolder]:
    """Adapters that are written beside each other.

    Raises:
        InputError: one of them cannot be used, or two have the same name.
    """
    names = folder_names(paths)
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise SettingsError(
            f"two adapters are in folders named {twice!r}; rename one, since OUT gets one folder for each adapter"
        )
    adapters = [open_adapter(path) for path in paths]
    for adapter in adapters:
        require_plain_update(adapter)
    return adapters


def folder_names(paths: Sequence[Path]) -> list[str]:
    """The name under which each adapter is written: that of its folder, of its run where several are called `adapter`.

    Other folders of one name get that of the folder around them in front.
    """
    places = [path.resolve() for path in paths]
    names = [place.name for place in places]
    return [
        name if names.count(name) == 1 else place.parent.name if name == "adapter" else f"{place.parent.name}-{name}"
        for place, name in zip(places, names, strict=True)
    ]


def write_together(
    adapters: Sequence[AdapterFolder],
    out: Path,
    write: Callable[[int, Path], Resized],
    further: Callable[[Path], None] = lambda _: None,
) -> list[Resized]:
    """Write every adapter to a folder of its name under `out`, whole or not at all.

    Args:
        write: writes the adapter at a place of `adapters` to a folder.
        further: writes what else belongs into `out`.
    """
    _require_writable(out)
    names = folder_names([adapter.path for adapter in adapters])
    with replacing_folder(out) as temporary:
        written = [write(place, temporary / name) for place, name in enumerate(names)]
        further(temporary)
    return [one.model_copy(update={"out": str(out / name)}) for one, name in zip(written, names, strict=True)]


def _require_writable(out: Path) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"{out}: cannot write there ({error.strerror or error}); give a writable folder") from None


def _choice(adapter: AdapterFolder, rule: ResizeRule, options: ResizeOptions) -> RankChoice:
    if rule.rank is not None:
        return by_rank(adapter, rule.rank)
    choice = by_noise(adapter) if rule.noise else by_energy(adapter, rule.energy or 0.0)
    return choice.as_common() if options.uniform else choice


def _by_data(adapter: AdapterFolder, out: Path, data: Path, options: ResizeOptions) -> Resized:
    # Only a measurement needs these heavy imports.
    from rightrank.adapters.held_out import Candidates, Recovery, resize_by_data, scored_data
    from rightrank.train.adapter_runtime import DataUse, adapter_runtime

    if options.recover_steps and options.learning_rate is None:
        raise SettingsError("--recover needs --learning-rate; give the one that the adapter was trained at")
    ranks = candidate_ranks(adapter, options.ranks)
    if options.recover_steps and options.train is None and None in read_rows(data):
        options = replace(options, train=data)  # recovery needs training examples: the split that select makes
    scored = scored_data(adapter, data, options.train, options.settings)
    options.notice(scored.note)
    measured = ", ".join(map(str, sorted(ranks, reverse=True)))
    count = len(scored.splits.examples["selection"])
    fewer = "" if count <= MANY_EXAMPLES else "; --set eval_items=1000 measures on fewer"
    options.notice(f"measuring the base, then ranks {measured}, each on {count:,} examples{fewer}")
    recovery = Recovery(options.recover_steps, options.learning_rate) if options.learning_rate else None
    candidates = Candidates(
        ranks,
        recovery if options.recover_steps else None,
        options.dtype,
        options.on_rank,
        by_halves=scored.scores_training_examples,
    )
    with tempfile.TemporaryDirectory(prefix="rightrank-") as name:
        use = DataUse(data, options.settings, Path(name) / "cache", options.recover_steps, scored.splits)
        runtime = adapter_runtime(adapter, options.base, use)
        resized = resize_by_data(adapter, out, runtime, candidates, Path(name))
    return resized.model_copy(update={"notes": [*resized.notes, scored.note], "scored_examples": count})
