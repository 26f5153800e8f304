"""An arm is what a plain loop over `peft.get_peft_model` gives, and its adapter is what PEFT loads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, get_scheduler

from rightrank.schema.trials import Arm
from rightrank.train.optimizer import ArmOptimizer
from rightrank.train.targets import lora_config
from tests.adapters.adapters import make_base
from tests.helpers import fresh_adapter, make_runtime, trainable_parameters
from tests.models.kind_checks import with_first_values
from tests.tiny import make_tokenizer, small_settings
from tests.train.architectures import make_model, runtime_of
from tests.train.trials import train_ours

ARM = Arm(rank=4, learning_rate=1e-2, lora_alpha=32.0, seed=3, steps=8)


def train_plainly(runtime: Any, arm: Arm, model_folder: Path) -> tuple[list[float], Any]:
    """The loop anyone would write: PEFT's model, transformers' own loss and schedule, torch's AdamW."""
    settings = runtime.settings
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    config = lora_config(settings, arm, False, runtime.targets.names)
    peft_model: Any = get_peft_model(model, config)
    peft_model.train()
    named = with_first_values(runtime, arm, peft_model)
    optimizer = torch.optim.AdamW(named.values(), lr=arm.learning_rate, weight_decay=0.0)
    schedule = get_scheduler(settings.lr_scheduler_type, optimizer, 1, arm.steps)
    losses: list[float] = []
    for indices in runtime.batch_plan(arm.seed):
        batch = runtime.batch("train", indices)
        loss = peft_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(named.values(), settings.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, peft_model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layers_to_transform": (2,)},  # two frozen layers below, computed once
        {"scaling": "alpha/sqrt(r)", "target_modules": ("q_proj", "down_proj")},
        {"gradient_checkpointing": True},
    ],
    ids=["all-linear", "prefix", "rslora", "checkpointing"],
)
def test_losses_agree_with_a_plain_peft_loop(
    model_folder: Path, completion_file: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    runtime = make_runtime(model_folder, completion_file, small_settings(**changes), tmp_path / "cache")
    assert (runtime.fast_paths.prefix is not None) == ("layers_to_transform" in changes)
    _, ours, adapter = train_ours(runtime, ARM, tmp_path)
    plain, peft_model = train_plainly(runtime, ARM, model_folder)
    assert ours == pytest.approx(plain, rel=1e-5, abs=1e-5)
    assert ours[-1] < ours[0]

    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    loaded: Any = PeftModel.from_pretrained(base, str(adapter)).eval()
    batch = runtime.batch("test", range(4))
    with torch.no_grad():
        theirs = peft_model.eval()(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        reloaded = loaded(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    assert float((reloaded - theirs).norm() / theirs.norm()) < 1e-4


def test_loss_is_transformers_own(model_folder: Path, completion_file: Path, tmp_path: Path) -> None:
    runtime = make_runtime(model_folder, completion_file, small_settings(), tmp_path)
    batch = runtime.batch("selection", range(6))
    with torch.no_grad():
        theirs = runtime.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
        ours = runtime.losses("selection", batch, 1.0)
    assert float(ours.example_losses.sum() / ours.example_tokens.sum()) == pytest.approx(float(theirs), rel=1e-5)
    assert int(ours.example_tokens.sum()) == int((batch.labels[:, 1:] != -100).sum())


def test_same_seed_same_values(model_folder: Path, completion_file: Path, tmp_path: Path) -> None:
    runtime = make_runtime(model_folder, completion_file, small_settings(lora_dropout=0.1), tmp_path)
    first, losses, _ = train_ours(runtime, ARM, tmp_path / "a")
    second, again, _ = train_ours(runtime, ARM, tmp_path / "b")
    assert losses == again
    assert first.item_losses == second.item_losses


def test_the_base_is_as_before_after_an_arm(model_folder: Path, completion_file: Path, tmp_path: Path) -> None:
    runtime = make_runtime(model_folder, completion_file, small_settings(), tmp_path)
    before = copy.deepcopy(runtime.model.state_dict())
    train_ours(runtime, ARM, tmp_path)
    after = runtime.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(parameter.requires_grad for parameter in runtime.model.parameters())


@pytest.mark.filterwarnings("ignore:`lora_bias=True`")  # PEFT's remark that it can't be merged
@pytest.mark.parametrize("peft_options", [{}, {"lora_bias": True}], ids=str)
def test_initial_a_is_nested(
    peft_options: dict[str, bool], model_folder: Path, completion_file: Path, tmp_path: Path
) -> None:
    folder = model_folder
    if peft_options:  # PEFT asks for a base with biases
        folder = make_base(tmp_path / "base", "conv1d")
        make_tokenizer().save_pretrained(folder)
    runtime = make_runtime(folder, completion_file, small_settings(peft_options=peft_options), tmp_path)
    with fresh_adapter(runtime, ARM.model_copy(update={"rank": 8})) as model:
        high = {name: value.detach().clone() for name, value in trainable_parameters(model).items()}
    with fresh_adapter(runtime, ARM) as model:
        low = {name: value.detach().clone() for name, value in trainable_parameters(model).items()}
    for name, value in low.items():
        if "lora_A" in name:
            assert torch.equal(value, high[name][:4])
        else:
            assert not value.any()


def test_what_decays_is_what_decays_in_trainer(completion_file: Path, tmp_path: Path) -> None:
    """Neither the biases of adapters and of modules that are saved, nor norms, whether they are named so or not."""
    from transformers import Trainer, TrainingArguments

    changes = {
        "weight_decay": 0.5,
        "modules_to_save": ("ln_f", "c_fc"),
        "target_modules": ("c_proj",),
        "lora_bias": True,
    }
    tokenizer = make_tokenizer()
    runtime = runtime_of(make_model("gpt2", len(tokenizer)), tokenizer, completion_file, tmp_path / "cache", **changes)
    with fresh_adapter(runtime, ARM) as peft_model:
        named = trainable_parameters(peft_model)
        arguments = TrainingArguments(output_dir=str(tmp_path), weight_decay=0.5, use_cpu=True, report_to="none")
        theirs: Any = Trainer(peft_model, arguments).create_optimizer()
        ours = ArmOptimizer(runtime, named, ARM.learning_rate, [], lambda _: 1.0)._optimizer

        def decays(optimizer: Any) -> dict[str, float]:
            by_id = {id(value): group["weight_decay"] for group in optimizer.param_groups for value in group["params"]}
            return {name: by_id[id(value)] for name, value in named.items()}

        assert decays(ours) == decays(theirs)
        assert set(decays(ours).values()) == {0.0, 0.5}
