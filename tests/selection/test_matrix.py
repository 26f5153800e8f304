"""Many data sets at once: one base, one table, a run folder each; and what is wrong with a matrix is one clear line."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml
from benchmarks.scale.simulated import TOKEN, VERSIONS, Pace, SimulatedCrew

from rightrank.errors import AllTrialsFailedError, SettingsError
from rightrank.executors.pool import Pool, PoolOptions
from rightrank.io.journal import Journal
from rightrank.io.matrix import MatrixJob, read_matrix
from rightrank.preparation import load_base
from rightrank.records import Arm, Trial, TrialFinished, TrialOutcome
from rightrank.selection.many import _run_all
from rightrank.selection.start import PreparedSelection
from tests.commands import run, values_of
from tests.tiny import small_settings, write_completions

SHARED = {"ranks": [1, 4], "learning_rates": [1e-2], "strategy": "grid", "max_steps": 4, "batch_size": 4, "seq_len": 32}
SMALL = SHARED | {"eval_items": 12, "eval_points": 2, "samples": 0, "device": "cpu"}


def write_matrix(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def as_option(value: Any) -> str:
    """A list of one keeps its comma."""
    return "".join(f"{one}," for one in value) if isinstance(value, list) else str(value)


def test_two_data_sets_one_base_one_table(
    model_folder: Path,
    completion_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loads: list[str] = []
    monkeypatch.setattr(
        "rightrank.preparation.load_base",
        lambda *arguments, **named: (loads.append(arguments[0]), load_base(*arguments, **named))[1],
    )
    other = write_completions(tmp_path / "other.jsonl", 120)
    jobs = {"one": str(completion_file), "two": {"data": str(other), "max-steps": 3}}
    file = write_matrix(tmp_path / "jobs.yaml", {"model": str(model_folder), **SMALL, "jobs": jobs})
    command = ["select", "--matrix", str(file), "--out", str(tmp_path / "out"), "--json"]
    status, out, err = run([*command, "--quiet"], capsys)
    assert status == 0, err
    assert len(loads) == 1
    found = json.loads(out)
    assert [job["name"] for job in found["jobs"]] == ["one", "two"]
    assert all(job["decision"]["reference_rank"] in (1, 4) for job in found["jobs"])
    rows = list(csv.DictReader((tmp_path / "out" / "table.csv").read_text(encoding="utf-8").splitlines()))
    for row in rows:
        journal = Journal(tmp_path / "out" / row["name"] / "journal.jsonl").read()
        trials = [record for record in journal if isinstance(record, TrialFinished) and record.rank > 0]
        steps = [trial.steps for trial in trials]  # none of the grid stops early
        assert float(row["trainings"]) == pytest.approx(sum(steps) / max(steps), abs=1e-3)
        assert [trial.rank for trial in trials if trial.arm.is_direct] == [4, 1]
    config = yaml.safe_load((tmp_path / "out" / "two" / "config.yaml").read_text())
    assert (config["max_steps"], config["ranks"]) == (3, [1, 4])
    assert (tmp_path / "out" / "one" / "adapter" / "adapter_config.json").exists()
    alone = ["select", str(model_folder), str(completion_file), "--out", str(tmp_path / "alone"), "--quiet"]
    settings = [f"--set={name}={as_option(value)}" for name, value in SMALL.items()]
    assert run([*alone, *settings], capsys)[0] == 0
    assert values_of(tmp_path / "alone") == values_of(tmp_path / "out" / "one")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"jobs": {"a": "x.jsonl"}}, "got model None; give `model:`"),
        ({"model": "m"}, "got jobs None; give `NAME: DATA`"),
        ({"model": "m", "jobs": ["x.jsonl"]}, "give `NAME: DATA`"),
        ({"model": "m", "jobs": {"../up": "x.jsonl"}}, "a job's name is its folder's; use letters, digits"),
        ({"model": "m", "jobs": {"a": {"ranks": [1]}}}, "job 'a': got {'ranks': [1]}"),
        ({"model": "m", "jobs": {"a": "nowhere.jsonl"}}, "job 'a': nowhere.jsonl"),
        ({"model": "m", "jobs": {"a": {"data": "x.jsonl", "rank": 3}}}, "job 'a': unknown setting 'rank'"),
    ],
)
def test_a_wrong_matrix_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], values: dict[str, Any], message: str
) -> None:
    file = write_matrix(tmp_path / "jobs.yaml", values)
    status, _, err = run(["select", "--matrix", str(file), "--out", str(tmp_path / "out")], capsys)
    assert status == 2
    assert message in err
    assert err.strip().count("\n") == 0


@pytest.mark.parametrize("differing", [{"devices_per_arm": 2}, {"hang_seconds": 30}, {"workers": 3}])
def test_where_trainings_run_is_one_for_all_jobs(
    model_folder: Path,
    completion_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    differing: dict[str, Any],
) -> None:
    """The jobs share their workers: what one of them asks for must not be left out in silence."""
    data = str(completion_file)
    shared = {"model": str(model_folder), "executor": "processes", "workers": 2}
    file = write_matrix(tmp_path / "jobs.yaml", {**shared, "jobs": {"a": data, "b": {"data": data, **differing}}})
    status, _, err = run(["select", "--matrix", str(file), "--out", str(tmp_path / "out")], capsys)
    assert status == 2
    assert "jobs differ in" in err
    assert next(iter(differing)) in err
    assert err.strip().count("\n") == 0


def test_tags_are_not_obeyed(tmp_path: Path) -> None:
    file = tmp_path / "jobs.yaml"
    file.write_text("model: !!python/object/apply:os.system ['true']\njobs: {a: x}\n")
    with pytest.raises(SettingsError, match="not YAML"):
        read_matrix(file)


def test_model_and_matrix_exclude_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(["select", "m", "d", "--matrix", "jobs.yaml", "--out", str(tmp_path / "o")], capsys)
    assert status == 2
    assert "leave out 'm'" in err
    status, _, err = run(["select", "m", "--out", str(tmp_path / "o")], capsys)
    assert status == 2
    assert "give MODEL and DATA, or neither to continue the run in --out, or --matrix FILE" in err


def test_a_job_has_the_file_s_settings_under_its_own(tmp_path: Path) -> None:
    jobs = {"a": "x", "b": {"data": "y", "seq-len": 64}}
    matrix = read_matrix(
        write_matrix(tmp_path / "jobs.yaml", {"model": "m", "seq_len": 32, "seeds": [1], "jobs": jobs})
    )
    assert matrix.jobs == (
        MatrixJob("a", "x", {"seq_len": 32, "seeds": [1]}),
        MatrixJob("b", "y", {"seq_len": 64, "seeds": [1]}),
    )
    assert small_settings(**matrix.jobs[1].settings).seq_len == 64


class StubSelection:
    """Asks for its arms rank by rank; fails at a rank where told."""

    def __init__(self, ranks: list[int], fails_at: int | None) -> None:
        self._left = list(ranks)
        self._fails_at = fails_at
        self.base_loss = None
        self.kept: list[int] = []

    def wanted(self) -> list[Trial]:
        arms = [Arm(rank=rank, learning_rate=1e-3, lora_alpha=1.0, seed=0, steps=5) for rank in self._left[:2]]
        return [Trial(trial_id=f"{id(self)}-{arm.rank}", arm=arm) for arm in arms]

    def keep(self, outcome: TrialOutcome) -> None:
        if outcome.rank == self._fails_at:
            raise AllTrialsFailedError("no luck")
        self.kept.append(outcome.rank)
        self._left.remove(outcome.rank)

    def answer_adapter(self, on_adapter: object) -> None:
        """There is no first question here."""

    def end(self) -> str:
        return f"decided on {sorted(self.kept)}"


def test_over_workers_every_job_goes_its_own_way() -> None:
    selections = {"a": StubSelection([1, 2, 3], None), "b": StubSelection([4, 5, 6], 5), "c": StubSelection([7], None)}
    begun = {name: SimpleNamespace(selection=selection) for name, selection in selections.items()}
    crew = SimulatedCrew(Pace(trial=lambda *_: 10.0))
    ended = _run_all(
        cast(dict[str, PreparedSelection], begun), Pool(crew, PoolOptions(3, VERSIONS, TOKEN), clock=crew.clock)
    )
    assert cast(Any, ended["a"]) == "decided on [1, 2, 3]"
    assert cast(Any, ended["c"]) == "decided on [7]"
    assert isinstance(ended["b"], AllTrialsFailedError)
