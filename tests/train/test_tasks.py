"""A task file of lm-evaluation-harness, run with its own code where that is installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rightrank.schema.errors import MetricError, MissingExtraError, SettingsError
from rightrank.schema.metrics import parse_metric
from rightrank.train.metrics import require_task, score_task
from rightrank.train.runtime import Runtime
from tests.helpers import make_runtime
from tests.tiny import small_settings, write_jsonl

TASK = """
task: cats
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}} is"
doc_to_choice: [" the cat", " the dog"]
doc_to_target: label
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    rows = [{"text": f"the cat sat {number}", "label": number % 2} for number in range(10)]
    data = write_jsonl(tmp_path / "cats.jsonl", rows)
    (tmp_path / "tasks").mkdir()
    path = tmp_path / "tasks" / "cats.yaml"
    path.write_text(TASK.format(data=json.dumps(str(data))))
    return path


def test_without_the_extra_it_is_named(task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(MissingExtraError, match=r"rightrank\[lm-eval\]"):
        require_task(parse_metric(f"lm-eval:{task}"))


@pytest.mark.filterwarnings("ignore")  # its own
def test_a_local_task_has_a_score_per_example(
    task: Path, model_folder: Path, completion_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    runtime: Runtime = make_runtime(model_folder, completion_file, small_settings(), tmp_path / "cache")
    spec = parse_metric(f"lm-eval:{task}:acc")
    assert spec.name == "cats_acc"
    require_task(spec)
    scored = score_task(runtime, spec)
    assert scored.examples is not None
    assert len(scored.examples) == 10
    assert set(scored.examples) <= {0.0, 1.0}
    assert scored.value == sum(scored.examples) / 10
    assert capsys.readouterr().out == ""
    with pytest.raises(MetricError, match="it has: acc"):
        score_task(runtime, parse_metric(f"lm-eval:{task}:bleu"))


def test_a_file_without_a_task_is_refused(task: Path) -> None:
    pytest.importorskip("lm_eval")
    task.write_text("group: many\n")
    with pytest.raises(SettingsError, match="names no single task"):
        require_task(parse_metric(f"lm-eval:{task}"))
    task.write_text("task: [\n")
    with pytest.raises(SettingsError, match=r"cats\.yaml"):
        require_task(parse_metric(f"lm-eval:{task}"))
