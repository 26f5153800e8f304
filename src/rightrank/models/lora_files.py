"""LoRA files of other tools as PEFT's configuration and keys: one safetensors file of kohya, a folder of mlx-lm.

| tool | keys of a module `model.layers.0.self_attn.q_proj` | scale |
|---|---|---|
| kohya (sd-scripts, ComfyUI) | `lora_te_model_layers_0_self_attn_q_proj.lora_down.weight`, `….lora_up.weight` | `….alpha` over the rank |
| mlx-lm (`adapters.safetensors`) | `model.layers.0.self_attn.q_proj.lora_a` [in, r], `….lora_b` [r, out] | `lora_parameters.scale` |

kohya's names have underscores for dots, so that they name a module of a known model only. mlx-lm has one rank and one scale for all modules.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rightrank.data.files import UnreadableError, read_json_object, replacing, replacing_folder, require_absent
from rightrank.models.places import CONFIG_FILE
from rightrank.models.ranks import exact_pattern
from rightrank.models.weights import read_header
from rightrank.schema.errors import ModelError, RunFolderError

RANK = "ss_network_dim"  # of kohya, in the header
MLX_FILE = "adapters.safetensors"
PREFIX = "base_model.model."  # of PEFT's keys
FACTOR = re.compile(
    r"^(?P<module>.+)\.(?:lora_(?P<embedding>embedding_)?(?P<side>[AB])(?P<weight>\.weight)?"
    r"|lora[._](?P<name>down|up)\.weight)$"
)


def is_a(match: re.Match[str]) -> bool:
    """Whether a match of `FACTOR` is a module's A, and not its B."""
    return match["side"] == "A" or match["name"] == "down"


def config_of_file(path: Path) -> dict[str, Any]:
    """PEFT's configuration of a LoRA file of kohya: ranks from the shapes, alphas from `.alpha` tensors.

    Raises:
        ModelError: no LoRA factors, or a kind of file that can't be read.
    """
    shapes, _ = read_header(path)
    ranks = {}
    for key, shape in shapes.items():
        match = FACTOR.match(key)
        if match is not None and is_a(match) and shape:
            ranks[match["module"]] = int(shape[0])
    foreign = next(
        (key for key in shapes if key.endswith((".dora_scale", ".hada_w1_a", ".lokr_w1", ".lora_mid.weight"))), None
    )
    if not ranks or foreign is not None:
        reason = f"it holds {foreign}" if foreign else "no keys of kohya (lora_down, lora_up)"
        raise ModelError(f"{path}: not a LoRA file of kohya that can be read: {reason}")
    with safe_open(path, framework="pt") as file:  # a module without an alpha has its rank, hence scale 1
        alphas = {
            module: float(file.get_tensor(f"{module}.alpha")) if f"{module}.alpha" in shapes else float(rank)
            for module, rank in ranks.items()
        }
    rank, alpha = _usual(ranks), _usual(alphas)
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": exact_pattern(ranks, rank, ranks),
        "alpha_pattern": exact_pattern(alphas, alpha, ranks),
        "target_modules": sorted(ranks),
    }


def is_alpha(key: str) -> bool:
    return key.endswith(".alpha")


def updated_header(metadata: Mapping[str, str], config: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of a file whose modules have the ranks of `config`."""
    return {name: str(config["r"]) if name == RANK else value for name, value in metadata.items()}


def write_file(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a LoRA file, whole or not at all.

    Raises:
        RunFolderError: `path` exists, or can't be written.
    """
    require_absent(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            save_file({key: value.contiguous() for key, value in tensors.items()}, temporary, dict(metadata))
    except OSError as error:
        raise RunFolderError(f"{path}: can't write there ({error.strerror or error}); give a writable place") from None


def _usual(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def config_of_mlx(folder: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]], dict[str, Any]]:
    """`(PEFT's configuration, shapes by PEFT's keys, the configuration as it is stored)` of a folder that mlx-lm wrote.

    Raises:
        ModelError: no LoRA of linear layers, or a configuration without rank and scale.
    """
    file = folder / CONFIG_FILE
    try:
        stored = read_json_object(file)
    except UnreadableError as error:
        raise ModelError(f"{file}: not readable as JSON ({error}); mlx-lm writes it beside {MLX_FILE}") from None
    kind, parameters = stored.get("fine_tune_type", "lora"), stored.get("lora_parameters") or {}
    rank, scale = parameters.get("rank"), parameters.get("scale")
    if kind != "lora" or not isinstance(rank, int) or not isinstance(scale, int | float):
        raise ModelError(
            f"{file}: fine_tune_type {kind!r}, rank {rank!r}, scale {scale!r}; only mlx-lm's lora with both is read"
        )
    shapes = read_header(folder / MLX_FILE)[0]
    odd = next(
        (key for key, shape in shapes.items() if not key.endswith((".lora_a", ".lora_b")) or len(shape) != 2), None
    )
    if odd is not None or not shapes:
        raise ModelError(f"{folder / MLX_FILE}: holds {odd or 'nothing'}; only LoRA of linear layers is read")
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": stored.get("model"),
        "r": rank,
        "lora_alpha": scale * rank,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": sorted({key.rpartition(".")[0] for key in shapes}),
    }
    named: dict[str, tuple[int, ...]] = {
        f"{PREFIX}{key[:-7]}.lora_{key[-1].upper()}.weight": shape[::-1] for key, shape in shapes.items()
    }
    return config, named, stored


def mlx_key(key: str) -> str:
    """`model.….q_proj.lora_a` for PEFT's `base_model.model.model.….q_proj.lora_A.weight`. The matrix is transposed."""
    module, _, side = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
    return f"{module}.{side.lower()}"


def write_mlx(
    out: Path, stored: Mapping[str, Any], config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Write a folder that mlx-lm loads, whole or not at all: `stored` at the rank of `config`, and PEFT's tensors.

    Raises:
        ModelError: modules of several ranks.
        RunFolderError: `out` exists, or can't be written.
    """
    if config["rank_pattern"] or config["alpha_pattern"]:
        raise ModelError("mlx-lm loads one rank for all modules: add --uniform, or give one rank")
    require_absent(out)
    parameters = dict(stored["lora_parameters"]) | {"rank": config["r"], "scale": config["lora_alpha"] / config["r"]}
    try:
        with replacing_folder(out) as temporary:
            named = {mlx_key(key): value.T.contiguous() for key, value in tensors.items()}
            save_file(named, temporary / MLX_FILE, {"format": "mlx"})
            text = json.dumps(dict(stored) | {"lora_parameters": parameters}, indent=4, sort_keys=True) + "\n"
            (temporary / CONFIG_FILE).write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunFolderError(f"{out}: can't write there ({error.strerror or error}); give a writable folder") from None
