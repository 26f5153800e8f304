"""Check that a consumer's own code parses our exports. Run it with a Python that has the consumer installed:

    python benchmarks/consumers/check.py CONSUMER EXPORT_FOLDER

It does not import rightrank. It prints a JSON object: the consumer, its version, which code read what, and the
rank and alpha that it read. It fails if that code refuses the file or reads another rank.
"""

from __future__ import annotations

import ast
import json
import shlex
import sys
from importlib.metadata import distribution, version
from itertools import pairwise
from pathlib import Path
from typing import Any


def read_words(script: Path) -> list[str]:
    return shlex.split(script.read_text(encoding="utf-8").splitlines()[1])[1:]  # after `exec`


def check_sglang(folder: Path) -> dict[str, Any]:
    """Compare our options with SGLang's server arguments in its source, which imports only with a GPU, and the shapes that its slots assert."""
    words = read_words(folder / "sglang.sh")
    options = {word.removeprefix("--").replace("-", "_") for word in words if word.startswith("--")}
    unknown = options - _read_fields("sglang", "sglang/srt/")
    assert not unknown, f"SGLang has no {unknown}"
    values = dict(pairwise(words))
    config = require_one_rank(Path(values["--lora-paths"].split("=", 1)[1]))
    by = "source only: names of fields; every A has r rows, every B r columns"
    return {"by": by, "rank": int(values["--max-lora-rank"]), "alpha": config["lora_alpha"]}


def require_one_rank(adapter: Path) -> dict[str, Any]:
    """Return the adapter's configuration. Raise unless all modules have the same rank and scale, as servers require."""
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
    """Read an adapter with vLLM's code and test it against our `--max-lora-rank`; compare the options with its source."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora.peft_helper import PEFTHelper

    words = read_words(folder / "vllm.sh")
    values = dict(pairwise(words))
    options = {word.removeprefix("--").replace("-", "_") for word in words if word.startswith("--")}
    unknown = options - _read_fields("vllm", "vllm/engine/") - _read_fields("vllm", "vllm/entrypoints/")
    assert not unknown, f"vLLM has no {unknown}"
    adapter = values["--lora-modules"].split("=", 1)[1]
    helper = PEFTHelper.from_local_dir(adapter, None)
    helper.validate_legal(LoRAConfig(max_lora_rank=int(values["--max-lora-rank"])))
    require_one_rank(Path(adapter))
    by = "PEFTHelper.from_local_dir, validate_legal against LoRAConfig; options by source"
    return {"by": by, "rank": helper.r, "alpha": helper.lora_alpha, "scaling": helper.vllm_lora_scaling_factor}


def _read_fields(package: str, prefix: str) -> set[str]:
    """Return all annotated names of classes in the package's files."""
    files = [
        path for path in distribution(package).files or [] if str(path).startswith(prefix) and path.suffix == ".py"
    ]
    return {
        node.target.id
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


CHECKS = {"vllm": check_vllm, "sglang": check_sglang}

if __name__ == "__main__":
    consumer, folder = sys.argv[1], Path(sys.argv[2])
    result = CHECKS[consumer](folder)
    print(json.dumps({"consumer": consumer, "version": version(consumer), **result}))
    print(f"rank {result['rank']}, alpha {result['alpha']}")
