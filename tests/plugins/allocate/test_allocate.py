"""Ranks by module: the arithmetic of sharing out, and that a pattern must earn its proposal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rightrank.cli import main
from rightrank.models.adapter_files import AdapterFolder, open_adapter
from rightrank.plugins.allocate.proposal import (
    _by_spectra,
    _TrainedPattern,
    compare,
    shuffled,
)
from rightrank.schema.events import Listener
from rightrank.schema.results import AllocationTrial
from rightrank.schema.trials import Arm, Trial
from rightrank.train.adapter_runtime import DataUse, adapter_runtime
from rightrank.train.evaluation import Scores
from rightrank.train.loop import run_trial
from rightrank.train.trial import TrialFolders
from tests.helpers import make_runtime
from tests.tiny import small_settings

pytestmark = pytest.mark.trains


@pytest.fixture(scope="module")
def trained(model_folder: Path, completion_file: Path, tmp_path_factory: pytest.TempPathFactory) -> AdapterFolder:
    root = tmp_path_factory.mktemp("trained")
    runtime = make_runtime(model_folder, completion_file, small_settings(max_steps=20), root / "cache")
    arm = Arm(rank=8, learning_rate=1e-2, lora_alpha=32.0, seed=0, steps=20)
    run_trial(runtime, Trial(trial_id="t", arm=arm), None, TrialFolders(root / "c", root / "adapter"), Listener())
    return open_adapter(root / "adapter")


@pytest.fixture(scope="module")
def runtime(trained: AdapterFolder, completion_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    use = DataUse(completion_file, small_settings(), tmp_path_factory.mktemp("cache"), 4)
    return adapter_runtime(trained, None, use)


def cost(adapter: AdapterFolder, ranks: dict[str, int]) -> int:
    return sum(ranks[module.name] * (module.rows + module.columns) for module in adapter.modules)


def test_the_pattern_keeps_the_budget(trained: AdapterFolder) -> None:
    ranks = _by_spectra(trained, 4)
    assert ranks.keys() == {module.name for module in trained.modules}
    assert min(ranks.values()) >= 1
    assert cost(trained, ranks) <= cost(trained, {module.name: 4 for module in trained.modules})
    assert len(set(ranks.values())) > 1


def test_a_shuffle_keeps_the_ranks_and_nearly_the_parameters(trained: AdapterFolder) -> None:
    ranks = {module.name: 1 + position * position % 5 for position, module in enumerate(trained.modules)}
    other = shuffled(trained, ranks, seed=0)
    assert sorted(other.values()) == sorted(ranks.values())
    assert other != ranks
    assert cost(trained, other) == pytest.approx(cost(trained, ranks), rel=0.02)


def made_up(losses: np.ndarray[Any, Any], seed: int) -> _TrainedPattern:
    record = AllocationTrial(pattern="uniform", seed=seed, parameters=1, value=0.0, ranks={})
    return _TrainedPattern(record, Scores(losses.tolist(), [10] * len(losses)))


def test_the_comparison_is_paired_and_can_be_negative() -> None:
    generator = np.random.default_rng(0)
    losses = 20 + 10 * generator.standard_normal(100)  # examples differ by far more than the patterns
    right = [made_up(losses, seed) for seed in (0, 1)]
    worse = compare([made_up(losses + 0.1 * generator.random(100), seed) for seed in (0, 1)], right, "uniform")
    assert not worse.better
    assert worse.low > 0
    better = compare([made_up(losses - 0.1 * generator.random(100), seed) for seed in (0, 1)], right, "uniform")
    assert better.better
    same = compare([made_up(losses + 0.1 * generator.standard_normal(100), seed) for seed in (0, 1)], right, "uniform")
    assert not same.better


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert isinstance(stop.value.code, int)
    return stop.value.code, captured.out, captured.err


TRAINING = ["--rank", 4, "--learning-rate", 1e-2, "--max-steps", 3, "--seeds", "0,1"]
SETS = ["--set", "seq_len=32", "--set", "eval_items=12", "--set", "batch_size=4"]


def test_allocate_answers_with_its_evidence(
    trained: AdapterFolder, completion_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, "allocate", trained.path, completion_file, *TRAINING, *SETS, "--json")
    assert status == 0, err
    answer = json.loads(out)
    assert len(answer["trials"]) == 6
    uniform, allocated = (
        next(trial for trial in answer["trials"] if trial["pattern"] == kind) for kind in ("uniform", "allocated")
    )
    assert set(uniform["ranks"].values()) == {4}
    assert allocated["parameters"] <= uniform["parameters"]
    proposed = all(verdict["better"] for verdict in answer["verdicts"])
    assert answer["proposal"] == ("pattern" if proposed else "uniform")
    assert bool(answer["rank_pattern"]) == proposed
