"""PiSSA and OLoRA with the base untouched are PEFT's own, EVA's directions are PEFT's own, and dropout is refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, get_peft_model
from peft.tuners.lora.eva import get_eva_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, get_scheduler

from rightrank.schema.errors import SettingsError
from rightrank.schema.settings import make_settings
from rightrank.schema.trials import Arm
from rightrank.schema.variants import variants_of
from rightrank.train.adapter import EVA_BATCHES, trainable_parameters
from tests.helpers import make_runtime
from tests.tiny import small_settings
from tests.train.trials import train_ours

ARM = Arm(rank=4, learning_rate=3e-3, lora_alpha=8.0, seed=3, steps=8)


def theirs_trained(runtime: Any, arm: Arm, model_folder: Path, folder: Path) -> tuple[list[float], dict[str, Any]]:
    """PEFT's own initialisation, which changes the base, in a plain loop; its adapter converted by PEFT to the old base."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    config = LoraConfig(
        r=arm.rank,
        lora_alpha=int(arm.lora_alpha),
        target_modules=list(runtime.targets.names),
        init_lora_weights=arm.init_lora_weights,  # type: ignore[arg-type]
    )
    peft_model: Any = get_peft_model(model, config)
    peft_model.peft_config["default"].init_lora_weights = True
    peft_model.save_pretrained(folder / "initial")
    named = [value for value in peft_model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(named, lr=arm.learning_rate, weight_decay=0.0)
    schedule = get_scheduler(runtime.settings.lr_scheduler_type, optimizer, 1, arm.steps)
    losses: list[float] = []
    for indices in runtime.batch_plan(arm.seed):
        batch = runtime.batch("train", indices)
        loss = peft_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(named, runtime.settings.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    peft_model.peft_config["default"].init_lora_weights = arm.init_lora_weights
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's remark on a second adapter, which it loads itself
        peft_model.save_pretrained(folder / "whole", path_initial_model_for_weight_conversion=str(folder / "initial"))
    return losses, updates_of(folder / "whole")


def updates_of(folder: Path) -> dict[str, torch.Tensor]:
    """Module → s·B·A."""
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert not config["use_rslora"]
    scale = config["lora_alpha"] / config["r"]
    return {
        name: scale * tensors[name.replace("lora_A", "lora_B")] @ a for name, a in tensors.items() if "lora_A" in name
    }


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_equal_to_pefts_own_with_the_base_untouched(
    model_folder: Path, completion_file: Path, tmp_path: Path, init: str
) -> None:
    runtime = make_runtime(model_folder, completion_file, small_settings(), tmp_path / "cache")
    arm = ARM.model_copy(update={"init_lora_weights": init})
    before = {name: value.clone() for name, value in runtime.model.state_dict().items()}
    _, ours, adapter = train_ours(runtime, arm, tmp_path)
    theirs, converted = theirs_trained(runtime, arm, model_folder, tmp_path)
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert ours[-1] < ours[0]
    assert all(torch.equal(runtime.model.state_dict()[name], value) for name, value in before.items())
    found = updates_of(adapter)
    assert found.keys() == converted.keys()
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 2 * arm.rank
    for name, update in converted.items():
        assert float((found[name] - update).norm()) < 1e-2 * float(update.norm()), name


def test_an_arm_of_its_own_init_shares_a_pass(model_folder: Path, completion_file: Path, tmp_path: Path) -> None:
    """In a pass with a plain arm of another rank, it learns what it learns alone."""
    from rightrank.schema.events import Listener
    from rightrank.schema.trials import Trial, TrialFinished
    from rightrank.train.loop import train_trials
    from rightrank.train.trial import TrialFolders

    runtime = make_runtime(model_folder, completion_file, small_settings(), tmp_path / "cache")
    arms = [ARM, ARM.model_copy(update={"init_lora_weights": "pissa"})]
    trials = [Trial(trial_id=f"t{number}", arm=arm) for number, arm in enumerate(arms)]

    def folders(trial: Trial) -> TrialFolders:
        return TrialFolders(tmp_path / f"{trial.trial_id}.safetensors", tmp_path / trial.trial_id)

    outcomes = {o.trial_id: o for o in train_trials(runtime, trials, None, folders, Listener(), 2)}
    together = outcomes["t1"]
    assert isinstance(together, TrialFinished)
    assert together.adapters_per_pass == 2
    alone, _, _ = train_ours(runtime, arms[1], tmp_path / "alone")
    assert together.value == pytest.approx(alone.value, rel=1e-4)


def test_before_the_first_step_the_model_is_the_base(model_folder: Path, completion_file: Path, tmp_path: Path) -> None:
    runtime = make_runtime(model_folder, completion_file, small_settings(), tmp_path)
    base = runtime.evaluate("selection").loss
    for init in ("pissa", "olora", "eva"):
        with runtime.arm(ARM.model_copy(update={"init_lora_weights": init})):
            assert runtime.evaluate("selection").loss == pytest.approx(base, abs=1e-5)


def test_evas_directions_are_pefts(model_folder: Path, completion_file: Path, tmp_path: Path) -> None:
    runtime = make_runtime(model_folder, completion_file, small_settings(), tmp_path)
    arm = ARM.model_copy(update={"init_lora_weights": "eva"})
    with runtime.arm(arm) as model:
        ours = {name: value.detach().clone() for name, value in trainable_parameters(model).items() if "lora_A" in name}
    batches = [runtime.batch("train", indices) for indices in runtime.batch_plan(arm.seed, EVA_BATCHES)]
    inputs = [{"input_ids": batch.input_ids, "attention_mask": batch.attention_mask} for batch in batches]
    config = LoraConfig(
        r=arm.rank,
        target_modules=list(runtime.targets.names),
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=1.0, tau=0.999),
    )
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    theirs = get_eva_state_dict(model, inputs, config, show_progress_bar=False)
    assert len(theirs) == len(ours)
    for name, rows in theirs.items():
        mine = ours[f"base_model.model.{name}.lora_A.default.weight"]
        assert torch.allclose(mine @ mine.T, torch.eye(arm.rank), atol=1e-4)
        shared = torch.linalg.svdvals(mine @ rows.float().T)  # cosines of the angles between the two spaces
        assert float(shared.square().mean()) > 0.97, name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_dropout": 0.1}, "lora_dropout 0.1"),
        ({"weight_decay": 0.01}, "weight_decay 0.01"),
        ({"load_in_4bit": True}, "4 or 8 bits"),
    ],
)
def test_what_a_frozen_half_cannot_bear_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError) as caught:
        variants_of(make_settings({"sweep": ("init=pissa",), **changes}))
    assert words in str(caught.value)
    assert variants_of(make_settings({"sweep": ("init=eva",), **changes}))
