"""Scores that somebody else's code computes: a Python function, a metric of `evaluate`, a program.

All run in a process of their own, with a time limit, and read the answers from a JSONL file: what was trained is safe
from them. No text of the data reaches a command line, and no shell is between.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rightrank.errors import MetricError, SettingsError
from rightrank.io.files import replacing
from rightrank.settings import MetricSpec

WORKER = "rightrank.io.score_worker"
LOOK_SECONDS = 0.05  # between looks at a process that runs
MAX_OUTPUT_BYTES = 16 * 2**20  # bytes; scores of a million items
PLACE = "{file}"  # in a command: where the path of the answers goes; at the end where it is missing


@dataclass(frozen=True, slots=True)
class ModelAnswer:
    """What the model wrote for one held-out item; of a classification, the class it named."""

    item_id: str
    prompt: str
    completion: str
    expected: str


@dataclass(frozen=True, slots=True)
class Scored:
    """A metric's number and, where it is their mean, the scores of the items."""

    value: float
    items: list[float] | None

    @classmethod
    def of_items(cls, items: Sequence[float]) -> Scored:
        return cls(sum(items) / len(items), list(items))


@dataclass(frozen=True, slots=True)
class ScorerLimits:
    """What a scorer may."""

    timeout_seconds: float
    trust_remote_code: bool = False


def write_answers(answers: Iterable[ModelAnswer], path: Path) -> None:
    """One JSON object a line: item_id, prompt, completion, expected."""
    with replacing(path) as temporary:
        lines = (json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers)
        temporary.write_text("".join(lines), encoding="utf-8")


def require_scorer(spec: MetricSpec, limits: ScorerLimits) -> None:
    """Find out before anything is trained whether there is such a function, metric or program.

    Raises:
        SettingsError: there is none, or it would run code from the hub that nobody asked for.
    """
    if spec.kind == "command":
        program = _words(spec)[0]
        if shutil.which(program) is None:
            raise SettingsError(f"metric {spec.name!r}: no program {program!r} that can be run; give its path")
    elif spec.kind in ("function", "evaluate"):
        if spec.kind == "evaluate" and not Path(spec.target).exists() and not limits.trust_remote_code:
            raise SettingsError(
                f"metric {spec.name!r}: {spec.target!r} is no local file or folder, and one of the hub runs code that comes from "
                "there; give a local metric, or trust_remote_code"
            )
        try:
            _ask_worker(spec, None, limits)
        except MetricError as error:
            raise SettingsError(str(error)) from None


def score(spec: MetricSpec, path: Path, items: int, limits: ScorerLimits) -> Scored:
    """Score the answers in a file of so many.

    Raises:
        MetricError: it failed, took too long, or gave something else than scores.
    """
    if spec.kind == "command":
        words = _words(spec)
        placed = [word.replace(PLACE, str(path)) for word in words]
        printed = _run(spec, placed if placed != words else [*placed, str(path)], path, limits)
        found: object = _understood(spec, printed, items)
    else:
        found = _ask_worker(spec, path, limits)
    if isinstance(found, list):
        return Scored.of_items(_numbers(spec, found, items))
    return Scored(_numbers(spec, [found], 1)[0], None)


def _ask_worker(spec: MetricSpec, path: Path | None, limits: ScorerLimits) -> object:
    """What the function or metric gave; without answers, None where it is there."""
    with tempfile.TemporaryDirectory(prefix="rightrank-") as folder:
        out = Path(folder) / "scores.json"
        task = {
            "kind": spec.kind,
            "target": spec.target,
            "key": spec.key,
            "answers": None if path is None else str(path.resolve()),
            "out": str(out),
        }
        _run(spec, [sys.executable, "-m", WORKER, json.dumps(task)], path, limits)
        try:
            told = json.loads(out.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            raise MetricError(f"metric {spec.name!r}: its process ended without an answer") from None
    if "error" in told:
        raise MetricError(f"metric {spec.name!r}: {told['error']}")
    found: object = told["scores"]
    return found


def _words(spec: MetricSpec) -> list[str]:
    try:
        words = shlex.split(spec.target)
    except ValueError as error:
        raise SettingsError(f"metric {spec.name!r}: {spec.target!r} can't be read as a command ({error})") from None
    if not words:
        raise SettingsError(f"metric {spec.name!r}: an empty command; give NAME=command:PROGRAM")
    return words


def _run(spec: MetricSpec, words: Sequence[str], path: Path | None, limits: ScorerLimits) -> str:
    """What the program printed.

    Raises:
        MetricError: it could not be started, ended with another status than 0, took too long or printed too much.
    """
    environment = os.environ | {"RIGHTRANK_ANSWERS": "" if path is None else str(path)}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            process = subprocess.Popen(
                list(words), stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment, start_new_session=True
            )
        except OSError as error:
            raise MetricError(f"metric {spec.name!r}: can't run {words[0]!r} ({error.strerror or error})") from None
        try:
            _wait(process, spec, limits.timeout_seconds, out.fileno())
        finally:
            if process.poll() is None:
                _end(process)
        out.seek(0)
        err.seek(0)
        printed = out.read().decode("utf-8", errors="replace")
        complaints = err.read().decode("utf-8", errors="replace").strip().splitlines()
    if process.returncode != 0:
        said = f": {_short(complaints[-1])}" if complaints else ""
        raise MetricError(f"metric {spec.name!r}: {_short(words[0])} ended with status {process.returncode}{said}")
    return printed


def _wait(process: subprocess.Popen[bytes], spec: MetricSpec, seconds: float, output: int) -> None:
    end = time.monotonic() + seconds
    while True:
        has_ended = process.poll() is not None  # asked first: a quick one prints much and ends between two looks
        if os.fstat(output).st_size > MAX_OUTPUT_BYTES:
            raise MetricError(f"metric {spec.name!r}: it printed more than {MAX_OUTPUT_BYTES >> 20} MiB and was ended")
        if has_ended:
            return
        if time.monotonic() > end:
            raise MetricError(
                f"metric {spec.name!r}: it took longer than {seconds:g} s and was ended; give metric_timeout_seconds if it needs more"
            )
        time.sleep(LOOK_SECONDS)


def _end(process: subprocess.Popen[bytes]) -> None:
    """The program and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
    process.wait()


def _understood(spec: MetricSpec, printed: str, items: int) -> object:
    """One number, as many numbers as items, or JSON of either (alone or under `score` or `scores`)."""
    try:
        value = json.loads(printed)
    except (json.JSONDecodeError, RecursionError):
        value = [_number(word) for word in re.split(r"[\s,]+", printed.strip())]
        if not value or None in value or len(value) not in (1, items):
            raise MetricError(
                f"metric {spec.name!r}: it printed {_short(printed)!r}; one number, or {items} (one an item), are expected"
            ) from None
        return value[0] if len(value) == 1 else value
    if isinstance(value, dict):
        value = value.get("scores", value.get("score"))
    return value


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _numbers(spec: MetricSpec, values: Sequence[object], items: int) -> list[float]:
    if len(values) != items:
        raise MetricError(
            f"metric {spec.name!r}: it gave {len(values)} scores for {items} items; one an item is expected"
        )
    for value in values:
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise MetricError(f"metric {spec.name!r}: it gave {_short(repr(value))}; finite numbers are expected")
    return [float(value) for value in values if isinstance(value, int | float)]


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 160 else f"{line[:157]}…"
