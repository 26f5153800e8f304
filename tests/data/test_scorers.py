"""Programs and functions that score: what they are given, what they may print, and what becomes of bad ones."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

from rightrank.schema.errors import MetricError, SettingsError
from rightrank.schema.metrics import parse_metric
from rightrank.train.scorers import ModelAnswer, Scored, ScorerLimits, require_scorer, score, write_answers
from tests.watch import GENEROUS_SECONDS, clock_that_jumps, wait_until

pytestmark = pytest.mark.trains

NASTY = ["$(touch owned)", "`touch owned`", "; touch owned", "a\nb\u2028c", "'\"\\", "", "{file}", "-n"]
ANSWERS = [ModelAnswer(str(n), text, text, "expected") for n, text in enumerate(NASTY)]
COUNT = len(ANSWERS)
LIMITS = ScorerLimits(timeout_seconds=GENEROUS_SECONDS)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    found = tmp_path / "it's here; touch owned" / "answers.jsonl"
    write_answers(ANSWERS, found)
    return found


def program(code: str, more: str = "{file}") -> str:
    return f"x=command:{shlex.quote(sys.executable)} -c {shlex.quote(code)} {more}"


def test_texts_and_paths_reach_no_shell(path: Path) -> None:
    code = "import json,sys; print(json.dumps([len(json.loads(l)['completion']) for l in open(sys.argv[1], newline='\\n')]))"
    lengths = [float(len(text)) for text in NASTY]
    for more in ("{file}", ""):
        assert score(parse_metric(program(code, more)), path, COUNT, LIMITS) == Scored.of_examples(lengths)
    by_shell = "x=command:sh -c 'wc -l < \"$RIGHTRANK_ANSWERS\"'"
    assert score(parse_metric(by_shell), path, COUNT, LIMITS) == Scored(float(COUNT), None)
    assert not (path.parent.parent / "owned").exists()


@pytest.mark.parametrize(
    ("printed", "scored"),
    [
        ("0.25", Scored(0.25, None)),
        ('{"score": 0.5}', Scored(0.5, None)),
        (json.dumps({"scores": [1, 0] * 4}), Scored.of_examples([1.0, 0.0] * 4)),
        ("\n".join(["1", "0"] * 4), Scored.of_examples([1.0, 0.0] * 4)),
    ],
)
def test_what_it_may_print(printed: str, scored: Scored, path: Path) -> None:
    assert score(parse_metric(program(f"print({printed!r})")), path, COUNT, LIMITS) == scored


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("print('fine, thanks')", "it printed 'fine, thanks'"),
        ("print('1 2 3')", "one number, or 8"),
        ("print([1, 2])", "2 scores for 8 examples"),
        ("print('nan')", "finite numbers"),
        ("print(['a'] * 8)", "it printed"),
        ("print('{\"loss\": 1}')", "it returned None"),
        ("pass", "it printed ''"),
        ("raise SystemExit('no licence')", "ended with status 1: no licence"),
        ("import os; os.kill(os.getpid(), 9)", "ended with status -9"),
        ("print('1 ' * 20_000_000)", "more than 16 MiB"),
    ],
)
def test_a_bad_program_is_one_line(code: str, said: str, path: Path) -> None:
    with pytest.raises(MetricError) as caught:
        score(parse_metric(program(code)), path, COUNT, LIMITS)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def until_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is reached as soon as the file `started` is there."""
    monkeypatch.setattr("rightrank.train.scorers.time.monotonic", clock_that_jumps(Path("started").exists))


def test_a_program_that_hangs_is_ended_with_all_that_it_started(path: Path, until_started: None) -> None:
    code = (
        "import os, pathlib, subprocess, time; inner = subprocess.Popen(['sleep', '600']); "
        "pathlib.Path('pid').write_text(str(inner.pid)); os.rename('pid', 'started'); time.sleep(600)"
    )
    with pytest.raises(MetricError, match=r"longer than 600 s and was killed"):
        score(parse_metric(program(code)), path, COUNT, LIMITS)
    pid = Path("started").read_text()
    wait_until(lambda: not _runs(pid), "the inner program has ended")


def _runs(pid: str) -> bool:
    """Whether a process lives: not ended, and not a dead one that nobody waits for."""
    status = Path("/proc") / pid / "stat"
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


FUNCTIONS = """
import os, time

def by_item(completions, expected):
    print("noise on stdout")
    return [float(len(text)) for text in completions]

def whole(prompts, completions, expected, **others):
    return sum(len(text) for text in completions)

def wrong_count(completions):
    return [1.0]

def raises(completions):
    raise ValueError("not\\ntoday")

def nothing(completions):
    return None

def exits(completions):
    os._exit(3)

def greedy(completions, temperature):
    return 1.0

def hangs(completions):
    open("started", "w").close()
    time.sleep(600)

A_NUMBER = 3
"""


def test_python_functions(path: Path) -> None:
    Path("mine.py").write_text(FUNCTIONS)
    lengths = [float(len(text)) for text in NASTY]
    assert score(parse_metric("mine:by_item"), path, COUNT, LIMITS) == Scored.of_examples(lengths)
    assert score(parse_metric("mine.py:whole"), path, COUNT, LIMITS) == Scored(sum(lengths), None)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("wrong_count", "1 scores for 8 examples"),
        ("raises", "raised ValueError: not today"),
        ("nothing", "returned NoneType"),
        ("exits", "status 3"),
        ("greedy", "requires temperature; it can take prompts, completions, expected"),
    ],
)
def test_a_bad_function_is_one_line(function: str, said: str, path: Path) -> None:
    Path("mine.py").write_text(FUNCTIONS)
    with pytest.raises(MetricError) as caught:
        score(parse_metric(f"mine:{function}"), path, COUNT, LIMITS)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_function_that_hangs_is_ended(path: Path, until_started: None) -> None:
    Path("mine.py").write_text(FUNCTIONS)
    with pytest.raises(MetricError, match="was killed"):
        score(parse_metric("mine:hangs"), path, COUNT, LIMITS)


def test_what_is_no_function_is_told_before_the_start(path: Path) -> None:
    Path("mine.py").write_text(FUNCTIONS)
    Path("broken.py").write_text("import json\n1 / 0\n")
    for asked, said in (
        ("mine:A_NUMBER", "no function"),
        ("absent.py:f", "no file"),
        ("broken:f", "ZeroDivisionError"),
    ):
        with pytest.raises(SettingsError, match=said):
            require_scorer(parse_metric(asked), LIMITS)


EVALUATE_METRIC = """
import datasets
import evaluate

class Same(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references):
        same = [float(p == r) for p, r in zip(predictions, references)]
        return {"same": sum(same) / len(same), "most": max(map(len, predictions)) / 7}
"""


def test_a_local_metric_of_evaluate(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library gives one number for all items; where it is the mean over them alone, the items are known too."""
    pytest.importorskip("evaluate")
    from rightrank.train.score_worker import ScorerError, scores

    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(Path("cache").resolve()))
    Path("same").mkdir()
    Path("same/same.py").write_text(EVALUATE_METRIC)
    task = {"kind": "evaluate", "target": "./same", "answers": str(path)}
    assert scores(task | {"key": "same"}) == [float(text == "expected") for text in NASTY]
    assert scores(task | {"key": "most"}) == max(map(len, NASTY)) / 7
    with pytest.raises(ScorerError, match="it gives same, most"):
        scores(task | {"key": None})


def test_code_from_the_hub_is_run_only_when_asked(path: Path) -> None:
    with pytest.raises(SettingsError, match="trust_remote_code"):
        require_scorer(parse_metric("evaluate:bleu"), LIMITS)
