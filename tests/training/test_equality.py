"""An arm equals a plain loop over `peft.get_peft_model`, also over a base in 4 or 8 bits, and PEFT loads its adapter with the same losses."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from rightrank.schema.trials import Arm
from rightrank.training.optimizer import ArmOptimizer
from rightrank.training.pace import find_multi_lora_obstacle
from rightrank.training.runtime import Runtime
from rightrank.training.targets import make_lora_config
from tests.adapters.adapters import make_base
from tests.adapters.kind_checks import copy_initial_values, train_plain_loop
from tests.helpers import attach_fresh_adapter, list_trainable_parameters, make_runtime, train_ours
from tests.tiny import build_small_settings, make_tokenizer
from tests.training.architectures import SIZES, make_model, make_model_runtime, run

ARM = Arm(rank=4, learning_rate=1e-2, lora_alpha=32.0, seed=3, steps=8)


def train_plainly(runtime: Any, arm: Arm, model_folder: Path) -> tuple[list[float], Any]:
    """Train a plain loop over the saved model in training mode."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    config = make_lora_config(runtime.settings, arm, False, runtime.targets.names)
    assert not config.use_rslora
    if runtime.settings.scaling == "alpha/sqrt(r)":  # PEFT's own name for it, which servers ignore
        config.use_rslora, config.lora_alpha = True, int(arm.lora_alpha)
    peft_model: Any = get_peft_model(model, config)
    peft_model.train()
    copy_initial_values(runtime, arm, peft_model)
    return train_plain_loop(runtime, arm, peft_model), peft_model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layers_to_transform": (2,)},  # two frozen layers below, computed once
        {"scaling": "alpha/sqrt(r)", "target_modules": ("q_proj", "down_proj"), "max_grad_norm": 0.02},
        {"gradient_checkpointing": True},
    ],
    ids=["all-linear", "prefix", "rslora", "checkpointing"],
)
def test_losses_agree_with_a_plain_peft_loop(
    model_folder: Path, completion_file: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    runtime = make_runtime(
        model_folder, completion_file, build_small_settings(checkpoint="last", **changes), tmp_path / "cache"
    )
    assert (runtime.evaluator.fast_paths.prefix is not None) == ("layers_to_transform" in changes)
    _, ours, adapter = train_ours(runtime, ARM, tmp_path)
    plain, peft_model = train_plainly(runtime, ARM, model_folder)
    assert ours == pytest.approx(plain, rel=1e-5, abs=1e-5)
    assert ours[-1] < ours[0]

    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    loaded: Any = PeftModel.from_pretrained(base, str(adapter)).eval()
    batch = runtime.evaluator.make_batch("test", range(4))
    with torch.no_grad():
        theirs = peft_model.eval()(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        reloaded = loaded(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    assert float((reloaded - theirs).norm() / theirs.norm()) < 1e-4


def test_loss_is_transformers_own(model_folder: Path, completion_file: Path, tmp_path: Path) -> None:
    runtime = make_runtime(model_folder, completion_file, build_small_settings(checkpoint="last"), tmp_path)
    batch = runtime.evaluator.make_batch("validation", range(6))
    with torch.no_grad():
        theirs = runtime.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
        ours = runtime.evaluator.compute_losses("validation", batch, 1.0)
    assert float(ours.example_losses.sum() / ours.example_tokens.sum()) == pytest.approx(float(theirs), rel=1e-5)
    assert int(ours.example_tokens.sum()) == int((batch.labels[:, 1:] != -100).sum())


@pytest.mark.filterwarnings("ignore:`lora_bias=True`")  # PEFT's remark that it can't be merged
@pytest.mark.parametrize("peft_options", [{}, {"lora_bias": True}], ids=str)
def test_initial_a_is_nested(
    peft_options: dict[str, bool], model_folder: Path, completion_file: Path, tmp_path: Path
) -> None:
    folder = model_folder
    if peft_options:  # PEFT asks for a base with biases
        folder = make_base(tmp_path / "base", "conv1d")
        make_tokenizer().save_pretrained(folder)
    runtime = make_runtime(
        folder, completion_file, build_small_settings(checkpoint="last", peft_options=peft_options), tmp_path
    )
    with attach_fresh_adapter(runtime, ARM.model_copy(update={"rank": 8})) as model:
        high = {name: value.detach().clone() for name, value in list_trainable_parameters(model).items()}
    with attach_fresh_adapter(runtime, ARM) as model:
        low = {name: value.detach().clone() for name, value in list_trainable_parameters(model).items()}
    for name, value in low.items():
        if "lora_A" in name:
            assert torch.equal(value, high[name][:4])
        else:
            assert not value.any()


def test_what_decays_is_what_decays_in_trainer(completion_file: Path, tmp_path: Path) -> None:
    """Check that neither biases of adapters and of saved modules decay, nor norms, whatever their names."""

    changes = {
        "weight_decay": 0.5,
        "modules_to_save": ("ln_f", "c_fc"),
        "target_modules": ("c_proj",),
        "peft_options": {"lora_bias": True},
    }
    tokenizer = make_tokenizer()
    runtime = make_model_runtime(
        make_model("gpt2", len(tokenizer)), tokenizer, completion_file, tmp_path / "cache", **changes
    )
    with attach_fresh_adapter(runtime, ARM) as peft_model:
        named = list_trainable_parameters(peft_model)
        arguments = TrainingArguments(output_dir=str(tmp_path), weight_decay=0.5, use_cpu=True, report_to="none")
        theirs: Any = Trainer(peft_model, arguments).create_optimizer()
        ours = ArmOptimizer(runtime, named, ARM.learning_rate, [], lambda _: 1.0)._optimizer

        def decays(optimizer: Any) -> dict[str, float]:
            by_id = {id(value): group["weight_decay"] for group in optimizer.param_groups for value in group["params"]}
            return {name: by_id[id(value)] for name, value in named.items()}

        assert decays(ours) == decays(theirs)
        assert set(decays(ours).values()) == {0.0, 0.5}


def make_quantised_runtime(completion_file: Path, folder: Path, bits: int, **changes: Any) -> Runtime:
    tokenizer = make_tokenizer()
    sizes = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}  # blocks of 64 weights share a scale
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **(SIZES | sizes))).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    settings = build_small_settings(checkpoint="last", **{f"load_in_{bits}bit": True, "max_steps": 4, **changes})
    return make_runtime(folder / "model", completion_file, settings, folder / "cache")


