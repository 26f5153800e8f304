"""Select a rank: `select_rank`, its preflight and its plan."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from rightrank.records.observer import Observer
from rightrank.records.plan import Plan
from rightrank.records.preflight import Preflight
from rightrank.returns import Selected
from rightrank.settings import SelectKeywords, SelectSettings, make_settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rightrank.preparation import Rows


def select_rank(
    model: str | PreTrainedModel,
    data: str | Path | Rows | Mapping[str, Rows],
    out: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    settings: SelectSettings | None = None,
    watching: Observer | None = None,
    progress: bool = False,
    **keywords: Unpack[SelectKeywords],
) -> Selected:
    """Train a range of ranks on `data`, decide which is enough, and hand over its adapter.

    Args:
        model: a model folder, a GGUF file, a hub name, or a transformers model in memory. A model in memory is frozen
            and moved to the device; its weights stay as they are.
        data: a file, a folder, an in-memory `datasets` object, an iterable of mappings, or a mapping of splits.
        out: the run folder. A second call with the same arguments resumes an unfinished run.
        tokenizer: the tokenizer of a model in memory.
        settings: see `SelectSettings`; None for the defaults.
        watching: callbacks; see `Observer`.
        progress: show the progress on stderr, or in the cell of a notebook.
        keywords: the command's options by name, such as `ranks=(4, 16, 64), margin=0.01`; they override `settings`.

    Raises:
        InputError: model, data, settings or folder can't be used; nothing was started.
        RunError: the selection started and could not finish.
        InterruptedRun: `watching.should_stop` returned True.
        KeyboardInterrupt: Ctrl-C; the step ended and checkpoints were written. The same call resumes.
    """
    from rightrank.io.files import report_disk_errors
    from rightrank.io.run_folder import RunFolder
    from rightrank.report.interrupts import checkpointed
    from rightrank.report.watching import shown
    from rightrank.selection.early import require_request, require_same_scalars

    settings = _overridden(settings, keywords)
    require_request(model, data, settings)
    folder = RunFolder(Path(out))
    with (
        folder.locked(),
        report_disk_errors(folder.path),
        shown(watching or Observer(), progress) as seen,
        checkpointed(seen) as observer,
    ):
        require_same_scalars(folder, settings)
        # These imports bring torch, so they follow the lock: a folder that can't be used is refused at once.
        from rightrank.preparation import Request
        from rightrank.selection.select import select

        return select(Request(model, tokenizer, data, settings), folder, observer)


def begun_as(run: str | Path) -> dict[str, object]:
    """Return the model, the data and the settings of a run, with which `select_rank` resumes or continues it.

    Raises:
        RunFolderError: no run there, or one of another version that has settings this one does not know.
    """
    from rightrank.runs import begun_as as read

    return read(run)


def preflight(
    model: str | PreTrainedModel,
    data: str | Path | Rows | Mapping[str, Rows],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    settings: SelectSettings | None = None,
    price_per_hour: float | None = None,
    **keywords: Unpack[SelectKeywords],
) -> Preflight:
    """Say what `select_rank` with the same arguments will do, cost and be able to show; nothing is trained or written.

    Args:
        model: as in `select_rank`, and so are `data`, `tokenizer`, `settings` and `keywords`.
        price_per_hour: of this device, for the price.

    Raises:
        InputError: model, data or settings can't be used.
    """
    from rightrank.selection.early import require_request

    settings = _overridden(settings, keywords)
    require_request(model, data, settings)  # before what brings torch
    from rightrank.preparation import Request
    from rightrank.selection.preflight import preflight as prepare_only

    return prepare_only(Request(model, tokenizer, data, settings), price_per_hour)


def plan_selection(
    model: str | PreTrainedModel,
    data: str | Path | Rows | Mapping[str, Rows],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    settings: SelectSettings | None = None,
    price_per_hour: float | None = None,
    calibrate: bool = False,
    **keywords: Unpack[SelectKeywords],
) -> Plan:
    """Plan `select_rank` with the same arguments: memory and time of its ranks, steps and lengths; nothing is trained.

    Args:
        model: as in `select_rank`, and so are `data`, `tokenizer`, `settings` and `keywords`.
        price_per_hour: of this device, for the price.
        calibrate: take the seconds of a calibration, and store it for plans without data; a few steps of this selection
            are measured otherwise.

    Raises:
        InputError: model, data or settings can't be used, or the architecture can't be planned.
    """
    from rightrank.selection.early import require_request

    settings = _overridden(settings, keywords)
    require_request(model, data, settings)  # before what brings torch
    from rightrank.preparation import Request
    from rightrank.selection.data_plan import plan_data

    return plan_data(Request(model, tokenizer, data, settings), price_per_hour, calibrate)


def _overridden(settings: SelectSettings | None, keywords: SelectKeywords) -> SelectSettings:
    given = {} if settings is None else settings.model_dump(include=settings.model_fields_set)
    return make_settings(given | dict(keywords))
