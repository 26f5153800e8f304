"""The adapted modules are those of `get_peft_model` under the same options, for every architecture, or the options are refused."""

from __future__ import annotations

import copy
import re
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer

from rightrank.evaluation.peft_models import suppress_peft_warnings
from rightrank.schema.errors import ModelError
from rightrank.schema.settings import PEFT_OPTIONS, PlanSettings, SelectSettings
from rightrank.schema.trials import Arm
from rightrank.training.targets import find_targets, make_lora_config, require_targets
from tests.tiny import GPT2_SIZES, build_small_settings, make_tokenizer
from tests.training.architectures import BERT, MODELS, make_model

ARM = Arm(rank=2, learning_rate=1e-2, lora_alpha=32.0, seed=0, steps=1)
EXPERTS = r"(?<=experts\.)(down_proj|gate_up_proj)(\.\d+)?|(?<=gate\.)weight"  # of a mixture
PLANNED = ("llama", "roberta", "gpt2")
WIDE = 12  # layers, so that PEFT shortens the names of `all-linear`


def architecture(name: str) -> Any:
    vocabulary = len(make_tokenizer())
    if name == "llama, deep":
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(vocab_size=vocabulary, **(MODELS["llama"][1] | {"num_hidden_layers": WIDE}))
        )
    if name == "roberta":  # its head has a linear layer inside
        return transformers.RobertaForSequenceClassification(transformers.RobertaConfig(vocab_size=vocabulary, **BERT))
    return make_model(name, vocabulary)


NAMES = (*MODELS, "llama, deep", "roberta")
CHECKED = ("llama", "gpt2", "mixtral", "bert")  # by `make check` too; all take half a minute


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=() if name in CHECKED else pytest.mark.trains) for name in NAMES],
)
def model(request: pytest.FixtureRequest) -> Any:
    return architecture(request.param).eval()


def is_classifier(model: Any) -> bool:
    return type(model).__name__.endswith("SequenceClassification")


def adapted(peft_model: Any) -> set[str]:
    base = peft_model.get_base_model()
    return {name for name, module in base.named_modules() if isinstance(module, LoraLayer)}


def by_peft(model: Any, **options: Any) -> set[str]:
    options = copy.deepcopy(options)  # PEFT adds to its lists
    task = TaskType.SEQ_CLS if is_classifier(model) else TaskType.CAUSAL_LM
    with suppress_peft_warnings():
        return adapted(get_peft_model(copy.deepcopy(model), LoraConfig(r=2, task_type=task, **options)))


def find_our_modules(model: Any, **options: Any) -> set[str]:
    """Return the modules that a training adapts, which are those in its `Targets`."""
    peft_options = {name: options.pop(name) for name in PEFT_OPTIONS if name in options}
    settings = build_small_settings(ranks=(1, 2), **options, peft_options=peft_options)
    targets = find_targets(model, settings, is_classifier(model))
    config = make_lora_config(settings, ARM, is_classifier(model), targets.names, targets.parameters)
    with suppress_peft_warnings():
        names = adapted(get_peft_model(copy.deepcopy(model), config))
    bare = {name.replace(".base_layer", "") for name in names}
    listed = {re.sub(EXPERTS, "", module.name).rstrip(".") for module in targets.modules}
    assert listed == bare
    return names


@cache
def find_linear_names(model: Any) -> frozenset[str]:
    """Return the modules that PEFT's `all-linear` adapts, without the parameters of fused experts."""
    names = by_peft(model, target_modules="all-linear")
    return frozenset(name for name in names if ".experts" not in name and name[-4:] != "gate")


def in_layer(name: str, layer: int) -> bool:
    return f".{layer}." in name


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_all_linear_in_a_layer_adapts_that_layer(model: Any) -> None:
    everywhere, layer = find_linear_names(model), 1
    assert find_our_modules(model) == everywhere
    names = find_our_modules(model, layers_to_transform=(layer,))
    assert names == {name for name in everywhere if in_layer(name, layer)}
    assert names < everywhere
    last = sorted({name.rpartition(".")[2] for name in everywhere})
    assert names == by_peft(model, target_modules=last, layers_to_transform=[layer])


