"""Test exports and printed commands: read back, they give the training's settings, or a note lists the missing ones."""

from __future__ import annotations

import ast
import math
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given
from hypothesis import settings as checks
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from transformers import TrainingArguments

from rightrank import export
from rightrank.adapters.rank_math import convert_scaling
from rightrank.api.folders import status
from rightrank.cli import cli
from rightrank.cli.options import gather_settings
from rightrank.decision.adapter import Provenance
from rightrank.exports.exports import SERVERS, TARGETS
from rightrank.exports.recipe import EVALUATION_SETTINGS, Recipe
from rightrank.schema.command import build_reproduce_command
from rightrank.schema.configs import convert_configs
from rightrank.schema.errors import RunError
from rightrank.schema.setting_table import Group
from rightrank.schema.settings import PEFT_OPTIONS, SelectSettings

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MODULES = tuple(
    f"model.layers.{layer}.{'self_attn' if name in LINEAR[:4] else 'mlp'}.{name}"
    for layer in range(3)
    for name in LINEAR
)
TRAINERS = [name for name in TARGETS if name not in SERVERS]
SHARES = st.floats(0.01, 0.9)

# Of every setting that shapes an adapter or its training, and of how the base is read.
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "lora_dropout": SHARES,
    "target_modules": st.sets(st.sampled_from(LINEAR), min_size=2).map(lambda names: tuple(sorted(names))),
    "layers_to_transform": st.sets(st.integers(0, 2), min_size=1).map(lambda layers: tuple(sorted(layers))),
    "exclude_modules": st.sampled_from([("o_proj",), ("model.layers.0.mlp.up_proj",)]),
    "modules_to_save": st.just(("lm_head",)),
    "use_dora": st.booleans(),
    "target_parameters": st.just(("mlp.experts.down_proj",)),
    "peft_options": st.sampled_from([{"lora_bias": True}, {"fan_in_fan_out": True}]),
    "gradient_accumulation_steps": st.integers(2, 9),
    "lr_scheduler_type": st.sampled_from(["constant", "cosine"]),
    "warmup_ratio": SHARES,
    "weight_decay": SHARES,
    "max_grad_norm": SHARES,
    "adam_beta2": SHARES,
    "lora_alpha": st.one_of(st.integers(1, 99).map(float), SHARES),
    "scaling": st.sampled_from(["alpha/sqrt(r)", "constant"]),
    "init_lora_weights": st.just("gaussian"),
    "max_steps": st.integers(10, 99),
    "num_train_epochs": st.nothing(),  # a run's recipe has its steps
    "batch_size": st.integers(2, 9),
    "seq_len": st.integers(2, 999),
    "beta": SHARES,
    "dtype": st.sampled_from(["float32", "bfloat16", "float16"]),
    "load_in_4bit": st.booleans(),
    "load_in_8bit": st.booleans(),
    "trust_remote_code": st.booleans(),
}
FORMS = ("text", "prompt_completion", "messages", "preference")


def test_every_setting_of_a_training_is_checked() -> None:
    shaping = (Group.ADAPTER, Group.TRAINING)
    assert {name for name, row in SelectSettings.model_fields.items() if row.group in shaping} <= VALUES.keys()


def draw_settings() -> st.SearchStrategy[dict[str, Any]]:
    optional = {name: values for name, values in VALUES.items() if name != "num_train_epochs"}
    return st.fixed_dictionaries({}, optional=optional).filter(
        lambda values: not (values.get("load_in_4bit") and values.get("load_in_8bit")) and find_adapted_modules(values)
    )


def find_adapted_modules(values: dict[str, Any]) -> set[str]:
    """Return the modules that PEFT adapts."""
    config = LoraConfig(
        target_modules=list(values.get("target_modules", LINEAR)),
        layers_to_transform=list(values["layers_to_transform"]) if "layers_to_transform" in values else None,
        exclude_modules=list(values.get("exclude_modules", ())) or None,
    )
    return {name for name in MODULES if check_target_module_exists(config, name)}


