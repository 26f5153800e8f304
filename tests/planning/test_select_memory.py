"""Test `select --memory`: what cannot fit is left out or refused before any training, and peaks are recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rightrank.cli import main
from rightrank.planning.estimate import Estimator
from rightrank.planning.planner import build_step_settings, plan_selection
from rightrank.runs.folder import Journal
from rightrank.schema.trials import TrialFinished
from tests.tiny import build_small_settings, build_tiny_llama_config

pytestmark = pytest.mark.trains

SMALL = (
    "--learning-rates",
    "1e-2",
    "--max-steps",
    "2",
    "--batch-size",
    "4",
    "--seq-len",
    "32",
    "--max-eval-examples",
    "6",
)
SETS = ("--set", "num_evaluations=1", "--strategy", "grid", "--quiet")


def one_block() -> Any:
    """Return a configuration whose step is traced in the least time."""
    config = build_tiny_llama_config(400)
    config.num_hidden_layers = 1
    return config


def command(model: Path, data: Path, out: Path, *more: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["select", str(model), str(data), "--out", str(out), *SMALL, *SETS, *more])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def direct(trials: list[TrialFinished]) -> list[TrialFinished]:
    """Trainings from the start, without the base and the truncations."""
    return [trial for trial in trials if trial.rank > 0 and trial.truncate_from is None]


def test_measured_peaks_are_recorded(
    model_folder: Path, completion_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert command(model_folder, completion_file, out, "--ranks", "1,2,4", "--memory", "24GiB") == 0
    capsys.readouterr()
    trials = [record for record in Journal(out / "journal.jsonl").read() if isinstance(record, TrialFinished)]
    assert {trial.rank for trial in direct(trials)} == {1, 2, 4}
    assert all(trial.peak_bytes > 0 for trial in trials)


def test_too_little_memory_is_refused_before_the_start(
    model_folder: Path, completion_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert command(model_folder, completion_file, out, "--ranks", "1,4", "--memory", "1MiB") == 2
    error = capsys.readouterr().err
    assert "rank 1 needs" in error
    assert len(error.strip().splitlines()) == 1
    assert not any(isinstance(record, TrialFinished) for record in Journal(out / "journal.jsonl").read())


def test_a_preference_pair_is_planned_as_two_sequences() -> None:
    config = one_block()
    pairs = plan_selection(config, build_small_settings(batch_size=4), 32, "cpu", sequences=2)
    texts = plan_selection(config, build_small_settings(batch_size=8), 32, "cpu")
    assert pairs.peak_bytes == texts.peak_bytes
    assert pairs.needed_bytes == texts.needed_bytes


def test_the_plan_gives_the_adapters_that_fit_in_a_pass() -> None:
    settings = build_small_settings(ranks=(1, 8), adapters_per_pass=6)
    config = one_block()
    assert plan_selection(config, settings, 32, "cpu").max_adapters_per_pass is None
    alone = plan_selection(config, settings.model_copy(update={"memory_bytes": 2**40}), 32, "cpu")
    assert alone.max_adapters_per_pass == 6
    tight = settings.model_copy(update={"memory_bytes": alone.needed_bytes[8]})
    assert plan_selection(config, tight, 32, "cpu").max_adapters_per_pass == 1
    needs = {}
    for arms in (4, 6):
        changed = Estimator(
            config, build_step_settings(config, settings.model_copy(update={"memory_bytes": 2**40}), 32, "cpu", None)
        ).share_pass(arms)
        changed.num_means = 2
        needs[arms] = changed.estimate(8).needed_bytes
    between = settings.model_copy(update={"memory_bytes": (needs[4] + needs[6]) // 2})
    assert plan_selection(config, between, 32, "cpu").max_adapters_per_pass == 4


def test_the_means_of_the_factors_are_planned() -> None:
    config, settings = one_block(), build_small_settings(ranks=(1, 8), checkpoint="last")
    step = build_step_settings(config, settings, 32, "cpu", None)
    adapter_bytes = 4 * Estimator(config, step).get_inventory(8).trainable_parameters
    without = Estimator(config, step).estimate(8).peak_bytes
    best = settings.model_copy(update={"checkpoint": "best"})
    peaks = [plan_selection(config, setting, 32, "cpu").peak_bytes[8] for setting in (settings, best)]
    assert [peak - without for peak in peaks] == [adapter_bytes, 2 * adapter_bytes]


@pytest.mark.parametrize("bits", [4, 8])
def test_dora_over_quantised_matrices_is_planned(bits: int) -> None:
    config = one_block()
    settings = build_small_settings(**{"use_dora": True, f"load_in_{bits}bit": True})
    plain = settings.model_copy(update={"use_dora": False})
    steps = (build_step_settings(config, step_setting, 32, "cpu", None) for step_setting in (settings, plain))
    with_magnitudes, without = (
        Estimator(config, step_setting).get_inventory(4).trainable_parameters for step_setting in steps
    )
    assert with_magnitudes > without
    assert plan_selection(config, settings, 32, "cpu").ranks == settings.ranks
