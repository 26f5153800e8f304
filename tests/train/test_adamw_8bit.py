"""`optim adamw_8bit`: refused in one line where it can't run; otherwise bitsandbytes' own, resumed and shared like AdamW."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from rightrank.data import files as extras
from rightrank.plugins.plan.selection import _plan_settings
from rightrank.schema.errors import InterruptedRun, MissingExtraError, SettingsError
from rightrank.schema.events import StepDone
from rightrank.schema.plan_settings import make_plan_settings
from rightrank.schema.trials import Arm, Trial, TrialFinished
from rightrank.train.checkpoints import load_checkpoint
from rightrank.train.loop import train_trials
from rightrank.train.optimizer import make_optimizer, require_optimizer, restore_state, state_tensors
from rightrank.train.runtime import Runtime
from rightrank.train.trial import TrialFolders
from tests.commands import run
from tests.helpers import make_runtime
from tests.tiny import make_tokenizer, small_settings, tiny_llama_config
from tests.watch import Watch

needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs the extra bnb")


def test_names_of_transformers_are_taken() -> None:
    assert {small_settings(optim=name).optim for name in ("adamw_8bit", "adamw_bnb_8bit")} == {"adamw_8bit"}
    assert {small_settings(optim=name).optim for name in ("adamw", "adamw_torch_fused")} == {"adamw_torch"}
    assert small_settings().optim == "adamw_torch"
    assert make_plan_settings({"optim": "adamw_bnb_8bit"}).optim == "adamw_8bit"
    with pytest.raises(SettingsError, match=r"optim: got 'lion'"):
        small_settings(optim="lion")


def test_without_the_extra_it_is_named_before_anything_is_loaded(
    model_folder: Path,
    completion_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda _: None)
    command = [
        "select",
        str(model_folder),
        str(completion_file),
        "--out",
        str(tmp_path / "run"),
        "--optim",
        "adamw_8bit",
    ]
    status, _, error = run(command, capsys)
    assert (status, error.count("\n")) == (2, 1)
    assert "optim adamw_8bit needs the `bitsandbytes` package: pip install 'rightrank[bnb]'" in error
    assert not (tmp_path / "run").exists()
    with pytest.raises(MissingExtraError):
        require_optimizer(small_settings(optim="adamw_8bit"), torch.device("cpu"))


def test_a_device_without_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda _: object())
    settings = small_settings(optim="adamw_8bit")
    with pytest.raises(SettingsError, match="no 8-bit AdamW on mps; give optim adamw_torch or another device"):
        require_optimizer(settings, torch.device("mps"))
    require_optimizer(small_settings(), torch.device("mps"))


def test_the_plan_of_a_selection_has_its_bytes() -> None:
    settings = [
        _plan_settings(tiny_llama_config(400), small_settings(optim=optim), 32, "cpu", None)
        for optim in ("adamw_torch", "adamw_8bit")
    ]
    assert [one.optim for one in settings] == ["adamw_fused", "adamw_8bit"]
    assert settings[0] == settings[1].model_copy(update={"optim": "adamw_fused"})


class _Counting(torch.optim.SGD):
    """Keeps a state as bitsandbytes does: an integer, a tensor, and a table that all parameters share."""

    def __init__(self, parameters: list[torch.nn.Parameter], steps: int) -> None:
        super().__init__(parameters, lr=1.0)
        table = torch.arange(256.0)
        for number, parameter in enumerate(parameters):
            state = {"step": steps, "state1": torch.full((3,), number + steps), "qmap1": table, "qmap2": table}
            self.state[parameter] = state


def test_integers_and_shared_tables_survive_a_checkpoint() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    before, after = _Counting(parameters, 7), _Counting(parameters, 0)
    tensors = state_tensors(before, 0, parameters[0]) | state_tensors(before, 1, parameters[1])
    assert not any("qmap" in name for name in tensors)
    for index, parameter in enumerate(parameters):
        restore_state(after, tensors, index, parameter)
        state = after.state[parameter]
        assert type(state["step"]) is int
        assert state["step"] == 7
        assert torch.equal(state["state1"], before.state[parameter]["state1"])
    assert after.state[parameters[0]]["qmap1"] is after.state[parameters[1]]["qmap1"]


@pytest.fixture
def runtime(completion_file: Path, tmp_path: Path) -> Runtime:
    """Matrices wide enough for states in 8 bits: 128 columns, 32 ranks and more."""
    tokenizer = make_tokenizer()
    wide = tiny_llama_config(len(tokenizer)).to_dict() | {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**wide)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    settings = small_settings(max_steps=6, optim="adamw_8bit")
    return make_runtime(tmp_path / "model", completion_file, settings, tmp_path / "cache")


def train(runtime: Runtime, folder: Path, ranks: list[int], size: int, **observed: Any) -> dict[str, TrialFinished]:
    arms = [Arm(rank=rank, learning_rate=1e-2, lora_alpha=32.0, seed=0, steps=6) for rank in ranks]
    trials = [Trial(trial_id=f"r{arm.rank}", arm=arm) for arm in arms]
    folders = {
        trial.trial_id: TrialFolders(folder / f"{trial.trial_id}.ckpt", folder / trial.trial_id) for trial in trials
    }
    found = {}
    for outcome in train_trials(runtime, trials, None, lambda t: folders[t.trial_id], Watch(**observed), size):
        assert isinstance(outcome, TrialFinished)
        found[outcome.trial_id] = outcome
    return found


def assert_same_adapters(one: Path, other: Path) -> None:
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert float((value - theirs[name]).norm()) <= 1e-3 * float(theirs[name].norm()), name


@needs_bitsandbytes
def test_states_are_in_8_bits_from_the_start(runtime: Runtime) -> None:
    named = {"lora_A": torch.nn.Parameter(torch.ones(32, 128)), "lora_B": torch.nn.Parameter(torch.ones(8, 8))}
    optimizer = make_optimizer(named, 1e-3, runtime.settings)
    kinds = [optimizer.state[parameter]["state1"].dtype for parameter in named.values()]
    assert kinds == [torch.uint8, torch.float32]  # bitsandbytes keeps small matrices in 32 bits


@needs_bitsandbytes
def test_adapters_in_one_pass_equal_each_alone(runtime: Runtime, tmp_path: Path) -> None:
    alone = train(runtime, tmp_path / "alone", [4, 32, 64], 1)
    shared = train(runtime, tmp_path / "shared", [4, 32, 64], 3)
    for name, outcome in shared.items():
        assert outcome.train_losses == pytest.approx(alone[name].train_losses, rel=1e-4)
        assert_same_adapters(tmp_path / "shared" / name, tmp_path / "alone" / name)


@needs_bitsandbytes
def test_it_learns_as_adamw_does(runtime: Runtime, tmp_path: Path) -> None:
    eight = train(runtime, tmp_path / "eight", [64], 1)["r64"]
    runtime.settings = runtime.settings.model_copy(update={"optim": "adamw_torch"})
    full = train(runtime, tmp_path / "full", [64], 1)["r64"]
    assert eight.train_losses != full.train_losses
    assert eight.train_losses[-1] < eight.train_losses[0]
    assert eight.train_losses == pytest.approx(full.train_losses, rel=0.05)


@needs_bitsandbytes
def test_a_resumed_training_ends_as_an_uninterrupted_one(runtime: Runtime, tmp_path: Path) -> None:
    whole = train(runtime, tmp_path / "whole", [64], 1)["r64"]
    steps: list[int] = []
    stop = replace(
        Watch(on_event=lambda event: steps.append(event.step) if isinstance(event, StepDone) else None),
        should_stop=lambda: len(steps) >= 3,
    )
    with pytest.raises(InterruptedRun):
        train(runtime, tmp_path / "parts", [64], 1, on_event=stop.on_event, should_stop=stop.should_stop)
    checkpoint = load_checkpoint(tmp_path / "parts" / "r64.ckpt")
    assert checkpoint is not None
    assert any(tensor.dtype is torch.uint8 for tensor in checkpoint.tensors.values())
    resumed = train(runtime, tmp_path / "parts", [64], 1)["r64"]
    assert resumed.train_losses == whole.train_losses
    assert resumed.item_losses == whole.item_losses