def make_recipe(values: dict[str, Any], form: str) -> Recipe:
    settings = SelectSettings(**{"dtype": "float32", "max_steps": 50} | values)
    alpha, use_rslora = convert_scaling(settings.scaling, settings.lora_alpha, 8)
    return Recipe(
        model="model", data="data.jsonl", form=form, adapter=Path("adapter"), r=8, lora_alpha=alpha,
        target_modules=values.get("target_modules", LINEAR), target_parameters=settings.target_parameters,
        module_names=tuple(sorted(find_adapted_modules(values))), learning_rate=0.003, max_steps=settings.max_steps or 0,
        warmup_steps=math.ceil(settings.warmup_ratio * (settings.max_steps or 0)), seed=7, settings=settings,
        provenance=Provenance(8, 8, 0.003, 50, None, None), trained_alpha=alpha, use_rslora=use_rslora,
        lora_dropout=settings.lora_dropout, layers_to_transform=settings.layers_to_transform,
        modules_to_save=settings.modules_to_save, use_dora=settings.use_dora, exclude_modules=settings.exclude_modules,
        init_lora_weights=True if settings.init_lora_weights == "default" else settings.init_lora_weights,
    )  # fmt: skip


def read_literals(call: ast.Call) -> dict[str, Any]:
    return {
        keyword.arg or "": ast.literal_eval(keyword.value)
        for keyword in call.keywords
        if not isinstance(keyword.value, ast.Attribute)
    }


def read_python(text: str) -> dict[str, Any]:
    """Return all keywords of calls and all assignments in a code snippet."""
    assignments: dict[str, Any] = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            assignments |= read_literals(node)
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.targets[0], ast.Name)
        ):
            assignments[node.targets[0].id] = node.value.value
    return assignments


# A target's word for a setting, where it is not transformers' or PEFT's own.
WORDS: dict[str, dict[str, str]] = {
    "peft": {},
    "trl": {
        "r": "lora_r", "target_modules": "lora_target_modules", "modules_to_save": "lora_modules_to_save",
        "target_parameters": "lora_target_parameters",
    },
    "axolotl": {
        "r": "lora_r", "target_modules": "lora_target_modules", "layers_to_transform": "peft_layers_to_transform",
        "use_rslora": "peft_use_rslora", "modules_to_save": "lora_modules_to_save", "use_dora": "peft_use_dora",
        "target_parameters": "lora_target_parameters", "init_lora_weights": "peft_init_lora_weights",
        "per_device_train_batch_size": "micro_batch_size", "lr_scheduler_type": "lr_scheduler", "max_length": "sequence_len",
        "beta": "rl_beta",
    },
    "llamafactory": {
        "r": "lora_rank", "target_modules": "lora_target", "modules_to_save": "additional_target", "max_length": "cutoff_len",
        "beta": "pref_beta",
    },
    "unsloth": {},
}  # fmt: skip
READERS: dict[str, Callable[[dict[str, str]], dict[str, Any]]] = {
    "peft": lambda files: read_python(files["lora_config.py"]),
    "trl": lambda files: yaml.safe_load(next(iter(files.values()))),
    "axolotl": lambda files: yaml.safe_load(files["axolotl.yaml"]),
    "llamafactory": lambda files: yaml.safe_load(files["llamafactory.yaml"]),
    "unsloth": lambda files: read_python(files["unsloth_lora.py"]),
}


