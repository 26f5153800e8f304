"""LoRA files of other tools as PEFT's configuration and keys: one safetensors file of kohya or diffusers, a folder of mlx-lm.

| tool | keys of a module `down_blocks.0.attn.to_q` | scale |
|---|---|---|
| kohya (sd-scripts, ComfyUI) | `lora_unet_down_blocks_0_attn_to_q.lora_down.weight`, `….lora_up.weight` | `….alpha` over the rank |
| diffusers | `unet.down_blocks.0.attn.to_q.lora_A.weight`, `….lora_B.weight` | PEFT's configuration in the header |
| diffusers, earlier | `unet.down_blocks.0.attn.to_q.lora.down.weight`, `….lora.up.weight` | `….alpha` over the rank |

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
from rightrank.models.ranks import exact_pattern, pattern_value
from rightrank.models.weights import read_header
from rightrank.schema.errors import ModelError, RunFolderError
from rightrank.schema.settings import FileFormat

HEADER = "lora_adapter_metadata"  # of diffusers: LoraConfig as JSON, each name behind the prefix of its model
RANK, ALPHA = "ss_network_dim", "ss_network_alpha"  # of kohya, in the header
MLX_FILE = "adapters.safetensors"
PREFIX = "base_model.model."  # of PEFT's keys
KOHYA_PREFIX = {
    "unet": "lora_unet_",
    "text_encoder": "lora_te_",
    "text_encoder_2": "lora_te2_",
    "transformer": "lora_unet_",
}

FACTOR = re.compile(
    r"^(?P<module>.+)\.(?:lora_(?P<embedding>embedding_)?(?P<side>[AB])(?P<weight>\.weight)?"
    r"|lora[._](?P<name>down|up)\.weight)$"
)


def is_a(match: re.Match[str]) -> bool:
    """Whether a match of `FACTOR` is a module's A, and not its B."""
    return match["side"] == "A" or match["name"] == "down"


def config_of_file(path: Path) -> dict[str, Any]:
    """PEFT's configuration of a LoRA file: ranks from the shapes, alphas from `.alpha` tensors or from the header.

    Raises:
        ModelError: no LoRA factors, or a kind of file that can't be read.
    """
    shapes, metadata = read_header(path)
    ranks = {}
    for key, shape in shapes.items():
        match = FACTOR.match(key)
        if match is not None and is_a(match) and shape:
            ranks[match["module"]] = int(shape[0])
    foreign = next(
        (key for key in shapes if key.endswith((".dora_scale", ".hada_w1_a", ".lokr_w1", ".lora_mid.weight"))), None
    )
    if not ranks or foreign is not None:
        reason = f"it holds {foreign}" if foreign else "no keys of kohya or diffusers (lora_down, lora_A)"
        raise ModelError(f"{path}: not a LoRA file of kohya or diffusers that can be read: {reason}")
    alphas = _alphas(path, ranks, set(shapes), metadata)
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


def _alphas(path: Path, ranks: Mapping[str, int], keys: set[str], metadata: Mapping[str, str]) -> dict[str, float]:
    """The alpha of each module as PEFT's alpha/r has it; a module without one has its rank, hence scale 1."""
    stored = _header_config(metadata)
    found: dict[str, float] = {}
    with safe_open(path, framework="pt") as file:
        for module, rank in ranks.items():
            prefix, _, name = module.partition(".")
            config = stored.get(prefix)
            if f"{module}.alpha" in keys:
                found[module] = float(file.get_tensor(f"{module}.alpha"))
            elif config is not None:
                found[module] = _kohya_alpha(config, name, rank)
            else:
                found[module] = float(rank)
    return found


def _header_config(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """By prefix, the LoraConfig that diffusers keeps in the header."""
    found: dict[str, dict[str, Any]] = {}
    try:
        values = json.loads(metadata.get(HEADER, "{}"))
    except json.JSONDecodeError:
        return {}
    for key, value in values.items():
        prefix, _, name = key.partition(".")
        found.setdefault(prefix, {})[name] = value
    return {prefix: config for prefix, config in found.items() if isinstance(config.get("lora_alpha"), int | float)}


def updated_header(metadata: Mapping[str, str], config: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of a file whose modules have the ranks and alphas of `config`, as `config_of_file` names them."""
    found = dict(metadata)
    if RANK in found:
        found[RANK] = str(config["r"])
    stored = _header_config(metadata)
    for prefix, values in stored.items():
        names = [name.removeprefix(f"{prefix}.") for name in config["target_modules"] if name.startswith(f"{prefix}.")]
        for field, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
            each = {name: pattern_value(config[pattern], f"{prefix}.{name}", config[field]) for name in names}
            values |= {field: config[field], pattern: exact_pattern(each, config[field], names)}
        values["use_rslora"] = False
    if stored:
        found[HEADER] = json.dumps({f"{prefix}.{name}": one for prefix, c in stored.items() for name, one in c.items()})
    return found


def file_keys(
    config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], to: FileFormat, prefix: str
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """`(tensors, metadata)` of a PEFT adapter in another tool's keys.

    Args:
        tensors: PEFT's tensors by name, without its prefix.
        prefix: the model that the adapter is for, in diffusers' names: `unet`, `text_encoder`, `transformer`.

    Raises:
        ModelError: tensors that the format has no keys for.
    """
    if to == "diffusers":
        header = {f"{prefix}.{name}": value for name, value in config.items() if value is not None}
        named = {f"{prefix}.{key}": value for key, value in tensors.items()}
        return named, {"format": "pt", HEADER: json.dumps(header, sort_keys=True)}
    found: dict[str, torch.Tensor] = {}
    for key, value in tensors.items():
        match = FACTOR.match(key)
        if match is None or match["side"] is None or match["embedding"]:
            raise ModelError(f"{key}: kohya's files have no such tensor; export --to diffusers, or merge the adapter")
        name = KOHYA_PREFIX.get(prefix, f"lora_{prefix}_") + match["module"].replace(".", "_")
        found[f"{name}.lora_{'down' if match['side'] == 'A' else 'up'}.weight"] = value
        if match["side"] == "A":
            found[f"{name}.alpha"] = torch.tensor(_kohya_alpha(config, match["module"], int(value.shape[0])))
    alpha = _kohya_alpha(config, "", int(config["r"]))
    return found, {"format": "pt", "ss_network_module": "networks.lora", RANK: str(config["r"]), ALPHA: f"{alpha:g}"}


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


def _kohya_alpha(config: Mapping[str, Any], module: str, rank: int) -> float:
    """The alpha whose alpha/r is PEFT's scale."""
    alpha = float(pattern_value(config.get("alpha_pattern") or {}, module, config["lora_alpha"]))
    return alpha * rank**0.5 if config.get("use_rslora") else alpha


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
    return config, {_peft_key(key): (shape[1], shape[0]) for key, shape in shapes.items()}, stored


def _peft_key(key: str) -> str:
    module, _, side = key.rpartition(".")
    return f"{PREFIX}{module}.lora_{side[-1].upper()}.weight"


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
