"""The errors that `rightrank` raises, and the exit status of each at the command line.

Every message states what was given, what is allowed, and what to do, in one line of at most 1,500 visible characters.
All errors can be pickled: they carry one string and nothing else.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from difflib import get_close_matches

MAX_EXACT_INTEGER = 2**53  # Floats represent integers up to this exactly; a larger one in a file is damage.
MAX_MESSAGE_CHARACTERS = 1500  # The middle of a longer message is removed.
# Control characters, bidirectional and invisible marks, and surrogates are replaced by their escapes.
_INVISIBLE = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 161))} | {
    code: f"\\u{code:04x}"
    for code in (*range(0x200B, 0x2010), *range(0x2028, 0x2030), *range(0x2060, 0x2070), *range(0xD800, 0xE000), 0xFEFF)
}


class RightrankError(Exception):
    """Base class of the errors of this package. The message is always one line."""

    exit_status: int = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(format_one_line(message))


class InputError(RightrankError, ValueError):
    """Bad usage or bad input. Nothing was started."""

    exit_status = 2


class SettingsError(InputError):
    """A setting, an option or a config file that can't be used."""


class DataError(InputError):
    """A data file that can't be read or rows that can't be used."""


class ModelError(InputError):
    """A model folder, its modules or its tokenizer that can't be used."""


class ResultsError(InputError):
    """A table of finished runs that can't be used."""


class RunFolderError(InputError):
    """A run folder that was made with other settings, is in use, or is damaged."""


class MissingExtraError(InputError, ImportError):
    """An optional dependency that is not installed; the message names the extra."""


class RunError(RightrankError, RuntimeError):
    """The command started and could not finish."""


class DeviceMemoryError(RunError):
    """The device ran out of memory in a trial."""


class MetricError(RunError):
    """A function, program or task for a metric failed, took too long, or did not return scores."""


class NotFiniteError(RunError):
    """A held-out value that a custom trainer reported is NaN or infinite: the trial has diverged."""


class ReportError(RunError, ValueError):
    """A value from a custom trainer or a reward function that is not a number, or a wrong number of values."""


class MultiLoraError(RunError):
    """Arms that can't share a pass over this model. They are then trained one after the other."""


class AllTrialsFailedError(RunError):
    """No trial ended with a result, or too few to compare two ranks."""


class InterruptedRun(RightrankError):  # noqa: N818 - not a fault: the user requested it
    """Stopped by the user. Finished trials are kept, and the run can be resumed."""

    exit_status = 130


class TerminatedRun(InterruptedRun):
    """Stopped by SIGTERM. Finished trials are kept, and the run can be resumed."""

    exit_status = 143


def format_one_line(message: str) -> str:
    """Return the message on one line, with control characters escaped, secrets redacted and the middle of a long text removed.

    Text quoted from a file then can't move the cursor or fill the screen.
    """
    text = redact_secrets(" ".join(message.split())).translate(_INVISIBLE)
    if len(text) <= MAX_MESSAGE_CHARACTERS:
        return text
    return f"{text[: MAX_MESSAGE_CHARACTERS - 500]} … {text[-400:]}"


# A secret is recognized by its position in an address, the name before it, or a well-known prefix.
_SECRET_PATTERN = re.compile(
    r"(:/+)[^\s/@:]*:[^\s/@]+(?=@)"
    r"|([?&][\w.-]*(?:token|key|secret|password|signature)=)[^\s&'\"]+"
    r"|((?:password|secret|api[-_]?key|(?:access|auth)[-_]?(?:key|token))(?:[\"']\s*[=:]\s*[\"']|[=:]))[^\s'\",}]+"
    r"|(--[\w-]*(?:password|secret|key|token)\s)\S+"
    r"|(\bbearer\s+)[^\s'\"]+"
    r"|(\b(?:hf_|sk-|ghp_|glpat-|AKIA))[A-Za-z0-9]{16,}",
    re.IGNORECASE,
)


def redact_secrets(text: str) -> str:
    """Replace passwords, keys and tokens in the text by `…`."""
    return _SECRET_PATTERN.sub(lambda secret: f"{next(filter(None, secret.groups()))}…", text)


def get_first_line(error: BaseException) -> str:
    """Return the first non-empty line of an error's message, with secrets redacted."""
    lines = (redact_secrets(line.strip()) for line in str(error).splitlines() if line.strip())
    return next(lines, type(error).__name__)


def describe_error(error: BaseException) -> str:
    """Return a text such as `KeyError: 'x'`, or the type alone if the error has no message."""
    kind, text = type(error).__name__, get_first_line(error)
    return kind if text == kind else f"{kind}: {text}"


def log_traceback(error: BaseException) -> None:
    """Log the traceback of an error that is reported in one line, at debug level."""
    logging.getLogger("rightrank").debug("rightrank: %s", describe_error(error), exc_info=error)


def quote_value(value: object, limit: int = 60) -> str:
    """Return the value as Python writes it, cut off at `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


# Texts of allocation errors: torch raises a plain RuntimeError, the system an OSError.
_OUT_OF_MEMORY = (
    "out of memory", "can't allocate memory", "not enough memory", "bad_alloc", "Cannot allocate memory",
    "can't start new thread",
)  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the device or the process ran out of memory.

    The error of torch is recognized by its name, so that torch need not be imported.
    """
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or any(sign in str(error) for sign in _OUT_OF_MEMORY)


def suggest_name(got: str, allowed: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the nearest allowed name, or an empty string."""
    near = get_close_matches(got, list(allowed), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""
