"""No view ends a run: what keeps one from being written is kept, and the run ends with it once all else is done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import TemplateError

from rightrank.schema.errors import RunError, first_line

# What code that computes a page, a figure or a sentence from plain records raises where it has a fault. A full disk, an
# interruption and the end of the memory are no fault of a view.
VIEW_FAULTS = (
    ArithmeticError, AssertionError, AttributeError, LookupError, NameError, RuntimeError, StopIteration, TemplateError,
    TypeError, ValueError,
)  # fmt: skip


@dataclass(slots=True)
class ViewFaults:
    """The views of a run that could not be made the last time, each with its error.

    Example::

        faults = ViewFaults()
        with faults.kept("the report"):
            write_report(folder)  # an error ends this block alone
        faults.require_none(out)
    """

    found: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def kept(self, view: str, *, but: tuple[type[Exception], ...] = ()) -> Iterator[None]:
        """Keep a fault of the block under the name `view`; a block without one clears that of an earlier try.

        Errors of the types `but` pass.
        """
        try:
            yield
        except but:
            raise
        except VIEW_FAULTS as error:
            self.found[view] = described(error)
        else:
            self.found.pop(view, None)

    def require_none(self, out: Path) -> None:
        """Called last, with the adapter in place and the journal complete.

        Raises:
            RunError: a view could not be made; the message names it and its error.
        """
        if not self.found:
            return
        failed = "; ".join(f"{view} failed ({text})" for view, text in self.found.items())
        raise RunError(
            f"{failed}: a fault of rightrank, please report it. The run is complete: {out / 'journal.jsonl'} holds its results, "
            f"and {out / 'adapter'} the adapter if one was saved"
        )


def described(error: BaseException) -> str:
    """`KeyError: 'x'`, or the type alone where the error has no message."""
    kind, text = type(error).__name__, first_line(error)
    return kind if text == kind else f"{kind}: {text}"