def expect_settings(recipe: Recipe) -> dict[str, Any]:
    """Return the training's settings in the names of transformers and PEFT; values are empty if they are the default."""
    settings = recipe.settings
    same = (
        "gradient_accumulation_steps",
        "lr_scheduler_type",
        "weight_decay",
        "max_grad_norm",
        "adam_beta2",
    )
    same += ("load_in_4bit", "load_in_8bit", "trust_remote_code", "lora_dropout", "use_dora")
    return {name: getattr(settings, name) for name in same} | {
        "r": 8, "lora_alpha": recipe.lora_alpha, "use_rslora": recipe.use_rslora, "learning_rate": 0.003, "seed": 7,
        "max_steps": recipe.max_steps, "warmup_steps": recipe.warmup_steps, "max_length": settings.seq_len,
        "per_device_train_batch_size": settings.batch_size, "bf16": settings.dtype == "bfloat16",
        "fp16": settings.dtype == "float16", "beta": settings.beta if recipe.form == "preference" else None,
        "init_lora_weights": None if settings.init_lora_weights == "default" else settings.init_lora_weights,
        "modules_to_save": list(settings.modules_to_save), "target_parameters": list(settings.target_parameters),
        **{name: settings.peft_options.get(name) for name in PEFT_OPTIONS},
    }  # fmt: skip


def convert_to_list(value: Any) -> list[Any]:
    return value.split(",") if isinstance(value, str) else list(value or ())


