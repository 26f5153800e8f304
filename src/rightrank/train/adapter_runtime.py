"""The runtime of an existing adapter: its base, the data, and the adapter attached by PEFT."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftModel

from rightrank.data.files import read_json_object
from rightrank.data.splits import DataSplits, load_data
from rightrank.models.adapter_files import AdapterFolder, peft_folder
from rightrank.models.base_models import LoadedModel, load_base, require_base
from rightrank.models.places import CONFIG_FILE, require_model
from rightrank.schema.errors import ModelError, SettingsError, first_line
from rightrank.schema.events import Evaluating
from rightrank.schema.settings import SelectSettings
from rightrank.train.adapter import unwrapped
from rightrank.train.runtime import Runtime
from rightrank.train.targets import without_peft_noise
from rightrank.train.tokens import encode


@dataclass(frozen=True, slots=True)
class DataUse:
    """The data to measure and train on, the settings, and a folder for working files."""

    data: Path
    settings: SelectSettings
    cache: Path
    steps: int = 0  # of training each adapter
    splits: DataSplits | None = None  # of the data, where they are not those of a selection
    loaded: LoadedModel | None = None  # the base, where it is loaded and checked already


def make_runtime(base: str, modules: tuple[str, ...] | None, use: DataUse, adapter: Path | None = None) -> Runtime:
    """The runtime that measures and trains adapters of exactly these modules; None takes the settings' own.

    Raises:
        SettingsError: a metric that needs more than an evaluation of losses.
        ModelError: the base cannot be loaded, lacks a module, or is another than that of `adapter`.
        DataError: the data cannot be used.
    """
    settings = use.settings.model_copy(update={"ranks": (1,)})
    if not settings.metric_specs[0].is_measured_along or settings.metrics:
        raise SettingsError(
            f"metric {settings.metric_name!r}: adapters are measured by loss or accuracy here; give one of them, and leave out metrics"
        )
    if modules is not None:
        settings = settings.model_copy(update={"target_modules": modules, "layers_to_transform": None})
    splits = load_data(use.data, settings) if use.splits is None else use.splits
    loaded = use.loaded or load_base(base, settings, splits.classes)
    if adapter is not None and use.loaded is None:
        require_base(adapter, loaded)
    settings = settings.of_form(splits.form)
    encoded = encode(splits, loaded, settings)
    return Runtime(loaded, encoded, settings, max(1, use.steps), use.cache)


def adapter_runtime(adapter: AdapterFolder, base: str | None, use: DataUse) -> Runtime:
    """The runtime that measures an adapter and its truncations.

    Raises:
        ModelError: no base is known, it cannot be loaded, it is another than the adapter's, or it lacks a module.
        DataError: the data cannot be used.
    """
    name = base or adapter.base_model
    if name is None:
        raise ModelError(f"{adapter.path}: names no base model; give one with --base MODEL")
    if base is None and use.loaded is None:
        _require_named_base(adapter, name)
    # A module that is trained whole may lie below the first adapter, where a cached prefix would be stale.
    caching = use.settings.cache_prefix and not adapter.other_keys
    parameters = dict.fromkeys(module.address for module in adapter.modules if module.kind == "expert")
    changes = {"cache_prefix": caching, "target_parameters": tuple(parameters)}
    use = replace(use, settings=use.settings.model_copy(update=changes))
    modules = tuple(module.name for module in adapter.modules if module.kind != "expert")
    return make_runtime(name, modules, use, adapter.path)


def _require_named_base(adapter: AdapterFolder, name: str) -> None:
    """Refuse a base that can't be found by the name in the adapter's configuration, such as a path from another folder."""
    try:
        require_model(name)
    except ModelError as error:
        raise ModelError(
            f"{adapter.path}: its {CONFIG_FILE} names the base {name!r}, which is not found from {Path.cwd()}; give it with "
            f"--base MODEL ({error})"
        ) from None


def report_evaluations(runtime: Runtime, what: str, report: Callable[[Evaluating], None]) -> None:
    """From now on, report the progress of the runtime's evaluations as those of `what`."""
    begun = time.perf_counter()

    def on_evaluated(items: int, of_items: int) -> None:
        seconds = time.perf_counter() - begun
        report(Evaluating(what=what, items=items, of_items=of_items, seconds=seconds))

    runtime.on_evaluated = on_evaluated


@contextmanager
def adapter_attached(runtime: Runtime, folder: Path) -> Iterator[Any]:
    """The PeftModel of an adapter folder around the runtime's base, which is restored when the block ends.

    Raises:
        ModelError: PEFT cannot attach this adapter to this base, or the adapter is of another task than the data.
    """
    _require_task(runtime, folder)
    try:
        with without_peft_noise(), peft_folder(folder) as place:
            peft_model: Any = PeftModel.from_pretrained(runtime.model, str(place))
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{folder}: PEFT cannot attach it to {runtime.loaded.name} ({first_line(error)}); give the base that it was trained on"
        ) from None
    peft_model.train(False)
    try:
        yield peft_model
    finally:
        unwrapped(peft_model)


def _require_task(runtime: Runtime, folder: Path) -> None:
    """Refuse an adapter of a language model for a classifier, and the reverse: PEFT fails on them in its own way."""
    file = folder / CONFIG_FILE
    task = read_json_object(file).get("task_type") if file.is_file() else None
    if task == "CAUSAL_LM" and runtime.data.is_classification:
        raise ModelError(
            f"{folder}: an adapter of a language model (task_type {task}), and the data have `text` and `label`, which need a "
            "classifier; give data with `prompt` and `completion`, or with `text` alone"
        )
    if task == "SEQ_CLS" and not runtime.data.is_classification:
        raise ModelError(f"{folder}: an adapter of a classifier (task_type {task}); give data with `text` and `label`")
