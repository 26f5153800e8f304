"""From a request to a selection that can start: load data and base, settle the ranks, compute the run's identity.

Preparing the same request again, here or in another process, gives an equal runtime and the same identity.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeAlias

from rightrank.data.forms import DataForm
from rightrank.data.splits import DataSplits, load_data
from rightrank.decision.records import settled_start
from rightrank.models.base_models import (
    DTYPES,
    LoadedModel,
    adopt_model,
    adopted_labels,
    load_base,
    model_config,
    model_skeleton,
    resolve_dtype,
)
from rightrank.runs.executor import Plan
from rightrank.runs.folder import RunFolder
from rightrank.runs.local import Prepared
from rightrank.runs.plugins import MemoryPlan, first
from rightrank.runs.values import Request
from rightrank.schema.errors import SettingsError
from rightrank.schema.events import JournalRecord, RunStarted
from rightrank.schema.settings import SelectSettings, settings_of_identity
from rightrank.schema.trials import content_hash
from rightrank.search import make_strategy
from rightrank.search.history import space_of
from rightrank.search.protocol import Strategy
from rightrank.train.metrics import require_scorers
from rightrank.train.runtime import Runtime, visible_label
from rightrank.train.targets import Targets, find_targets
from rightrank.train.tokens import EncodedData, encode
from rightrank.version import __version__

Notice: TypeAlias = Callable[[str], None]

METRICS_OF_FORMS = (  # kind of metric, the form of data that it needs, and that form's columns
    ("classes", "classification", "`text` and `label`"),
    ("pairs", "preference", "`prompt`, `chosen` and `rejected`"),
)
# A configuration's word for a token that sees those that follow: as BERT, as XLM, as XLNet
SEES_LATER = (("is_decoder", False), ("causal", False), ("attn_type", "bi"))


@dataclass(frozen=True, slots=True)
class _Sources:
    splits: DataSplits
    loaded: LoadedModel
    encoded: EncodedData
    targets: Targets | None  # None: a model in memory


def prepare(
    request: Request, cache: Path, notice: Notice = lambda _: None, loaded: LoadedModel | None = None
) -> Prepared:
    """Load, encode and plan.

    Args:
        cache: the folder for what all arms share on disk.
        notice: receives each line for a person.
        loaded: the base, where a request that differs in ranks and learning rates alone has loaded it.

    Raises:
        InputError: model, data or settings can't be used.
    """
    request = _with_dtype(request)
    sources = _load(request, loaded, cache.parent)
    held_out = request.settings.held_out_items(len(sources.splits.examples["train"]))
    given = request.settings.model_copy(update={"eval_items": held_out})
    classes = len(sources.splits.summary.classes or ()) if sources.encoded.is_classification else None
    planned = first(lambda plugin: plugin.memory_plan(sources.loaded, sources.encoded, classes, given, notice))
    settings = given if planned is None else given.model_copy(update={"ranks": planned.ranks})  # those that fit
    examples = len(sources.encoded.splits["train"])
    steps = settings.training_steps(examples)
    targets = None if planned is None else sources.targets  # without a plan the ranks are checked on the model
    runtime = Runtime(sources.loaded, sources.encoded, settings, steps, cache, targets)
    started = _started(request, sources, settings, steps)
    targets = runtime.targets
    tied = targets.tied_line(sources.loaded.model, settings.modules_to_save)
    notes = [line for line in (tied, targets.start_line) if line]
    for line in notes:
        notice(line)
    started = started.model_copy(update={"notes": notes})
    return Prepared(
        request=request,
        runtime=runtime,
        settings=settings,
        steps=steps,
        started=started,
        planned=planned,
        top_origin=_top_origin(given, planned),
        strategy=_strategy(runtime, settings, steps, started),
    )


def _top_origin(given: SelectSettings, planned: MemoryPlan | None) -> str:
    """Where the highest rank comes from."""
    if planned is not None and max(planned.ranks) < max(planned.peak_bytes):
        return "the largest that fits the memory"
    if "ranks" in given.model_fields_set:
        return "the largest asked for"
    limited = planned is not None and max(planned.ranks) < max(given.ranks)
    return "the largest default that every matrix can have" if limited else "the default for every data set"


def _strategy(runtime: Runtime, settings: SelectSettings, steps: int, started: RunStarted) -> Strategy:
    """The strategy of the settings, for this selection's steps and data."""
    reason = runtime.targets.why_not_truncated
    if reason is not None and settings.goal == "adapter":
        raise SettingsError(
            f"goal 'adapter' needs adapters that can be truncated ({reason}); give goal 'training-rank'"
        )
    space = space_of(settings, steps, started.data.loss_kind)
    return make_strategy(settings.strategy, replace(space, truncates=reason is None))


@dataclass(frozen=True, slots=True)
class Preparation:
    """A request whose base and data are loaded here; see `rightrank.runs.executor.Asked`."""

    request: Request

    def plan(self, folder: RunFolder, journal: Sequence[JournalRecord], before: Plan | None = None) -> Prepared:
        """As `prepare`, for a run that may have begun in `folder`."""
        notes: list[str] = []
        loaded = before.runtime.loaded if isinstance(before, Prepared) else None
        prepared = prepare(_resuming(self.request, journal), folder.cache, notes.append, loaded)
        return replace(prepared, notes=tuple(notes))

    def extended(self, settings: SelectSettings) -> Preparation:
        return Preparation(replace(self.request, settings=settings))


