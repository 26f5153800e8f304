"""Scores from external code: a Python function, a metric of `evaluate`, or a program.

Each runs in its own process with a time limit and reads the answers from a JSONL file, so that it can't affect the
training. Texts of the data never reach a command line, and no shell is used.
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

from rightrank.data.files import replacing
from rightrank.schema.errors import MetricError, RunError, SettingsError
from rightrank.schema.metrics import MetricSpec

WORKER = "rightrank.train.score_worker"
POLL_SECONDS = 0.05
MAX_OUTPUT_BYTES = 16 * 2**20  # about a million scores
PLACEHOLDER = "{file}"  # of the answers' path in a command; without it the path is appended


@dataclass(frozen=True, slots=True)
class ModelAnswer:
    """The model's answer to one held-out example; for classification, the predicted class."""

    item_id: str
    prompt: str
    completion: str
    expected: str


@dataclass(frozen=True, slots=True)
class Scored:
    """A metric's value, and scores of the examples whose mean it is: their own, or their shares (`scores.shares`)."""

    value: float
    examples: list[float] | None

    @classmethod
    def of_examples(cls, scores: Sequence[float]) -> Scored:
        return cls(sum(scores) / len(scores), list(scores))


@dataclass(frozen=True, slots=True)
class ScorerLimits:
    timeout_seconds: float
    trust_remote_code: bool = False


def write_answers(answers: Iterable[ModelAnswer], path: Path) -> None:
    """Write one JSON object per line: item_id, prompt, completion, expected."""
    with replacing(path) as temporary:
        lines = (json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers)
        temporary.write_text("".join(lines), encoding="utf-8")


def require_scorer(spec: MetricSpec, limits: ScorerLimits) -> None:
    """Check before training that the function, metric or program exists.

    Raises:
        SettingsError: it does not exist, or it would run code from the hub without `trust_remote_code`.
    """
    if spec.kind == "command":
        program = _command(spec)[0]
        if shutil.which(program) is None:
            raise SettingsError(f"metric {spec.name!r}: no program {program!r} on the PATH; give its path")
    elif spec.kind in ("function", "evaluate"):
        if spec.kind == "evaluate" and not Path(spec.target).exists() and not limits.trust_remote_code:
            raise SettingsError(
                f"metric {spec.name!r}: {spec.target!r} is not a local file or folder, and a metric from the hub runs code from "
                "there; give a local metric, or trust_remote_code"
            )
        try:
            _ask_worker(spec, None, limits)
        except MetricError as error:
            raise SettingsError(str(error)) from None


def score(spec: MetricSpec, path: Path, count: int, limits: ScorerLimits) -> Scored:
    """Score the `count` answers in a file.

    Raises:
        MetricError: the scorer failed, took too long, or returned something other than scores.
    """
    if spec.kind == "command":
        printed = _run(spec, command_on(_command(spec), path), path, limits)
        found: object = _parse_scores(spec, printed, count)
    else:
        found = _ask_worker(spec, path, limits)
    if isinstance(found, list):
        return Scored.of_examples(_numbers(spec, found, count))
    return Scored(_numbers(spec, [found], 1)[0], None)


def _ask_worker(spec: MetricSpec, path: Path | None, limits: ScorerLimits) -> object:
    """The result of the function or metric; None without answers, which only checks that it exists."""
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
            result = json.loads(out.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            raise MetricError(f"metric {spec.name!r}: its process ended without a result") from None
    if "error" in result:
        raise MetricError(f"metric {spec.name!r}: {result['error']}")
    found: object = result["scores"]
    return found


def _command(spec: MetricSpec) -> list[str]:
    try:
        command = shlex.split(spec.target)
    except ValueError as error:
        raise SettingsError(f"metric {spec.name!r}: {spec.target!r} can't be read as a command ({error})") from None
    if not command:
        raise SettingsError(f"metric {spec.name!r}: an empty command; give NAME=command:PROGRAM")
    return command


def command_on(words: list[str], file: Path) -> list[str]:
    """A command with the file's path in place of `PLACEHOLDER`, or at its end."""
    placed = [word.replace(PLACEHOLDER, str(file)) for word in words]
    return placed if placed != words else [*placed, str(file)]


def _run(spec: MetricSpec, command: Sequence[str], path: Path | None, limits: ScorerLimits) -> str:
    """Run a program and return what it printed."""
    environment = os.environ | {"RIGHTRANK_ANSWERS": "" if path is None else str(path)}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            process = subprocess.Popen(
                list(command), stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment, start_new_session=True
            )
        except OSError as error:
            raise MetricError(f"metric {spec.name!r}: can't run {command[0]!r} ({error.strerror or error})") from None
        try:
            _wait(process, spec, limits.timeout_seconds, out.fileno())
        finally:
            if process.poll() is None:
                _kill(process)
        out.seek(0)
        err.seek(0)
        printed = out.read().decode("utf-8", errors="replace")
        error_lines = err.read().decode("utf-8", errors="replace").strip().splitlines()
    if process.returncode != 0:
        detail = f": {_short(error_lines[-1])}" if error_lines else ""
        raise MetricError(f"metric {spec.name!r}: {_short(command[0])} ended with status {process.returncode}{detail}")
    return printed


def run_program(command: Sequence[str], timeout_seconds: float) -> str:
    """Run a judge's program and return what it printed.

    Raises:
        RunError: it could not be started, ended with a status other than 0, took too long or printed too much.
    """
    try:
        return _run(MetricSpec("judge", "command"), command, None, ScorerLimits(timeout_seconds))
    except MetricError as error:
        raise RunError(str(error).replace("metric 'judge'", "the judge's program")) from None


def _wait(process: subprocess.Popen[bytes], spec: MetricSpec, seconds: float, output: int) -> None:
    end = time.monotonic() + seconds
    while True:
        # checked first: a fast process may print much and end between two checks
        has_ended = process.poll() is not None
        if os.fstat(output).st_size > MAX_OUTPUT_BYTES:
            raise MetricError(f"metric {spec.name!r}: it printed more than {MAX_OUTPUT_BYTES >> 20} MiB and was killed")
        if has_ended:
            return
        if time.monotonic() > end:
            raise MetricError(f"metric {spec.name!r}: it took longer than {seconds:g} s and was killed")
        time.sleep(POLL_SECONDS)


def _kill(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
    process.wait()


def _parse_scores(spec: MetricSpec, printed: str, count: int) -> object:
    """One number, one number per example, or JSON of either (bare, or under `score` or `scores`)."""
    try:
        value = json.loads(printed)
    except (json.JSONDecodeError, RecursionError):
        value = [_number(word) for word in re.split(r"[\s,]+", printed.strip())]
        if not value or None in value or len(value) not in (1, count):
            raise MetricError(
                f"metric {spec.name!r}: it printed {_short(printed)!r}; one number, or {count} (one per example), are expected"
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


def _numbers(spec: MetricSpec, values: Sequence[object], count: int) -> list[float]:
    if len(values) != count:
        raise MetricError(
            f"metric {spec.name!r}: it returned {len(values)} scores for {count} examples; one per example is expected"
        )
    for value in values:
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise MetricError(f"metric {spec.name!r}: it returned {_short(repr(value))}; finite numbers are expected")
    return [float(value) for value in values if isinstance(value, int | float)]


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 160 else f"{line[:157]}…"