@pytest.mark.parametrize("target", TRAINERS)
@pytest.mark.parametrize("form", FORMS)
@given(values=draw_settings())
@checks(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
def test_an_export_read_back_gives_the_settings(target: str, form: str, values: dict[str, Any]) -> None:
    recipe = make_recipe(values, form)
    written = TARGETS[target](recipe)
    read, words, notes = READERS[target](written.files), WORDS[target], " ".join(written.notes)
    if "quantization_bit" in read:
        read |= {f"load_in_{read['quantization_bit']}bit": True}
    for name, value in expect_settings(recipe).items():
        exported_value = read.get(words.get(name, name))
        exported_value = None if name == "init_lora_weights" and exported_value is True else exported_value
        if isinstance(value, list):
            exported_value = convert_to_list(exported_value)
        assert (exported_value or None) == (value or None) or name in notes, (name, exported_value, value)
    exported_targets = {"target_modules": convert_to_list(read[words.get("target_modules", "target_modules")])}
    for name in ("layers_to_transform", "exclude_modules"):
        if layers := read.get(words.get(name, name)):
            exported_targets[name] = layers
    assert find_adapted_modules(exported_targets) == set(recipe.module_names) or "exclude_modules" in notes


def test_a_conversation_trains_the_assistant_s_turns_alone() -> None:
    (text,) = TARGETS["trl"](make_recipe({}, "messages")).files.values()
    assert yaml.safe_load(text)["assistant_only_loss"] is True
    (text,) = TARGETS["trl"](make_recipe({}, "prompt_completion")).files.values()
    assert yaml.safe_load(text)["completion_only_loss"] is True
    (text,) = TARGETS["trl"](make_recipe({}, "text")).files.values()
    assert not {"assistant_only_loss", "completion_only_loss"} & yaml.safe_load(text).keys()


def parse_command(command: str) -> dict[str, Any]:
    """Parse a command with the command line, and return its values by parameter name."""
    words = shlex.split(command)
    assert words[0] == "rightrank"
    verb = cli.commands[words[1]]
    return dict(verb.make_context(words[1], words[2:]).params)


@given(values=draw_settings())
@checks(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
def test_the_command_that_makes_a_smaller_adapter_again_has_the_settings(values: dict[str, Any]) -> None:
    recipe = make_recipe(values | {"margin": 0.25, "validation_fraction": 0.2, "columns": ("prompt=ask",)}, "text")
    making = Provenance(2, 8, 0.003, 50, None, "K-FAC")
    comment = replace(recipe, provenance=making).format_rebuild_comments()[-1]
    read = parse_command(comment.partition("then: ")[2])
    settings = gather_settings(None, read["assignments"], {})
    parsed_settings, expected_settings = SelectSettings(**settings), recipe.settings
    assert {name: getattr(parsed_settings, name) for name in EVALUATION_SETTINGS} == {
        name: getattr(expected_settings, name) for name in EVALUATION_SETTINGS
    }


@pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA with rank_pattern")
@given(values=draw_settings(), epochs=st.booleans())
@checks(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
def test_the_command_that_proves_an_estimate_has_the_settings_of_the_training(
    values: dict[str, Any], epochs: bool
) -> None:
    """Compare with PEFT's configuration and transformers' arguments; a note lists settings that they lack."""
    recipe = make_recipe(values, "text")
    expected_settings = expect_settings(recipe)
    names = (
        "gradient_accumulation_steps",
        "lr_scheduler_type",
        "weight_decay",
        "max_grad_norm",
        "adam_beta2",
    )
    arguments = TrainingArguments(
        output_dir="out", use_cpu=True, learning_rate=0.003, max_steps=50, warmup_steps=0.1, seed=7, optim="adamw_torch",
        per_device_train_batch_size=expected_settings["per_device_train_batch_size"], **{name: expected_settings[name] for name in names},
    )  # fmt: skip
    config = LoraConfig(
        r=8, lora_alpha=recipe.lora_alpha, lora_dropout=recipe.lora_dropout, use_rslora=recipe.use_rslora,  # type: ignore[arg-type]
        target_modules=list(recipe.target_modules), modules_to_save=list(recipe.modules_to_save) or None,
        layers_to_transform=list(recipe.layers_to_transform or ()) or None, exclude_modules=list(recipe.exclude_modules) or None,
        use_dora=recipe.use_dora, init_lora_weights=recipe.init_lora_weights, loftq_config={}, rank_pattern={"q_proj": 2},
    )  # fmt: skip
    settings, unstated = convert_configs(config, arguments, seq_len=recipe.settings.seq_len)
    command = build_reproduce_command("model", "data.jsonl", SelectSettings.from_stored(settings))
    assert command is not None
    assert unstated == ["rank_pattern={'q_proj': 2}"]
    read = SelectSettings(**{**_select_settings(parse_command(command))})
    same = (
        "lora_dropout",
        "target_modules",
        "layers_to_transform",
        "exclude_modules",
        "modules_to_save",
        "use_dora",
        "seq_len",
    )
    for name in (*same, *names, "init_lora_weights", "batch_size"):
        expected = recipe.target_modules if name == "target_modules" else getattr(recipe.settings, name)
        assert (
            sorted(getattr(read, name) or ()) == sorted(expected or ())
            if isinstance(expected, tuple)
            else (getattr(read, name) == expected)
        ), name
    assert (read.lora_alpha, read.learning_rates, read.max_steps, read.seeds) == (recipe.lora_alpha, (0.003,), 50, (7,))
    assert (read.scaling, read.warmup_ratio) == ("alpha/sqrt(r)" if recipe.use_rslora else "alpha/r", 0.1)


def _select_settings(parameters: dict[str, Any]) -> dict[str, Any]:
    settings = {name: value for name, value in parameters.items() if name in SelectSettings.model_fields}
    return gather_settings(None, parameters["assignments"], settings)


def test_an_export_with_own_files_is_moved_aside_and_not_replaced(small_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(small_run, tmp_path, dirs_exist_ok=True)
    first = export(run, "trl")
    assert export(run, "trl") == first
    assert not (run / "earlier-1").exists()  # one with nothing of one's own is replaced
    (first.folder / "outputs").mkdir()
    (first.folder / "outputs" / "weights.bin").write_text("mine")
    again = export(run, "trl")
    assert again.files == first.files
    assert "contained files that this one does not write (outputs)" in again.notes[-1]
    assert (run / "earlier-1" / "trl" / "outputs" / "weights.bin").read_text() == "mine"
    assert status(run).state == "done"


def test_an_export_that_fails_leaves_the_earlier_one(
    small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(small_run, tmp_path, dirs_exist_ok=True)
    first = export(tmp_path / "run", "trl")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rightrank.exports.exports.write_export", full)
    with pytest.raises(RunError, match="make room"):
        export(tmp_path / "run", "trl")
    assert sorted(path.name for path in first.folder.iterdir()) == first.files
    assert not (tmp_path / "run" / "earlier-1").exists()
