"""Hooks, which watch a selection and can stop it. The core knows none of them by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from rightrank.schema.errors import RightrankError, RunError, describe_error, log_traceback
from rightrank.schema.events import AnyJournalRecord, Event, Listener, RunContinued, RunStarted

if TYPE_CHECKING:
    from rightrank.runs.folder import RunFolder
    from rightrank.runs.selection import PreparedSelection
    from rightrank.runs.values import Selected
    from rightrank.schema.events import Records


class Hook(Listener):
    """A base class for objects that watch a selection and can stop it. Every method does nothing by default.

    All methods run on the thread that calls `select_rank`, one hook after the other in the order of `callbacks`. A hook that
    raises an error ends the selection with one line that names the hook. Finished trials are kept, and the same call resumes.

    Example::

        class Deadline(Hook):
            def should_stop(self) -> bool:
                return time.time() > END

        select_rank(model, data, "run", callbacks=[Deadline()])
    """

    is_required = True
    """Whether an error of the hook ends the selection at once. Otherwise the selection continues without the hook, and reports
    the error at the end."""

    def on_start(self, run: Run) -> None:
        """Handle the start, when data and base are loaded and nothing is written yet. An `InputError` refuses the selection.

        `run.selection`, `run.folder` and `run.records` describe the run; hooks read them. `run.on_event` passes an event to all hooks, and to
        the journal if it is a record.
        """

    def on_end(self, selected: Selected) -> None:
        """Handle the end, when the adapter is exported and the decision is in the journal."""


class Hooks(Hook):
    """Several hooks that act as one."""

    def __init__(self, hooks: Sequence[Hook] = ()) -> None:
        self._hooks = list(hooks)
        self._faults: dict[Hook, HookError] = {}

    def on_start(self, run: Run) -> None:
        self._call_each(lambda hook: hook.on_start(run))

    def on_event(self, event: Event) -> None:
        self._call_each(lambda hook: hook.on_event(event))

    def should_stop(self) -> bool:
        requests: list[bool] = []
        self._call_each(lambda hook: requests.append(hook.should_stop()))
        return any(requests)

    def on_end(self, selected: Selected) -> None:
        """Notify every hook.

        Raises:
            HookError: a hook that is not required had failed earlier.
        """
        self._call_each(lambda hook: hook.on_end(selected))
        for fault in self._faults.values():
            raise fault

    def _call_each(self, call: Callable[[Hook], object]) -> None:
        for hook in self._hooks:
            if hook in self._faults:
                continue
            try:
                with _HookErrorWrapper(type(hook).__name__):
                    call(hook)
            except HookError as fault:
                if hook.is_required:
                    raise
                self._faults[hook] = fault


@dataclass(frozen=True, eq=False)
class Run(Listener):
    """A run: the prepared selection, its folder, and the records so far. Events are journaled here and passed to the hooks."""

    selection: PreparedSelection
    folder: RunFolder
    hooks: Hooks
    records: Records
    # The first record, or the settings with which the run continues; None if they are unchanged.
    start_record: RunStarted | RunContinued | None

    def on_event(self, event: Event) -> None:
        """Journal the event if it is a record, and pass it to the hooks."""
        if isinstance(event, AnyJournalRecord):
            self.folder.journal.append(event)
            self.records.add(event)
        self.hooks.on_event(event)

    def should_stop(self) -> bool:
        return self.hooks.should_stop()


class HookError(RunError):
    """A hook failed."""


class _HookErrorWrapper(AbstractContextManager[None]):
    """Reports an error of a hook in one line that names it. Errors that already have such a line pass unchanged."""

    # Not a `contextmanager` function, which would not let a RunError be raised from a StopIteration.

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _at: TracebackType | None
    ) -> None:
        if not isinstance(error, Exception) or isinstance(error, RightrankError | OSError):
            return
        log_traceback(error)
        advice = "finished trials are kept, and the same call resumes"
        raise HookError(f"{self._name} failed ({describe_error(error)}); {advice}") from error