def make_options(model: Any) -> dict[str, dict[str, Any]]:
    """Return options that select modules, by what they select, with names that the model has."""
    names = sorted(find_linear_names(model))
    ends = sorted({name.rpartition(".")[2] for name in names})
    layers = names[0].split(".")[[component.isdigit() for component in names[0].split(".")].index(True) - 1]
    head = "classifier" if is_classifier(model) else "lm_head"
    return {
        "ends": {"target_modules": ends[:2]},
        "whole names": {"target_modules": names[:3]},
        "an embedding": {"target_modules": [ends[0], model.get_input_embeddings_name()]},
        "a layer": {"target_modules": ends, "layers_to_transform": [1]},
        "a layer by its list": {"target_modules": ends, "layers_to_transform": [1], "layers_pattern": layers},
        "no such list": {"target_modules": ends, "layers_to_transform": [1], "layers_pattern": "nowhere"},
        "a pattern without a layer": {"target_modules": ends, "layers_pattern": layers},
        "without an end": {"target_modules": ends, "exclude_modules": ends[:1]},
        "without a whole name": {"target_modules": ends, "exclude_modules": names[:1]},
        "without all": {"target_modules": ends[:1], "exclude_modules": ends[:1]},
        "saved": {"target_modules": ends[1:], "modules_to_save": [ends[0]]},
        "saved head": {"target_modules": ends, "modules_to_save": [head]},
        "the head": {"target_modules": [ends[0], head]},
        "DoRA": {"target_modules": ends, "use_dora": True},
    }


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_options_adapt_what_peft_adapts(model: Any) -> None:
    model.get_input_embeddings_name = lambda: next(
        name for name, module in model.named_modules() if module is model.get_input_embeddings()
    ).rpartition(".")[2]
    for options in make_options(model).values():
        try:
            theirs = by_peft(model, **options)
        except (ValueError, TypeError):
            with pytest.raises(ModelError):
                find_our_modules(model, **options)
            continue
        assert find_our_modules(model, **options) == theirs
        if "layers_pattern" not in options and model.config.model_type in PLANNED:
            assert find_planned_modules(model, **options) == theirs


def find_planned_modules(model: Any, **options: Any) -> set[str]:
    """Return the modules that a plan counts."""
    from rightrank.planning.trace import build_skeleton

    labels = model.config.num_labels if is_classifier(model) else None
    settings = PlanSettings(ranks=(1, 2), num_labels=labels, **options)
    skeleton = build_skeleton(model.config, settings, 2)
    return {target.name for target in skeleton.targets}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("option", ["exclude_modules", "modules_to_save", "target_modules"])
def test_a_name_that_matches_nothing_is_refused(option: str) -> None:
    """Check a case that PEFT accepts."""
    with pytest.raises(ModelError, match="no module is named 'q_porj'"):
        find_our_modules(architecture("llama"), **{option: ["q_porj"]})


def test_a_convolution_is_refused() -> None:
    """Check a layer that PEFT adapts, and whose adapter has no truncation here."""
    config = transformers.GPT2Config(vocab_size=len(make_tokenizer()), **GPT2_SIZES)
    with pytest.raises(ModelError, match=r"^transformer.mix is a Conv1d, and .* leave it out with exclude_modules$"):
        find_our_modules(Convolved(config), target_modules=["c_attn", "mix"])


class Convolved(transformers.GPT2LMHeadModel):
    """A GPT-2 that also holds a convolution."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.transformer.mix = torch.nn.Conv1d(8, 8, 3)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_mixture_says_what_all_linear_leaves_out() -> None:
    mixture = architecture("mixtral")
    left_out = find_targets(mixture, build_small_settings(), False).left_out
    assert left_out == ("down_proj", "gate.weight", "gate_up_proj")
    all_modules = find_our_modules(mixture, target_parameters=left_out)
    assert {name.replace(".base_layer", "") for name in by_peft(mixture, target_modules="all-linear")} == {
        name.replace(".base_layer", "") for name in all_modules
    }
    assert find_targets(mixture, build_small_settings(target_parameters=left_out), False).left_out == ()


class Mixture(torch.nn.Module):
    """A model of two layers with fused experts."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Module() for _ in range(2))
        for layer in self.layers:
            layer.q_proj = torch.nn.Linear(8, 8)
            layer.fused = torch.nn.Module()
            layer.fused.down_proj = torch.nn.Parameter(torch.zeros(4, 8, 16))


def build_expert_settings(name: str, **changes: Any) -> SelectSettings:
    return build_small_settings(target_modules=["q_proj"], target_parameters=[name], **changes)


def test_a_parameter_that_matches_nothing_is_one_line() -> None:
    with pytest.raises(ModelError, match="no parameter is named 'fused") as raised:
        require_targets(Mixture(), build_expert_settings("fused.down"), False)
    assert "fused.down_proj" in str(raised.value)
    assert "\n" not in str(raised.value)
