"""Does our output parse with a consumer's own code? Run by a Python that has the consumer installed:

    python benchmarks/consumers/check.py CONSUMER EXPORT_FOLDER

It needs nothing of rightrank. Prints one JSON object: the consumer, its version, whose code looked at what, and the
rank and alpha that it understood. It fails where that code refuses the file or understands another rank.
"""

from __future__ import annotations

import ast
import json
import os
import shlex
import sys
from importlib.machinery import ModuleSpec
from importlib.metadata import distribution, version
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml


def words_of(script: Path) -> list[str]:
    return shlex.split(script.read_text(encoding="utf-8").splitlines()[1])[1:]  # after `exec`


def check_peft(folder: Path) -> dict[str, Any]:
    """Loads base and adapter, and builds an adapter like it from our LoraConfig code: the same shapes."""
    from peft import AutoPeftModelForCausalLM, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoPeftModelForCausalLM.from_pretrained(str(folder))
    names: dict[str, Any] = {}
    exec((folder / "lora_config.py").read_text(encoding="utf-8"), names)  # our own file
    base = AutoModelForCausalLM.from_pretrained(model.peft_config["default"].base_model_name_or_path)
    again = get_peft_model(base, names["lora_config"])
    shapes = [
        {name: tuple(value.shape) for name, value in one.state_dict().items() if "lora_" in name}
        for one in (model, again)
    ]
    assert shapes[0], "no adapter"
    assert shapes[0] == shapes[1], "the LoraConfig makes another adapter"
    config = model.peft_config["default"]
    return {"by": "AutoPeftModel.from_pretrained, get_peft_model", "rank": config.r, "alpha": config.lora_alpha}


def check_trl(folder: Path) -> dict[str, Any]:
    """TRL's own parser for `trl sft` or `trl dpo`, then its LoraConfig put on the base."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser, get_peft_config
    from trl.scripts.utils import DatasetMixtureConfig

    (file,) = folder.glob("trl_*.yaml")
    kind = DPOConfig if file.stem == "trl_dpo" else SFTConfig
    parser = TrlParser((ScriptArguments, kind, ModelConfig, DatasetMixtureConfig))
    _, training, model, mixture = parser.parse_args_and_config(["--config", str(file), "--use_cpu", "true"])
    assert mixture.datasets[0].data_files, "the data set was not understood"
    config = get_peft_config(model)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model.model_name_or_path), config)
    modules = sum("lora_A" in name for name in adapted.state_dict())
    values = {"rate": training.learning_rate, "steps": training.max_steps, "modules": modules}
    return {"by": "TrlParser, get_peft_config, get_peft_model", "rank": config.r, "alpha": config.lora_alpha, **values}


def check_axolotl(folder: Path) -> dict[str, Any]:
    """axolotl's pydantic schema of a config file."""
    from axolotl.utils.schemas.config import AxolotlInputConfig

    given = yaml.safe_load((folder / "axolotl.yaml").read_text(encoding="utf-8"))
    config = AxolotlInputConfig(**given)
    unknown = set(given) - set(AxolotlInputConfig.model_fields)
    assert not unknown, f"fields that axolotl does not know: {unknown}"
    return {"by": "AxolotlInputConfig", "rank": config.lora_r, "alpha": config.lora_alpha}


def check_llamafactory(folder: Path) -> dict[str, Any]:
    """LLaMA-Factory's own argument classes, and its reader of dataset_info.json."""
    os.environ["DISABLE_VERSION_CHECK"] = (
        "1"  # its pins are older than the transformers here; its classes load all the same
    )
    from llamafactory.hparams.data_args import DataArguments
    from llamafactory.hparams.finetuning_args import FinetuningArguments
    from llamafactory.hparams.generating_args import GeneratingArguments
    from llamafactory.hparams.model_args import ModelArguments
    from llamafactory.hparams.training_args import TrainingArguments
    from transformers import HfArgumentParser

    given = yaml.safe_load((folder / "llamafactory.yaml").read_text(encoding="utf-8")) | {"use_cpu": True}
    kinds = (ModelArguments, DataArguments, TrainingArguments, FinetuningArguments, GeneratingArguments)
    _, data, training, tuning, _ = HfArgumentParser(kinds).parse_dict(given)
    if find_spec("torchaudio") is None:  # imported for audio alone, and has no build for every torch
        sys.modules["torchaudio"] = ModuleType("torchaudio")
        sys.modules["torchaudio"].__spec__ = ModuleSpec("torchaudio", None)
    from llamafactory.data.parser import get_dataset_list

    found = get_dataset_list(data.dataset, str(folder))
    assert found[0].prompt or found[0].messages, "the data set's columns were not understood"
    reader = f"get_dataset_list{'' if find_spec('torchaudio').loader else ' (with an empty torchaudio)'}"
    values = {"rate": training.learning_rate, "modules": len(tuning.lora_target)}
    by = f"HfArgumentParser over its five argument classes, {reader}"
    return {"by": by, "rank": tuning.lora_rank, "alpha": tuning.lora_alpha, **values}