QUANTISED_ARMS = [
    Arm(rank=rank, learning_rate=1e-2, lora_alpha=32.0, seed=seed, steps=4) for rank, seed in ((2, 0), (4, 1))
]


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs the extra bnb")
def test_arms_over_four_bits_in_one_pass_equal_each_alone(completion_file: Path, tmp_path: Path) -> None:
    runtime = make_quantised_runtime(completion_file, tmp_path, 4)
    assert type(runtime.model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert find_multi_lora_obstacle(runtime, QUANTISED_ARMS) is None
    alone, shared_trials = (
        run(runtime, QUANTISED_ARMS, tmp_path / "alone", 1),
        run(runtime, QUANTISED_ARMS, tmp_path / "together", 2),
    )
    assert alone[0].train_losses == pytest.approx(train_plain_loop(runtime, QUANTISED_ARMS[0]), rel=1e-4)
    for trial, reference in zip(shared_trials, alone, strict=True):
        assert trial.adapters_per_pass == 2
        assert trial.train_losses == pytest.approx(reference.train_losses, rel=1e-5)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs the extra bnb")
def test_eight_bits_train_alone_as_plain_peft(completion_file: Path, tmp_path: Path) -> None:
    """Check that 8-bit bases train one arm per pass.

    LLM.int8 searches outliers over all rows of a batch, so another arm's rows would change an arm's output.
    """
    runtime = make_quantised_runtime(completion_file, tmp_path, 8)
    assert type(runtime.model.model.layers[0].mlp.up_proj).__name__ == "Linear8bitLt"
    assert find_multi_lora_obstacle(runtime, QUANTISED_ARMS) == "this model's losses differ when two arms share a pass"
    (alone,) = run(runtime, QUANTISED_ARMS[:1], tmp_path / "alone", 1)
    assert alone.train_losses == pytest.approx(train_plain_loop(runtime, QUANTISED_ARMS[0]), rel=1e-3)
    assert len(set(alone.train_losses)) == 4


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs the extra bnb")
def test_dora_over_four_bits_is_pefts(completion_file: Path, tmp_path: Path) -> None:
    runtime = make_quantised_runtime(completion_file, tmp_path, 4, use_dora=True)
    (alone,) = run(runtime, QUANTISED_ARMS[:1], tmp_path / "alone", 1)
    assert alone.train_losses == pytest.approx(train_plain_loop(runtime, QUANTISED_ARMS[0]), rel=1e-4)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs the extra bnb")
@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_trained_whole_keeps_its_bits(class_file: Path, tmp_path: Path, bits: int) -> None:
    """Check an encoder's head, whose last parameter is a bias and which is no output embedding, and a module in modules_to_save."""
    tokenizer = make_tokenizer()
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    settings = build_small_settings(
        checkpoint="last", **{f"load_in_{bits}bit": True, "modules_to_save": ("pooler.dense",), "max_steps": 4}
    )
    runtime = make_runtime(tmp_path / "model", class_file, settings, tmp_path / "cache")
    assert type(runtime.model.classifier) is type(runtime.model.bert.pooler.dense) is torch.nn.Linear
    assert type(runtime.model.bert.encoder.layer[0].output.dense) is not torch.nn.Linear
    assert len(run(runtime, QUANTISED_ARMS[:1], tmp_path / "alone", 1)[0].train_losses) == 4
