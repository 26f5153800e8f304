"""The errors that `rightrank` raises, and what each means at the command line.

    RightrankError                  any of ours; the message is one line for a person
    ├── InputError(ValueError)      exit 2: bad usage or bad input, nothing was started
    │   ├── SettingsError           a setting, an option or a config file
    │   ├── DataError               a data file or its rows
    │   ├── ModelError              a model folder, its modules or its tokenizer
    │   ├── ResultsError            a table of finished runs
    │   ├── RunFolderError          a run folder: made with other settings, locked, damaged
    │   └── MissingExtraError       an optional dependency that is not installed
    ├── RunError(RuntimeError)      exit 1: it began and could not finish
    │   ├── DeviceMemoryError       out of memory, with the arm that asked
    │   ├── MetricError             a function, program or task that scores gave no score
    │   ├── MultiLoraError            arms that can't be trained in one pass; they are then trained alone
    │   └── AllTrialsFailedError    not one trial ended with a result
    └── InterruptedRun              exit 130: stopped by the user, can be resumed
        └── TerminatedRun           exit 143: stopped by SIGTERM, as before a machine is taken away

Every message says what was got, what is allowed, and what to do. All survive pickling:
they carry one string and nothing else. A message is one line of at most 1,500 visible characters.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = [
    "AllTrialsFailedError",
    "DataError",
    "DeviceMemoryError",
    "InputError",
    "InterruptedRun",
    "MetricError",
    "MissingExtraError",
    "ModelError",
    "MultiLoraError",
    "ResultsError",
    "RightrankError",
    "RunError",
    "RunFolderError",
    "SettingsError",
    "TerminatedRun",
    "did_you_mean",
]


MAX_MESSAGE_CHARACTERS = 1500  # characters; what is longer quotes something that nobody reads to its end
# Control characters, marks that turn or hide text, halves of characters: written out, as Python writes them.
_INVISIBLE = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 161))} | {
    code: f"\\u{code:04x}"
    for code in (*range(0x200B, 0x2010), *range(0x2028, 0x2030), *range(0x2060, 0x2070), *range(0xD800, 0xE000), 0xFEFF)
}


class RightrankError(Exception):
    """Base of every error raised on purpose by this package. Its message is one line, whatever it quotes."""

    exit_status: int = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(one_line(message))


class InputError(RightrankError, ValueError):
    """Bad usage or bad input; nothing was started."""

    exit_status = 2


class SettingsError(InputError):
    """A setting, an option or a config file that can't be used."""


class DataError(InputError):
    """A data file that can't be read or rows that can't be used."""


class ModelError(InputError):
    """A model folder, its modules or its tokenizer."""


class ResultsError(InputError):
    """A table of finished runs that can't be used."""


class RunFolderError(InputError):
    """A run folder made with other settings, in use, or damaged."""


class MissingExtraError(InputError, ImportError):
    """An optional dependency that is not installed; the message names the extra."""


class RunError(RightrankError, RuntimeError):
    """It began and could not finish."""


class DeviceMemoryError(RunError):
    """The device ran out of memory in a trial."""


class MetricError(RunError):
    """A function, program or task that scores failed, took too long, or gave something else than scores."""


class MultiLoraError(RunError):
    """Arms that can't be trained in one pass over this model; they are then trained alone."""


class AllTrialsFailedError(RunError):
    """Not one trial ended with a result."""


class InterruptedRun(RightrankError):  # noqa: N818 - not a fault: the user asked for it
    """Stopped by the user; what was finished is kept and the run can be resumed."""

    exit_status = 130


class TerminatedRun(InterruptedRun):
    """Stopped by SIGTERM: pre-empted; what was finished is kept and the run can be resumed."""

    exit_status = 143


def one_line(message: str) -> str:
    """The message with white space as single blanks, control characters written out, and its middle left out where it
    is too long: what a file holds can't move the reader's cursor or fill the screen."""
    text = " ".join(message.split()).translate(_INVISIBLE)
    if len(text) <= MAX_MESSAGE_CHARACTERS:
        return text
    return f"{text[: MAX_MESSAGE_CHARACTERS - 500]} … {text[-400:]}"


def first_line(error: BaseException) -> str:
    """The first non-empty line of an error's message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


# What allocators say when they have no more. torch says it in a plain RuntimeError, the system in an OSError.
_OUT_OF_MEMORY = (
    "out of memory", "can't allocate memory", "not enough memory", "bad_alloc", "Cannot allocate memory",
    "can't start new thread",
)  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the process had no more memory; torch's own error is known by its name, without torch."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or any(sign in str(error) for sign in _OUT_OF_MEMORY)


def did_you_mean(got: str, allowed: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest allowed name, or an empty string."""
    near = get_close_matches(got, list(allowed), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""
