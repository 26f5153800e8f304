"""Hooks: what watches a selection or takes part in it. The core knows none by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from rightrank.schema.errors import RightrankError, RunError, described
from rightrank.schema.events import Event, Journaled, JournalRecord, Listener, RunContinued, RunStarted

if TYPE_CHECKING:
    from rightrank.decision.records import Records
    from rightrank.runs.executor import Plan
    from rightrank.runs.folder import RunFolder
    from rightrank.runs.values import Selected
    from rightrank.schema.decision import AdapterAnswer


@dataclass(frozen=True, slots=True)
class Started:
    """Data and base are loaded, and nothing is written yet."""

    plan: Plan
    folder: RunFolder
    records: Callable[[], Records]  # what the journal says by now: a copy
    # What the hook has to say: to the other hooks, and to the journal if it is a record of it.
    tell: Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class Answered:
    """An adapter is about to be handed over."""

    answer: AdapterAnswer
    records: Records  # a copy


@dataclass(frozen=True, slots=True)
class Finished:
    """The adapter is in place, and the decision in the journal."""

    selected: Selected
    folder: RunFolder
    records: Records  # a copy


class Hook(Listener):
    """Something that watches a selection or takes part in it. A base class: every method does nothing.

    All methods run on the thread that calls `select_rank`, one hook after the other in the order of `callbacks`. A hook that
    raises ends the selection with one line that names it; what has finished is kept, and the same call resumes.

    Example::

        class Deadline(Hook):
            def should_stop(self) -> bool:
                return time.time() > END

        select_rank(model, data, "run", callbacks=[Deadline()])
    """

    ends_run = True
    """Whether a fault ends the selection at once. Else it continues without the hook, and ends with the line once all else is done."""

    def on_start(self, started: Started) -> None:
        """Called first; an `InputError` refuses the selection. Called again where a selection is extended."""

    def on_adapter(self, answered: Answered) -> AdapterAnswer | None:
        """Called before an adapter is handed over. May return another answer in its place."""

    def on_end(self, finished: Finished) -> None:
        """Called last."""


class Hooks(Hook):
    """Several hooks as one."""

    def __init__(self, hooks: Sequence[Hook] = ()) -> None:
        self._hooks = list(hooks)
        self._faults: dict[Hook, HookError] = {}

    def on_start(self, started: Started) -> None:
        self._each(lambda hook: hook.on_start(started))

    def on_event(self, event: Event) -> None:
        self._each(lambda hook: hook.on_event(event))

    def should_stop(self) -> bool:
        asked: list[bool] = []
        self._each(lambda hook: asked.append(hook.should_stop()))
        return any(asked)

    def agreed(self, answer: AdapterAnswer, records: Callable[[], Records]) -> AdapterAnswer:
        """The answer after each hook in turn had the chance to return another one."""
        answers = [answer]
        self._each(lambda hook: answers.append(hook.on_adapter(Answered(answers[-1], records())) or answers[-1]))
        return answers[-1]

    def on_end(self, finished: Finished) -> None:
        """Tell every hook.

        Raises:
            HookError: a hook that does not end a run by itself had a fault.
        """
        self._each(lambda hook: hook.on_end(finished))
        for fault in self._faults.values():
            raise fault

    def _each(self, call: Callable[[Hook], object]) -> None:
        for hook in self._hooks:
            if hook in self._faults:
                continue
            try:
                with FailingAs(type(hook).__name__):
                    call(hook)
            except HookError as fault:
                if hook.ends_run:
                    raise
                self._faults[hook] = fault


@dataclass(frozen=True, eq=False)
class Run(Listener):
    """What is to be done, where, and what the journal says by now. What happens is kept there, and passed to the hooks."""

    plan: Plan
    folder: RunFolder
    hooks: Hooks
    records: Records
    # Its first record, or other settings with which it continues; None: as it was.
    opening: RunStarted | RunContinued | None

    def on_event(self, event: Event) -> None:
        """Keep the event in the journal, if it is a record, and pass it on to the hooks."""
        if isinstance(event, Journaled):
            self.record(event)
        self.hooks.on_event(event)

    def record(self, record: JournalRecord) -> None:
        """Keep a record in the journal."""
        self.folder.journal.append(record)
        self.records.keep(record)

    def should_stop(self) -> bool:
        return self.hooks.should_stop()


class HookError(RunError):
    """A hook, or another part without which a run is complete, has a fault."""


class FailingAs:  # no `contextmanager`, which lets a StopIteration pass that a RunError is raised from
    """A block whose fault is reported in one line that names it. Errors that are reported in one line already pass.

    Raises:
        HookError: the block raised another exception.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _at: TracebackType | None
    ) -> None:
        if not isinstance(error, Exception) or isinstance(error, RightrankError | OSError):
            return
        kept = "what has finished is kept, and the same call resumes"
        raise HookError(f"{self._name} failed ({described(error)}); {kept}") from error
