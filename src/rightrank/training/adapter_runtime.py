"""Build the runtime of an existing adapter: load its base model, check that the adapter was trained on it, and encode the data."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from rightrank.adapters.adapter_folders import BASE_FILE, CONFIG_FILE
from rightrank.adapters.adapter_reader import AdapterFolder
from rightrank.bases.base_models import LoadedModel, load_base, read_identity
from rightrank.bases.model_sources import normalize_model_name, require_model
from rightrank.data.files import UnreadableError, read_json_object
from rightrank.data.splits import DataSplits, load_data
from rightrank.schema.errors import ModelError, SettingsError
from rightrank.schema.events import EvaluationProgress
from rightrank.schema.settings import SelectSettings
from rightrank.training.runtime import Runtime
from rightrank.training.tokens import encode_splits


@dataclass(frozen=True, slots=True)
class RuntimeInputs:
    """The data to measure and train on, the settings, and a folder for temporary files."""

    data: Path
    settings: SelectSettings
    cache: Path | None
    steps: int = 0  # optimizer steps to train each adapter
    splits: DataSplits | None = None  # None: split the data as a selection does
    loaded: LoadedModel | None = None  # the base, if it is already loaded and checked


def make_runtime(
    base: str, modules: tuple[str, ...] | None, inputs: RuntimeInputs, adapter: Path | None = None
) -> Runtime:
    """Make a runtime that measures and trains adapters of exactly these modules.

    Args:
        modules: names of the target modules; None uses `target_modules` of the settings.
        adapter: an adapter folder; the base must be the one that it was trained on.

    Raises:
        SettingsError: the metric needs more than an evaluation of losses.
        ModelError: the base cannot be loaded, lacks a module, or is not the base of `adapter`.
        DataError: the data cannot be used.
    """
    settings = inputs.settings.model_copy(update={"ranks": (1,)})
    if not settings.metric_specs[0].is_eval_metric or settings.metrics:
        raise SettingsError(
            f"metric {settings.metric_name!r}: this command measures adapters by loss or accuracy; give one of them, and leave metrics out"
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
    """Make a runtime that measures an adapter and its truncations.

    Raises:
        ModelError: no base is named, the base cannot be loaded, it is not the adapter's base, or it lacks a module.
        DataError: the data cannot be used.
    """
    if adapter.path.is_file():
        raise ModelError(f"{adapter.path}: PEFT loads no such file onto a base model; choose by --rank")
    name = base or adapter.base_model
    if name is None:
        raise ModelError(f"{adapter.path}: the configuration names no base model; give one with --base MODEL")
    if base is None and inputs.loaded is None:
        _require_named_base(adapter, name)
    # A fully trained module may lie below the first adapter, where a cached prefix would be stale.
    cache = None if adapter.other_keys else inputs.cache
    parameters = dict.fromkeys(module.address for module in adapter.modules if module.kind == "expert")
    settings = inputs.settings.model_copy(update={"target_parameters": tuple(parameters)})
    inputs = replace(inputs, settings=settings, cache=cache)
    module_names = tuple(module.name for module in adapter.modules if module.kind != "expert")
    return make_runtime(name, module_names, inputs, adapter.path)


def _require_named_base(adapter: AdapterFolder, name: str) -> None:
    """Raise if the base named in the adapter's configuration cannot be found, for example a path from another folder."""
    try:
        require_model(name)
    except ModelError as error:
        raise ModelError(
            f"{adapter.path}: its {CONFIG_FILE} names the base {name!r}, which cannot be found from {Path.cwd()}; give it with "
            f"--base MODEL ({error})"
        ) from None


def report_evaluation_progress(
    runtime: Runtime, description: str, report: Callable[[EvaluationProgress], None], num_evaluations: int = 1
) -> None:
    """Report the progress of the runtime's evaluations under `description` from now on.

    Args:
        num_evaluations: The number of evaluations that are left, with this one. The reported total covers all of them.
    """
    start_time = time.perf_counter()

    def on_evaluated(num_evaluated: int, num_total: int) -> None:
        total, seconds = num_total * num_evaluations, time.perf_counter() - start_time
        report(EvaluationProgress(what=description, examples=num_evaluated, total_examples=total, seconds=seconds))

    runtime.on_evaluated = on_evaluated


def require_matching_base(adapter: Path, base: LoadedModel) -> None:
    """Raise if the adapter was trained on a different base. Every command that loads an adapter onto a base calls this function.

    The check compares the identity in the adapter's `base.json`. Without that file it compares the last component of the names.

    Raises:
        ModelError: the base differs, or `base.json` is damaged.
    """
    identity_file, configured_name = adapter / BASE_FILE, _read_string(adapter / CONFIG_FILE, "base_model_name_or_path")
    if identity_file.is_file():
        stored_identity = read_identity(identity_file)
        if (difference := stored_identity.find_difference(base.identity)) is not None:
            raise ModelError(
                f"{adapter}: it was trained on a different base, {stored_identity.name}, than {base.name} ({difference}); give the base that it "
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


def _read_string(file: Path, key: str) -> str | None:
    """Return the string under `key` of a configuration file; None if there is none."""
    try:
        text = read_json_object(file).get(key)
    except UnreadableError:
        return None
    return text if isinstance(text, str) and text else None
