"""An arm in a shared pass equals the arm alone: losses, adapter and scores, whatever the other arms do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from rightrank.evaluation.loss import BatchLoss
from rightrank.schema.errors import InterruptedRun
from rightrank.schema.events import Listener, StepDone
from rightrank.schema.trials import Arm, Trial, TrialDiverged, TrialFinished, TrialOutcome
from rightrank.training.loop import TrialFolders, train_trials
from rightrank.training.pace import find_multi_lora_obstacle
from rightrank.training.runtime import Runtime
from tests.helpers import make_runtime
from tests.tiny import build_small_settings
from tests.watch import Watch

STEP_TOLERANCE = 1e-5  # relative, of a step's loss
RUN_TOLERANCE = 1e-3  # relative, of the adapter when it has finished


def arm(rank: int = 4, rate: float = 1e-2, seed: int = 0, steps: int = 6, alpha: float = 32.0) -> Arm:
    return Arm(rank=rank, learning_rate=rate, lora_alpha=alpha, seed=seed, steps=steps)


def make_trials(arms: Sequence[Arm]) -> list[Trial]:
    return [Trial(trial_id=f"t{number}", arm=arm) for number, arm in enumerate(arms)]


def run(
    runtime: Runtime,
    arms: Sequence[Arm],
    folder: Path,
    size: int,
    base_loss: float | None = None,
    listener: Listener | None = None,
    notices: list[str] | None = None,
) -> dict[str, TrialOutcome]:
    if listener is None:
        listener = Watch(notice=([] if notices is None else notices).append)
    outcomes = train_trials(
        runtime,
        make_trials(arms),
        base_loss,
        lambda trial: TrialFolders(folder / f"{trial.trial_id}.safetensors", folder / trial.trial_id),
        listener,
        size,
    )
    return {outcome.trial_id: outcome for outcome in outcomes}


def run_alone(runtime: Runtime, arms: Sequence[Arm], folder: Path) -> dict[str, TrialOutcome]:
    return run(runtime, arms, folder, 1)


def assert_same(trial: TrialOutcome, reference: TrialOutcome, folder: Path, reference_folder: Path) -> None:
    assert isinstance(trial, TrialFinished)
    assert isinstance(reference, TrialFinished)
    assert trial.train_losses == pytest.approx(reference.train_losses, rel=STEP_TOLERANCE * 10)
    assert trial.train_losses[0] == pytest.approx(reference.train_losses[0], rel=STEP_TOLERANCE)
    assert trial.example_losses == pytest.approx(reference.example_losses, rel=1e-4)
    assert trial.example_tokens == reference.example_tokens
    assert trial.train_tokens == reference.train_tokens
    ours = load_file(folder / trial.trial_id / "adapter_model.safetensors")
    theirs = load_file(reference_folder / reference.trial_id / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert float((value - theirs[name]).norm()) <= RUN_TOLERANCE * float(theirs[name].norm()), name


@pytest.fixture(scope="module")
def runtime(model_folder: Path, completion_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    return make_runtime(
        model_folder, completion_file, build_small_settings(max_steps=6), tmp_path_factory.mktemp("cache")
    )


ARMS = st.lists(
    st.builds(
        arm,
        rank=st.sampled_from([1, 2, 4, 8, 16]),
        rate=st.sampled_from([1e-4, 1e-3, 1e-2]),
        seed=st.integers(0, 3),
        alpha=st.sampled_from([4.0, 16.0, 32.0]),
        steps=st.integers(1, 6),
    ),
    min_size=2,
    max_size=6,
    unique=True,
)


@given(arms=ARMS, size=st.integers(2, 6))
@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_arms_in_one_pass_equal_each_alone(
    runtime: Runtime, tmp_path_factory: pytest.TempPathFactory, arms: list[Arm], size: int
) -> None:
    alone, shared_folder = tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("together")
    theirs = run_alone(runtime, arms, alone)
    ours = run(runtime, arms, shared_folder, size)
    assert ours.keys() == theirs.keys()
    for trial_id, outcome in ours.items():
        assert_same(outcome, theirs[trial_id], shared_folder, alone)


VARIANTS: dict[str, dict[str, Any]] = {
    "dropout": {"lora_dropout": 0.3},
    "prefix": {"layers_to_transform": (2,)},
    "accumulation": {"batch_size": 2, "gradient_accumulation_steps": 2},
    "checkpointing": {"gradient_checkpointing": True, "lora_dropout": 0.1},
    "rslora": {"scaling": "alpha/sqrt(r)", "target_modules": ("q_proj", "down_proj")},
    "saved": {"modules_to_save": ("norm",)},
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_arms_in_one_pass_equal_each_alone_under_every_setting(
    model_folder: Path, completion_file: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    runtime = make_runtime(
        model_folder, completion_file, build_small_settings(max_steps=6, **changes), tmp_path / "cache"
    )
    arms = [arm(1), arm(4), arm(4, rate=3e-3), arm(8, seed=1)]
    assert find_multi_lora_obstacle(runtime, arms) is None
    theirs = run_alone(runtime, arms, tmp_path / "alone")
    ours = run(runtime, arms, tmp_path / "together", 4)
    for trial_id, outcome in ours.items():
        assert isinstance(outcome, TrialFinished)
        assert outcome.adapters_per_pass == 4
        assert_same(outcome, theirs[trial_id], tmp_path / "together", tmp_path / "alone")


def test_a_diverged_arm_touches_no_other(runtime: Runtime, tmp_path: Path) -> None:
    base_loss = runtime.evaluator.evaluate("validation").loss
    good = [arm(2), arm(8, seed=1)]
    arms = [good[0], arm(4, rate=1e20), good[1], arm(4, rate=1e30)]
    ours = run(runtime, arms, tmp_path / "together", 4, base_loss)
    theirs = run_alone(runtime, good, tmp_path / "alone")
    assert isinstance(ours["t1"], TrialDiverged)
    assert isinstance(ours["t3"], TrialDiverged)
    assert not (tmp_path / "together" / "t1.safetensors").exists()
    assert_same(ours["t0"], theirs["t0"], tmp_path / "together", tmp_path / "alone")
    renamed = tmp_path / "alone" / "t2"
    (tmp_path / "alone" / "t1").rename(renamed)
    assert_same(
        ours["t2"], theirs["t1"].model_copy(update={"trial_id": "t2"}), tmp_path / "together", tmp_path / "alone"
    )


def test_out_of_memory_halves_the_adapters_per_pass_and_loses_nothing(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = [arm(rank, seed=seed) for rank in (2, 4) for seed in (0, 1)]
    theirs = run_alone(runtime, arms, tmp_path / "alone")
    real = runtime.evaluator.objective
    limit = 2 * max(runtime.settings.batch_size, runtime.settings.eval_batch_size)

    def hungry(model: Any, batch: Any, scale: Any) -> BatchLoss:
        if len(batch.indices) > (limit if not torch.is_grad_enabled() else 2 * runtime.settings.batch_size):
            raise torch.OutOfMemoryError("no room")
        return real(model, batch, scale)

    monkeypatch.setattr(runtime.evaluator, "objective", hungry)
    notices: list[str] = []
    ours = run(runtime, arms, tmp_path / "together", 4, notices=notices)
    assert notices == ["4 adapters per pass ran out of memory on cpu: continuing with 2"]
    for trial_id, outcome in ours.items():
        assert_same(outcome, theirs[trial_id], tmp_path / "together", tmp_path / "alone")


def test_a_stopped_pass_resumes_where_it_was(runtime: Runtime, tmp_path: Path) -> None:
    arms = [arm(2), arm(4, seed=1), arm(8)]
    steps: list[int] = []
    stop_after = 7  # steps of any arm
    listener = Watch(
        on_event=lambda event: steps.extend([event.step] if isinstance(event, StepDone) else []),
        should_stop=lambda: len(steps) >= stop_after,
    )
    with pytest.raises(InterruptedRun, match=r"stopped at step \d of 6"):
        run(runtime, arms, tmp_path / "stopped", 2, listener=listener)
    ours = run(runtime, arms, tmp_path / "stopped", 3)
    theirs = run_alone(runtime, arms, tmp_path / "alone")
    assert len(ours) == 3
    for trial_id, outcome in ours.items():
        assert_same(outcome, theirs[trial_id], tmp_path / "stopped", tmp_path / "alone")
