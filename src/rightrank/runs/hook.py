"""The door for whatever watches a selection or takes part in it; the core knows no hook by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rightrank.schema.errors import RightrankError, RunError, first_line
from rightrank.schema.events import Event, Listener, Notice

if TYPE_CHECKING:
    from rightrank.runs.prepare import Prepared
    from rightrank.runs.returns import Selected


class Hook(Listener):
    """Something that watches a selection or takes part in it. A base class: every method does nothing.

    All methods run on the thread that calls `select_rank`, in the order of `callbacks`. A hook that raises ends the selection with
    one line that names it; what has finished is kept, and the same call resumes.

    Example::

        class Deadline(Hook):
            def should_stop(self) -> bool:
                return time.time() > END

        select_rank(model, data, "run", callbacks=[Deadline()])
    """

    @property
    def name(self) -> str:
        """What an error of this hook is reported under."""
        return type(self).__name__

    def on_prepared(self, prepared: Prepared) -> None:
        """Called once, with data and base loaded and nothing trained."""

    def on_end(self, selected: Selected) -> None:
        """Called last, with the adapter in place."""


class Hooks(Hook):
    """Several hooks as one."""

    def __init__(self, hooks: Sequence[Hook] = ()) -> None:
        self._hooks = list(hooks)

    def notice(self, text: str) -> None:
        """Send a line for a person."""
        self.on_event(Notice(text=text))

    def on_prepared(self, prepared: Prepared) -> None:
        for hook in self._hooks:
            with failing_as(hook.name):
                hook.on_prepared(prepared)

    def on_event(self, event: Event) -> None:
        for hook in self._hooks:
            with failing_as(hook.name):
                hook.on_event(event)

    def on_end(self, selected: Selected) -> None:
        for hook in self._hooks:
            with failing_as(hook.name):
                hook.on_end(selected)

    def should_stop(self) -> bool:
        for hook in self._hooks:
            with failing_as(hook.name):
                if hook.should_stop():
                    return True
        return False


@contextmanager
def failing_as(name: str) -> Iterator[None]:
    """Report a fault of the block in one line that names it. Errors that are reported in one line already pass.

    Raises:
        RunError: the block raised another exception.
    """
    try:
        yield
    except (RightrankError, OSError):
        raise
    except Exception as error:
        raise RunError(
            f"{name} failed ({described(error)}); what has finished is kept, and the same call resumes"
        ) from error


def described(error: BaseException) -> str:
    """`KeyError: 'x'`, or the type alone where the error has no message."""
    kind, text = type(error).__name__, first_line(error)
    return kind if text == kind else f"{kind}: {text}"
