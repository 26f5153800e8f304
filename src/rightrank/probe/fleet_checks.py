"""What a fleet must be: two adapters or more of one base, with common modules and data that can be scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rightrank.errors import DataError, ModelError, SettingsError
from rightrank.io.adapter_folder import AdapterFolder
from rightrank.io.files import require_absent
from rightrank.io.models import LoadedModel, load_base
from rightrank.io.reading import UnreadableError, read_json_object
from rightrank.probe.merge import require_summable
from rightrank.probe.resize import open_together
from rightrank.probe.scored_data import ScoredData
from rightrank.settings import SelectSettings

MERGED = "merged"
WHOLE_WEIGHTS = ("linear", "embedding", "convolution")  # kinds of modules with a weight of their own in the base


@dataclass(frozen=True, slots=True)
class FleetRequest:
    """What to bring to one rank; see `rightrank.api.fleet` for each field."""

    adapters: Sequence[Path]
    model: str
    data: Sequence[Path]  # one for all adapters, or one for each
    out: Path
    settings: SelectSettings
    ranks: Sequence[int] | None = None
    pad: bool = False
    recover_steps: int = 0
    learning_rate: float | None = None
    weights: Sequence[float] | None = None  # of the exact sum; None: no sum
    ignore_base_name: bool = False
    notice: Callable[[str], None] = field(default=lambda _: None)


def open_adapters(request: FleetRequest) -> list[AdapterFolder]:
    if len(request.adapters) < 2:
        raise SettingsError(
            f"{len(request.adapters)} adapter given: a fleet has two or more; `rightrank resize` takes one"
        )
    require_absent(request.out)
    if request.recover_steps and request.learning_rate is None:
        raise SettingsError("--recover needs --learning-rate; give the one that the adapters were trained at")
    adapters = open_together(request.adapters)
    if request.weights is not None:
        if len(request.weights) != len(adapters):
            raise SettingsError(f"{len(request.weights)} weights for {len(adapters)} adapters; give one for each")
        if any(adapter.path.resolve().name == MERGED for adapter in adapters):
            raise SettingsError(f"an adapter is in a folder named {MERGED!r}, where the sum is written; rename it")
        require_summable(adapters)
    for adapter in adapters:
        own = {module.name for module in adapter.modules}
        others = {module.name for other in adapters if other is not adapter for module in other.modules}
        if not own & others:
            raise ModelError(
                f"{adapter.path}: it has no module in common with the others (it adapts {sorted(own)[0]}, they {sorted(others)[0]}); "
                "a fleet shares one base and its modules: leave it out"
            )
    return adapters


def data_of(request: FleetRequest) -> list[Path]:
    if not request.data:
        raise SettingsError("no data: give --data FILE once for all adapters, or once for each, in their order")
    if len(request.data) == 1:
        return [request.data[0]] * len(request.adapters)
    if len(request.data) != len(request.adapters):
        raise SettingsError(
            f"{len(request.data)} data files for {len(request.adapters)} adapters; give one for all, or one for each in their order"
        )
    return list(request.data)


def load_shared_base(request: FleetRequest, scored: Sequence[ScoredData]) -> LoadedModel:
    classes = {None if one.splits.classes is None else tuple(one.splits.classes) for one in scored}
    if len(classes) > 1:
        raise DataError(
            "the data files have different labels: adapters of one fleet share one head; give data of one kind"
        )
    return load_base(request.model, request.settings, classes.pop())


def require_base_name(adapters: Sequence[AdapterFolder], request: FleetRequest) -> None:
    """Refuse adapters that name another base."""
    names = [request.model, _name_in_config(request.model)]
    for adapter in adapters:
        if adapter.base_model is not None and not request.ignore_base_name and not _alike(adapter.base_model, names):
            raise ModelError(
                f"{adapter.path}: it was trained on {adapter.base_model!r}, not on {request.model!r}; leave it out, or give "
                "--ignore-base-name if they are the same model"
            )


def _name_in_config(model: str) -> str:
    """The name under which the model was saved; the model's own where there is none."""
    try:
        found = read_json_object(Path(model) / "config.json").get("_name_or_path")
    except UnreadableError:
        return model
    return found if isinstance(found, str) and found else model


def require_shapes(adapters: Sequence[AdapterFolder], loaded: LoadedModel, request: FleetRequest) -> None:
    """Refuse adapters whose modules the base does not have, or has in other shapes."""
    shapes = {name: tuple(parameter.shape) for name, parameter in loaded.model.named_parameters()}
    for adapter in adapters:
        for module in adapter.modules:
            shape = shapes.get(f"{module.name}.weight")
            if shape is None and module.kind in WHOLE_WEIGHTS and request.settings.weight_bits is None:
                raise ModelError(
                    f"{adapter.path}: {request.model} has no module {module.name}: it is an adapter of another base"
                )
            if shape is not None and module.kind == "linear" and sorted(shape) != sorted((module.rows, module.columns)):
                raise ModelError(
                    f"{adapter.path}: {module.name} is {module.rows} × {module.columns} in the adapter and "
                    f"{' × '.join(map(str, shape))} in {request.model}: it is an adapter of another base"
                )


def _alike(name: str, others: Sequence[str]) -> bool:
    """Whether a base's name is one of the others: by place, or by its last part, whoever holds a copy."""
    if any(
        Path(name).exists() and Path(other).exists() and Path(name).resolve() == Path(other).resolve()
        for other in others
    ):
        return True
    return _last(name) in {_last(other) for other in others}


def _last(name: str) -> str:
    return name.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1].lower()
