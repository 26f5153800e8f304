"""Select a rank: `select_rank`, and its preflight."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from rightrank.bases.model_sources import require_model
from rightrank.cluster.workers import open_pool
from rightrank.data.rows import find_hub_data, read_rows
from rightrank.runs.run import Hook, Hooks, Selected
from rightrank.runs.selection import Rows, SelectionRequest
from rightrank.schema.errors import InterruptedRun, MissingExtraError, SettingsError
from rightrank.schema.events import Notice
from rightrank.schema.keywords import SelectKeywords
from rightrank.schema.results import Preflight
from rightrank.schema.setting_table import get_explicit_values, require_no_secret
from rightrank.schema.settings import SelectSettings
from rightrank.search.protocol import build_space
from rightrank.search.strategies import make_strategy

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def select_rank(
    model: str | PreTrainedModel,
    data: str | Path | Rows | Mapping[str, Rows],
    out: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    settings: SelectSettings | None = None,
    callbacks: Sequence[Hook] = (),
    progress: bool = False,
    **keywords: Unpack[SelectKeywords],
) -> Selected:
    """Train a range of ranks on `data`, decide which is enough, and export its adapter.

    Args:
        model: a model folder, a GGUF file, a hub name, or a transformers model in memory. A model in memory is frozen
            and moved to the device; its weights stay as they are.
        data: a file, a folder, an in-memory `datasets` object, an iterable of mappings, or a mapping of splits.
        out: the run folder. A second call with the same arguments resumes an unfinished run.
        tokenizer: the tokenizer of a model in memory.
        settings: see `SelectSettings`; None for the defaults.
        callbacks: hooks that watch the selection and can stop it; see `rightrank.runs.run.Hook`.
        progress: show the progress on stderr.
        keywords: the command's options by name, such as `ranks=(4, 16, 64), margin=0.01`; they override `settings`.

    Raises:
        InputError: model, data, settings or folder can't be used; nothing was started.
        RunError: the selection started and could not finish.
        InterruptedRun: `should_stop` of a callback returned True.
        KeyboardInterrupt: Ctrl-C; the step ended and checkpoints were written. The same call resumes.
    """
    from rightrank.data.files import report_disk_errors
    from rightrank.runs.folder import RunFolder
    from rightrank.runs.hooks import SignalHandler, View
    from rightrank.runs.trackers import Trackers

    request = SelectionRequest(model, tokenizer, data, SelectSettings(**get_explicit_values(settings) | keywords))
    _validate_request(request)
    trackers, folder = Trackers(request.settings.report_to), RunFolder(Path(out))
    with folder.lock(), report_disk_errors(folder.path), ExitStack() as stack:
        views = [stack.enter_context(View())] if progress else []
        tell = Hooks([*views, *callbacks]).send_notice
        stop = stack.enter_context(SignalHandler(tell))
        tell(f"run folder {out}: loading model and data")
        # These imports bring torch. They follow the lock, so that an unusable folder is refused at once.
        from rightrank.runs.hooks import Report
        from rightrank.runs.preflight import PreflightHook
        from rightrank.runs.prepare import prepare_run
        from rightrank.runs.run import select

        hooks = [*views, stop, PreflightHook(), trackers, Report(), *callbacks]
        open_workers = open_pool if request.settings.has_workers else None
        try:
            prepare = partial(prepare_run, request, open_workers=open_workers, announce=Hooks(hooks).send_notice)
            return select(prepare, folder, hooks)
        except InterruptedRun as interruption:
            if not stop.requested:
                raise
            raise KeyboardInterrupt(f"{interruption}; the same call resumes the run") from None


def preflight(
    model: str | PreTrainedModel,
    data: str | Path | Rows | Mapping[str, Rows],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    settings: SelectSettings | None = None,
    on_event: Callable[[Notice], None] = lambda _: None,
    **keywords: Unpack[SelectKeywords],
) -> Preflight:
    """Report what `select_rank` with the same arguments will do, cost and be able to show. Train and write nothing.

    Args:
        model: as in `select_rank`, like all other arguments.
        on_event: receives what is being done, before each step that takes long.

    Raises:
        InputError: model, data or settings can't be used.
    """
    from rightrank.runs.trackers import resolve_trackers

    request = SelectionRequest(model, tokenizer, data, SelectSettings(**get_explicit_values(settings) | keywords))
    _validate_request(request)  # before the imports that bring torch
    resolve_trackers(request.settings.report_to)

    def announce(text: str) -> None:
        on_event(Notice(text=text))

    announce("loading model and data")
    from rightrank.runs.preflight import run_preflight
    from rightrank.runs.prepare import prepare_selection

    with tempfile.TemporaryDirectory(prefix="rightrank-") as folder:
        prepared = prepare_selection(request, Path(folder) / "cache", announce)
        estimate = run_preflight(prepared, announce)
    return estimate.model_copy(update={"notes": [*prepared.notes, *estimate.notes]})


def _validate_request(request: SelectionRequest) -> None:
    """Refuse a request with which a selection can't work. It needs no torch.

    Raises:
        SettingsError: an unknown strategy, one that can't work within its budget, or workers
            that can't read a model or data in memory.
        MissingExtraError: the package that starts workers is not installed.
        DataError: a data file that is missing or of a type that is not supported.
        ModelError: a model folder that is missing or holds no model, a name that the hub does not have.
    """
    settings = request.settings
    require_no_secret("model", request.model_name)
    require_no_secret("data", request.data_name)
    make_strategy(settings.strategy, build_space(settings, settings.max_steps or 1))
    for source in (request.data, settings.validation or None):
        if isinstance(source, str | Path) and find_hub_data(Path(source)) is None:
            read_rows(Path(source))  # raises if it is no file or folder of rows, and reads none
    if isinstance(request.model, str):
        require_model(request.model)
    for label, value in (("model", request.model), ("data", request.data)):
        if settings.has_workers and not isinstance(value, str | Path):
            raise SettingsError(
                f"workers: the {label} is in memory, which workers can't read; give a path or a name, or leave workers out"
            )
    extra, package = ("workers", "loky") if settings.ray is None else ("ray", "ray")
    if settings.has_workers and find_spec(package) is None:
        raise MissingExtraError(f"{extra} needs the package {package}: pip install 'rightrank[{extra}]'")
