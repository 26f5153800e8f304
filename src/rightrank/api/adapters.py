"""Spectra of adapters and checkpoints, and adapters of another rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rightrank.errors import SettingsError
from rightrank.io.adapter_place import require_adapter_folder
from rightrank.records.probe import Allocation, AllocationTrial, Inspection, Resized, ResizedTogether
from rightrank.settings import SelectSettings, make_settings
from rightrank.settings.resize import ResizeOptions, ResizeRule


def inspect(
    adapter: str | Path | None = None, *, base: str | Path | None = None, finetuned: str | Path | None = None
) -> Inspection:
    """Compute the singular spectra of an adapter, or of what full fine-tuning changed.

    Args:
        adapter: a PEFT adapter folder.
        base: with `adapter`, the base model's folder, for the norms of the weights that the adapter changes.
        finetuned: instead of `adapter`: a checkpoint folder to compare with `base`.

    Raises:
        InputError: not a readable adapter or checkpoint, or two that don't belong together.
    """
    if adapter is not None and finetuned is None:
        _require_adapters([adapter])

        from rightrank.probe.adapter_spectra import inspect_adapter

        return inspect_adapter(Path(adapter), None if base is None else Path(base))
    if adapter is None and base is not None and finetuned is not None:
        from rightrank.probe.checkpoint_spectra import inspect_checkpoints

        return inspect_checkpoints(Path(base), Path(finetuned))
    raise SettingsError("give an adapter folder, or two checkpoints as base and finetuned (--base A --finetuned B)")


def _require_adapters(places: Sequence[str | Path]) -> None:
    """Refuse a missing folder, or one without an adapter, before torch is imported; files are left to their reader."""
    for place in map(Path, places):
        if not place.is_file():
            require_adapter_folder(place)


def inspect_gradient(model: str, data: str | Path, *, settings: SelectSettings | None = None) -> Inspection:
    """Compute the singular spectra of the loss's gradient to each weight that the settings adapt, before any training.

    Raises:
        InputError: the model, the data or a module name can't be used.
    """
    from rightrank.probe.checkpoint_spectra import SKETCH_RANK
    from rightrank.probe.gradient_spectra import inspect_gradient as spectra_of_gradient

    return spectra_of_gradient(model, Path(data), settings or make_settings({}), SKETCH_RANK)


def resize(
    adapter: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    noise: bool = False,
    data: str | Path | None = None,
    options: ResizeOptions | None = None,
) -> Resized:
    """Write the adapter at another rank to `out`, and report the truncation error.

    Exactly one of `rank`, `energy`, `noise` and `data` chooses the rank; with `data` it is the smallest whose held-out
    loss is not worse by `options.settings.margin`.

    Raises:
        InputError: the adapter, the rule, the data or `out` can't be used; nothing was written.
        RunError: recovery started and could not finish.
    """
    rule = ResizeRule(rank, energy, noise, None if data is None else Path(data))
    rule.require_one()
    _require_adapters([adapter])

    from rightrank.probe.resize import resize_adapter

    return resize_adapter(Path(adapter), Path(out), rule, options or ResizeOptions())


def resize_together(
    adapters: Sequence[str | Path],
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    noise: bool = False,
    options: ResizeOptions | None = None,
) -> ResizedTogether:
    """Write several adapters at one common rank, each to a folder of its own name under `out`.

    Exactly one of `rank`, `energy` and `noise` chooses the rank: the one given, or the largest that any module needs.

    Raises:
        InputError: one of the adapters can't be used, or two have the same name; nothing was written.
    """
    rule = ResizeRule(rank, energy, noise)
    rule.require_one()
    _require_adapters(adapters)

    from rightrank.probe.resize import resize_together as resize_all

    return resize_all([Path(adapter) for adapter in adapters], Path(out), rule, options or ResizeOptions())


def allocate(
    adapter: str | Path,
    data: str | Path,
    *,
    rank: int,
    learning_rate: float,
    max_steps: int,
    by: str = "sensitivity",
    pattern: str | Path | None = None,
    groups: Sequence[str] = (),
    seeds: Sequence[int] = (0, 1),
    base: str | None = None,
    settings: SelectSettings | None = None,
    on_trial: Callable[[AllocationTrial], None] = lambda _: None,
) -> Allocation:
    """Propose a rank for each module where trained evidence supports it; otherwise answer uniform.

    Args:
        adapter: a trained PEFT adapter folder, which the pattern is made from.
        data: the data to train and test on.
        rank: the rank of the uniform adapter that sets the number of parameters.
        learning_rate: the learning rate of every training.
        max_steps: the optimizer steps of every training.
        by: the measure of a module's importance: sensitivity, spectra, gradient or eva.
        pattern: a JSON file of {module: rank}, or {group: rank}, to test instead of one made by a measure.
        groups: such as `attention=q_proj+v_proj`: one rank for all modules with one of these parts in their names.
        seeds: one training of each pattern for each seed.
        base: the base model; None for the one that the adapter names.
        settings: see `SelectSettings`; None for the defaults.
        on_trial: receives each training that has ended.

    Raises:
        InputError: the adapter, data, measure or pattern can't be used.
        RunError: a training diverged.
    """
    from rightrank.probe.allocate import AllocateOptions
    from rightrank.probe.allocate import allocate as allocate_ranks

    options = AllocateOptions(
        rank,
        learning_rate,
        max_steps,
        by,
        None if pattern is None else Path(pattern),
        tuple(groups),
        tuple(seeds),
        base,
        settings or make_settings({}),
        on_trial,
    )
    return allocate_ranks(Path(adapter), Path(data), options)
