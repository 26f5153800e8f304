"""The runtime of an existing adapter: its base, which must be the one that it was trained on, and the data."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from rightrank.data.files import UnreadableError, read_json_object
from rightrank.data.splits import DataSplits, load_data
from rightrank.models.adapter_folders import BASE_FILE, CONFIG_FILE
from rightrank.models.adapter_reader import AdapterFolder
from rightrank.models.base_models import BaseIdentity, LoadedModel, load_base
from rightrank.models.model_sources import normalize_model_name, require_model
from rightrank.schema.errors import ModelError, SettingsError, first_line
from rightrank.schema.events import Evaluating
from rightrank.schema.settings import SelectSettings
from rightrank.train.runtime import Runtime
from rightrank.train.tokens import encode_splits


@dataclass(frozen=True, slots=True)
class RuntimeInputs:
    """The data to measure and train on, the settings, and a folder for working files."""

    data: Path
    settings: SelectSettings
    cache: Path
    steps: int = 0  # of training each adapter
    splits: DataSplits | None = None  # of the data, where they are not those of a selection
    loaded: LoadedModel | None = None  # the base, where it is loaded and checked already


def make_runtime(base: str, modules: tuple[str, ...] | None, inputs: RuntimeInputs, adapter: Path | None = None) -> Runtime:
    """The runtime that measures and trains adapters of exactly these modules; None takes the settings' own.

    Raises:
        SettingsError: a metric that needs more than an evaluation of losses.
        ModelError: the base cannot be loaded, lacks a module, or is another than that of `adapter`.
        DataError: the data cannot be used.
    """
    settings = inputs.settings.model_copy(update={"ranks": (1,)})
    if not settings.metric_specs[0].is_eval_metric or settings.metrics:
        raise SettingsError(
            f"metric {settings.metric_name!r}: adapters are measured by loss or accuracy here; give one of them, and leave out metrics"
        )
    if modules is not None:
        settings = settings.model_copy(update={"target_modules": modules, "layers_to_transform": None})
    splits = load_data(inputs.data, settings) if inputs.splits is None else inputs.splits
    loaded = inputs.loaded or load_base(base, settings, splits.summary.classes)
    if adapter is not None and inputs.loaded is None:
        require_matching_base(adapter, loaded)
    encoded = encode_splits(splits, loaded, settings)
    return Runtime(loaded, encoded, settings, max(1, inputs.steps), inputs.cache)


def make_adapter_runtime(adapter: AdapterFolder, base: str | None, inputs: RuntimeInputs) -> Runtime:
    """The runtime that measures an adapter and its truncations.

    Raises:
        ModelError: no base is known, it cannot be loaded, it is another than the adapter's, or it lacks a module.
        DataError: the data cannot be used.
    """
    name = base or adapter.base_model
    if name is None:
        raise ModelError(f"{adapter.path}: names no base model; give one with --base MODEL")
    if base is None and inputs.loaded is None:
        _require_named_base(adapter, name)
    # A module that is trained whole may lie below the first adapter, where a cached prefix would be stale.
    is_cached = inputs.settings.cache_prefix and not adapter.other_keys
    parameters = dict.fromkeys(module.address for module in adapter.modules if module.kind.name == "expert")
    updates = {"cache_prefix": is_cached, "target_parameters": tuple(parameters)}
    inputs = replace(inputs, settings=inputs.settings.model_copy(update=updates))
    module_names = tuple(module.name for module in adapter.modules if module.kind.name != "expert")
    return make_runtime(name, module_names, inputs, adapter.path)


def _require_named_base(adapter: AdapterFolder, name: str) -> None:
    """Refuse a base that can't be found by the name in the adapter's configuration, such as a path from another folder."""
    try:
        require_model(name)
    except ModelError as error:
        raise ModelError(
            f"{adapter.path}: its {CONFIG_FILE} names the base {name!r}, which is not found from {Path.cwd()}; give it with "
            f"--base MODEL ({error})"
        ) from None


def report_evaluation_progress(runtime: Runtime, description: str, report: Callable[[Evaluating], None]) -> None:
    """From now on, report the progress of the runtime's evaluations as those of `what`."""
    start_time = time.perf_counter()

    def on_evaluated(items: int, of_items: int) -> None:
        seconds = time.perf_counter() - start_time
        report(Evaluating(what=description, examples=items, total_examples=of_items, seconds=seconds))

    runtime.on_evaluated = on_evaluated


def require_matching_base(adapter: Path, base: LoadedModel) -> None:
    """Refuse a base that the adapter was not trained on: the one check of every command that puts an adapter on a base.

    `base.json` beside the adapter decides where it is; else the name alone, by its last part.

    Raises:
        ModelError: another base, or a damaged `base.json`.
    """
    identity_file, configured_name = adapter / BASE_FILE, _read_string(adapter / CONFIG_FILE, "base_model_name_or_path")
    if identity_file.is_file():
        stored_identity = read_identity(identity_file)
        if (difference := stored_identity.difference(base.identity)) is not None:
            raise ModelError(
                f"{adapter}: it was trained on another base, {stored_identity.name}, than {base.name} ({difference}); give the base that it "
                "was trained on"
            )
        return
    saved_name = _read_string(Path(base.name) / "config.json", "_name_or_path")
    names = [normalize_model_name(name) for name in (base.name, saved_name or base.name)]
    if configured_name is not None and normalize_model_name(configured_name) not in names:
        raise ModelError(
            f"{adapter}: it was trained on {configured_name!r}, not on {base.name!r}; give that base, or if they are the same model, write the "
            f"new name into its {CONFIG_FILE} (base_model_name_or_path)"
        )


def read_identity(file: Path) -> BaseIdentity:
    """The `base.json` beside an adapter.

    Raises:
        ModelError: damaged.
    """
    try:
        return BaseIdentity.model_validate(read_json_object(file))
    except (UnreadableError, ValidationError) as error:
        raise ModelError(
            f"{file}: does not identify a base ({first_line(error)}); copy the adapter again, or remove the file"
        ) from None


def _read_string(file: Path, key: str) -> str | None:
    """The text under `key` of a configuration; None where there is none."""
    try:
        text = read_json_object(file).get(key)
    except UnreadableError:
        return None
    return text if isinstance(text, str) and text else None