def _resuming(request: Request, journal: Sequence[JournalRecord]) -> Request:
    """The request with the settings under which the journal's run was begun; unchanged if the journal is empty."""
    first = journal[0] if journal else None
    if not isinstance(first, RunStarted):
        return request
    settings = request.settings
    if "dtype" not in request.settings.model_fields_set:
        settings = settings.model_copy(update={"dtype": first.select_settings.dtype})  # what auto meant
    last = settled_start(journal).select_settings.eval_items
    if last is not None and last > (settings.eval_items or 0):
        settings = settings.model_copy(update={"eval_items": last})  # examples are added, and never taken away
    return replace(request, settings=settings, begun=first.settings)


def _with_dtype(request: Request) -> Request:
    """The request with the type that `auto` means here; a model in memory keeps its own."""
    settings = request.settings
    if isinstance(request.model, str):
        dtype = resolve_dtype(settings.dtype, settings.device)
    else:
        own = str(getattr(request.model, "dtype", "")).removeprefix("torch.")
        dtype = own if settings.dtype == "auto" and own in DTYPES else resolve_dtype(settings.dtype, "cpu")
    return replace(request, settings=settings.model_copy(update={"dtype": dtype}))


def _load(request: Request, loaded: LoadedModel | None, folder: Path) -> _Sources:
    settings = request.settings
    require_scorers(settings)
    if isinstance(request.model, str) and request.tokenizer is not None:
        raise SettingsError("tokenizer: a model given by name brings its own; leave it out")
    begun_items = (request.begun or {}).get("eval_items")
    data = Path(request.data) if isinstance(request.data, str) else request.data
    splits = load_data(data, settings, folder, begun_items if isinstance(begun_items, int) else None)
    if splits.summary.classes is not None and hasattr(request.model, "config"):
        labels = adopted_labels(request.model.config, splits.summary.classes)
        splits = replace(splits, summary=splits.summary.model_copy(update={"classes": labels}))
    _require_metrics_fit(settings, splits.form)
    targets = _targets(request.model, splits, settings) if isinstance(request.model, str) else None
    if loaded is None and isinstance(request.model, str):
        loaded = load_base(request.model, settings, splits.summary.classes)
    elif loaded is None:
        loaded = adopt_model(request.model, request.tokenizer, settings.device, splits.summary.classes)
    return _Sources(splits, loaded, encode(splits, loaded, settings, folder), targets)


def _targets(model: str, splits: DataSplits, settings: SelectSettings) -> Targets:
    """The targets by the modules that the configuration builds: what is impossible is refused before a weight is read."""
    classification = splits.form == "classification"
    trusted, count = settings.trust_remote_code, len(splits.summary.classes or ()) if classification else None
    skeleton = model_skeleton(model_config(model, trusted, classification), trusted, count)
    causal = any(getattr(module, "is_causal", False) for module in skeleton.modules())
    sees_later = any(getattr(skeleton.config, name, None) == value for name, value in SEES_LATER)
    if not classification and sees_later and not causal:
        raise visible_label(model)
    given = "ranks" in settings.model_fields_set  # the plan leaves out default ranks that a matrix can't have
    return find_targets(skeleton, settings if given else settings.model_copy(update={"ranks": ()}), classification)


def _require_metrics_fit(settings: SelectSettings, form: DataForm) -> None:
    """Refuse metrics that data of this form can't have."""
    for spec in settings.metric_specs:
        for kind, needed, columns in METRICS_OF_FORMS:
            if spec.kind == kind and form != needed:
                raise SettingsError(
                    f"metric {spec.name!r} needs {columns}; the data has the form {form!r}: give metric 'loss'"
                )
        if form == "text" and not spec.is_measured_along:
            raise SettingsError(
                f"metric {spec.name!r} needs the model to write for a prompt, and the data has the form {form!r}: "
                "give `prompt` and `completion`, or metric 'loss'"
            )


def _started(request: Request, sources: _Sources, settings: SelectSettings, steps: int) -> RunStarted:
    values = {"model": request.model_name, "data": request.data_name, **settings.model_dump(mode="json")}
    identity = {
        "settings": settings_of_identity(values, request.begun or {}),
        "model": sources.loaded.fingerprint,
        "data": sources.splits.fingerprint,
        "steps": steps,
    }
    return RunStarted(
        rightrank_version=__version__,
        fingerprint=content_hash(identity),
        settings=values,
        environment=environment_of(str(sources.loaded.device)),
        data=sources.encoded.summary,
        evaluation_items=[example.item_id for example in sources.encoded.splits["selection"]],
        metric=settings.metric_name,
        higher_is_better=settings.is_higher_better(settings.metric_name),
        points_metric=settings.points_metric if settings.points_metric != settings.metric_name else None,
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def environment_of(device: str) -> dict[str, str]:
    """Versions and hardware that a run's numbers depend on; no names of people, machines or paths."""
    import peft
    import torch
    import transformers

    environment = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "device": device,
        "threads": str(torch.get_num_threads()),
    }
    if device.startswith("cuda"):
        environment["gpu"] = torch.cuda.get_device_name(device)
    return environment