def check_unsloth(folder: Path) -> dict[str, Any]:
    """Unsloth imports only where there is a GPU: our call's names against the signature in its source."""
    code = ast.parse((folder / "unsloth_lora.py").read_text(encoding="utf-8"))
    calls = {
        node.func.attr: {word.arg: ast.unparse(word.value) for word in node.keywords}
        for node in ast.walk(code)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    }
    sources = {name: _signature("unsloth", "unsloth/models/llama.py", name) for name in calls}
    for name, given in calls.items():
        assert set(given) <= sources[name], f"{name} has no {set(given) - sources[name]}"
    given = calls["get_peft_model"]
    return {"by": "source only: names in signatures", "rank": int(given["r"]), "alpha": float(given["lora_alpha"])}


def check_sglang(folder: Path) -> dict[str, Any]:
    """SGLang imports only where there is a GPU: our options against its server arguments by source, and the shapes that its slots assert."""
    words = words_of(folder / "sglang.sh")
    given = {word.removeprefix("--").replace("-", "_") for word in words if word.startswith("--")}
    unknown = given - _fields("sglang", "sglang/srt/")
    assert not unknown, f"SGLang has no {unknown}"
    values = dict(pairwise(words))
    config = require_one_rank(Path(values["--lora-paths"].split("=", 1)[1]))
    by = "source only: names of fields; every A has r rows, every B r columns"
    return {"by": by, "rank": int(values["--max-lora-rank"]), "alpha": config["lora_alpha"]}


def require_one_rank(adapter: Path) -> dict[str, Any]:
    """The configuration of an adapter that servers load: one rank and one scale for all modules."""
    from safetensors import safe_open

    config: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert not config.get("rank_pattern"), "modules differ in rank"
    assert not config.get("alpha_pattern"), "modules differ in alpha"
    with safe_open(adapter / "adapter_model.safetensors", framework="np") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            shape = file.get_slice(name).get_shape()
            assert shape["lora_A" not in name] == config["r"], f"{name} has the shape {shape}"
    return config


def check_vllm(folder: Path) -> dict[str, Any]:
    """vLLM's own reading of an adapter and its test against the `--max-lora-rank` of our line; options by source."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora.peft_helper import PEFTHelper

    words = words_of(folder / "vllm.sh")
    values = dict(pairwise(words))
    given = {word.removeprefix("--").replace("-", "_") for word in words if word.startswith("--")}
    unknown = given - _fields("vllm", "vllm/engine/") - _fields("vllm", "vllm/entrypoints/")
    assert not unknown, f"vLLM has no {unknown}"
    adapter = values["--lora-modules"].split("=", 1)[1]
    helper = PEFTHelper.from_local_dir(adapter, None)
    helper.validate_legal(LoRAConfig(max_lora_rank=int(values["--max-lora-rank"])))
    require_one_rank(Path(adapter))
    by = "PEFTHelper.from_local_dir, validate_legal against LoRAConfig; options by source"
    return {"by": by, "rank": helper.r, "alpha": helper.lora_alpha, "scaling": helper.vllm_lora_scaling_factor}


def _signature(package: str, file: str, function: str) -> set[str]:
    tree = ast.parse(_source(package, file))
    return {
        argument.arg
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == function
        for argument in [*node.args.args, *node.args.kwonlyargs]
    }


def _fields(package: str, prefix: str) -> set[str]:
    """All annotated names of classes in the package's files."""
    files = [
        path for path in distribution(package).files or [] if str(path).startswith(prefix) and path.suffix == ".py"
    ]
    return {
        node.target.id
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def _source(package: str, file: str) -> str:
    path = next(path for path in distribution(package).files or [] if str(path) == file)
    return path.read_text()


CHECKS = {
    "peft": check_peft,
    "trl": check_trl,
    "axolotl": check_axolotl,
    "llamafactory": check_llamafactory,
    "unsloth": check_unsloth,
    "vllm": check_vllm,
    "sglang": check_sglang,
}

if __name__ == "__main__":
    consumer, folder = sys.argv[1], Path(sys.argv[2])
    found = CHECKS[consumer](folder)
    print(json.dumps({"consumer": consumer, "version": version(consumer), **found}))
