"""Test selections by metrics of generated answers: which one decides, which are kept, and failures of functions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rightrank.api.runs import decide
from rightrank.schema.events import TestEvaluated
from rightrank.schema.trials import TrialFinished
from tests.commands import read_journal_records, run

SMALL = [
    "--goal", "training-rank", "--strategy", "grid", "--ranks", "1,4", "--learning-rates", "1e-2", "--max-steps", "8", "--batch-size", "4",
    "--seq-len", "32", "--max-eval-examples", "10", "--set", "num_evaluations=2", "--device", "cpu",
    "--set", "max_new_tokens=8", "--quiet",
]  # fmt: skip
SHARE_OF_E = """
def share(completions):
    return [text.count("e") / max(1, len(text)) for text in completions]


def total(completions, expected):
    assert len(completions) == len(expected)
    return float(sum(map(len, completions)))
"""
COUNT = """
def length(completions):
    return [len(text) for text in completions]
"""


def select(
    model: Path, data: Path, out: Path, capsys: pytest.CaptureFixture[str], *options: str
) -> tuple[int, str, str]:
    return run(["select", str(model), str(data), "--out", str(out), *SMALL, *options, "--json"], capsys)


def test_one_metric_decides_and_the_others_are_kept(
    model_folder: Path,
    completion_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(SHARE_OF_E)
    (tmp_path / "count.py").write_text(COUNT)
    arguments = [
        "f1",
        "exact_match",
        "max:mine:share",
        "max:mine.py:total",
        "min:count.py:length",
    ]
    options = ["--set", f"metrics={','.join(arguments)}"]
    status, out, err = select(model_folder, completion_file, tmp_path / "run", capsys, "--metric", "rougeL", *options)
    assert status == 0, err
    answer = json.loads(out)
    assert answer["metric"] == "rougeL"
    assert answer["basis"] == "examples"
    trials = read_journal_records(tmp_path / "run", TrialFinished)
    assert {trial.rank for trial in trials if trial.arm.is_direct} == {0, 1, 4}
    for trial in trials:
        assert set(trial.example_metrics) == {"rougeL", "f1", "exact_match", "share", "length"}
        assert trial.value == trial.metrics["rougeL"] == pytest.approx(sum(trial.example_metrics["rougeL"]) / 10)
        lines = (tmp_path / "run" / "answers" / f"{trial.trial_id}.jsonl").read_text().splitlines()
        written = [json.loads(line)["completion"] for line in lines]
        assert trial.example_metrics["length"] == [float(len(text)) for text in written]
        assert trial.metrics["total"] == float(sum(map(len, written)))
    tests = read_journal_records(tmp_path / "run", TestEvaluated)
    assert all(test.value == test.metrics["rougeL"] and "length" in test.metrics for test in tests)
    again = decide(tmp_path / "run", metric="f1").decision
    assert (again.metric, again.basis, again.higher_is_better) == ("f1", "examples", True)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("rouge", "did you mean 'rougeL'"),
        ("accuracy", "needs `text` and `label`"),
        ("acc=nowhere:score", "No module named 'nowhere'"),
        ("acc=mine.py:absent", "its functions are: share, total"),
        ("wer=command:wc -l", "is unknown"),
        ("loss=mine:share", "a built-in metric"),
        ("mine:share", "give max:mine:share or min:mine:share"),
        ("toxicity_score=mine:share", "give max:toxicity_score=mine:share or"),
    ],
)
def test_a_missing_metric_is_refused_before_the_start(
    metric: str,
    message: str,
    model_folder: Path,
    completion_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(SHARE_OF_E)
    status, out, err = select(model_folder, completion_file, tmp_path / "run", capsys, "--metric", metric)
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert message in err


def test_a_function_that_fails_later_loses_nothing(
    model_folder: Path,
    completion_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Use a function that fails after the first training. Once corrected, the run resumes from the end of that training."""
    monkeypatch.chdir(tmp_path)
    program = tmp_path / "count.py"
    program.write_text(
        "import pathlib\n\n\ndef length(completions):\n    seen = pathlib.Path('seen')\n    if seen.exists():\n"
        "        raise RuntimeError('the licence server is away')\n    seen.touch()\n    return [len(text) for text in completions]\n"
    )
    options = ["--metric", "min:count.py:length"]
    status, out, err = select(model_folder, completion_file, tmp_path / "run", capsys, *options)
    assert (status, out, err.count("\n")) == (1, "", 1), err
    assert "the licence server is away" in err
    assert len(read_journal_records(tmp_path / "run", TrialFinished)) == 1
    checkpoints = list((tmp_path / "run" / "checkpoints").iterdir())
    assert len(checkpoints) == 1
    program.write_text(COUNT)
    status, out, err = select(model_folder, completion_file, tmp_path / "run", capsys, *options)
    assert status == 0, err
    assert len([trial for trial in read_journal_records(tmp_path / "run", TrialFinished) if trial.arm.is_direct]) == 3
