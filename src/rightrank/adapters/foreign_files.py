"""Read and write adapters that PEFT did not write: mlx-lm's folders, and the single files of kohya's sd-scripts and of diffusers.

| written by | keys of a module | scale |
|---|---|---|
| mlx-lm | `model.layers.0.self_attn.q_proj.lora_a` [in, r] and `….lora_b` [r, out] | one rank and one scale in `lora_parameters` |
| sd-scripts | `lora_unet_….lora_down.weight`, `….lora_up.weight` | `….alpha` divided by the rank; 1 without it |
| diffusers | `unet.….lora.down.weight` and `….lora.up.weight`, or `transformer.….lora_A.weight` and `….lora_B.weight` | by the configurations in the header's metadata; 1 without them |

Each is read as the same adapter in PEFT's format. The names of the modules do not change, so no converter between models is needed. A file
of diffusers is written at scale 1, without the configurations, which would state another one.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rightrank.adapters.adapter_folders import CONFIG_FILE, MLX_FILE, PEFT_PREFIX, find_base_changing_init
from rightrank.adapters.rank_math import build_exact_pattern, compute_scaling, get_pattern_value, is_valid_alpha
from rightrank.bases.safetensors_files import Tensor, TensorFile, open_tensors, widen, write_tensors
from rightrank.data.files import (
    UnreadableError,
    create_output,
    parse_json,
    read_json_object,
    replace_file,
    replace_folder,
)
from rightrank.schema.errors import ModelError, quote_value

Shapes = Mapping[str, tuple[int, ...]]  # by key
FACTOR_SUFFIXES = {".lora_down.weight": "A", ".lora_up.weight": "B"}
DIFFUSERS_SUFFIXES = {".lora.down.weight": "A", ".lora.up.weight": "B", ".lora_A.weight": "A", ".lora_B.weight": "B"}
DIFFUSERS_KEY = re.compile(r"(unet|prior|transformer|text_encoder)(_\d)?\.")  # of a component of a pipeline
UNSUPPORTED_KEY = re.compile(
    r"\.(hada_|lokr_|oft_|lora_mid|dora_scale|lora_magnitude_vector)"
)  # other updates than s·B·A
DIFFUSERS_METADATA = "lora_adapter_metadata"
STALE_METADATA = (
    "ss_network_dim",
    "ss_network_alpha",
    "sshs_model_hash",
    "sshs_legacy_hash",
    DIFFUSERS_METADATA,
)  # of the tensors before the change


@dataclass(frozen=True, slots=True)
class ForeignFile:
    """The file of an adapter that PEFT did not write."""

    file: TensorFile
    keys: Mapping[str, str]  # keys in the file of factors (and alphas) by PEFT's keys
    mlx_config: Mapping[str, Any] | None = None  # of mlx-lm, whose factors are transposed; None: a single file

    def load_tensor(self, key: str) -> Tensor:
        tensor = self.file.load_tensor(self.keys.get(key, key))
        return tensor if self.mlx_config is None else tensor.T

    def write(self, out: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Write a changed adapter, whose modules all have one scale, in this format. An error leaves nothing behind.

        Raises:
            ModelError: The modules have different ranks, which mlx-lm cannot load.
            RunFolderError: `out` exists or can't be written.
        """
        if self.mlx_config is not None:
            self._write_mlx_folder(out, self.mlx_config, config, tensors)
            return
        stored = {self.keys.get(key, key): value for key, value in tensors.items()}
        scaling = compute_scaling(config["lora_alpha"], config["r"], use_rslora=False)
        ranks = {key.removesuffix(".lora_A.weight"): len(tensors[key]) for key in tensors if ".lora_A." in key}
        for module, rank in ranks.items():
            if scaling != 1 or f"{module}.alpha" in self.keys:
                stored[f"{module.removeprefix(PEFT_PREFIX)}.alpha"] = np.array(scaling * rank, np.float32)
        metadata = {name: value for name, value in self.file.metadata.items() if name not in STALE_METADATA}
        with create_output(out), replace_file(out) as temporary:
            write_tensors(temporary, stored, metadata)

    def _write_mlx_folder(
        self,
        out: Path,
        mlx_config: Mapping[str, Any],
        config: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
    ) -> None:
        if config["rank_pattern"] or config["alpha_pattern"]:
            raise ModelError("mlx-lm loads one rank for all modules: give one rank")
        parameters = {"rank": config["r"], "scale": config["lora_alpha"] / config["r"]}
        changed = dict(mlx_config) | {"lora_parameters": dict(mlx_config["lora_parameters"]) | parameters}
        with create_output(out), replace_folder(out) as temporary:
            named = {self.keys[key]: value.T for key, value in tensors.items()}
            write_tensors(temporary / MLX_FILE, named, {"format": "mlx"})
            text = json.dumps(changed, indent=4, sort_keys=True) + "\n"
            (temporary / CONFIG_FILE).write_text(text, encoding="utf-8")


def read_single_file(path: Path) -> tuple[dict[str, Any], Shapes, ForeignFile]:
    """Read the header and the scales of a file of sd-scripts or diffusers.

    Returns:
        PEFT's configuration, the shapes by PEFT's keys, and the file.

    Raises:
        ModelError: The file is not readable, belongs to PEFT or another program, or holds another kind of update than s·B·A.
    """
    file = open_tensors(path)
    is_diffusers = any(DIFFUSERS_KEY.match(key) for key in file.shapes)
    suffixes = DIFFUSERS_SUFFIXES if is_diffusers else FACTOR_SUFFIXES
    other_key = next((key for key in file.shapes if key.endswith(".lora_A.weight")), None)
    if other_key is not None and not is_diffusers:
        raise ModelError(
            f"{path}: {other_key}: its alphas are not in its tensors, or it has ComfyUI's layout; the layouts that can be read are folders of "
            "PEFT (adapter_config.json) and mlx-lm, and single files of sd-scripts (lora_unet_….lora_down.weight) and of diffusers "
            "(pytorch_lora_weights.safetensors, with unet.… or transformer.…)"
        )
    stated = _read_diffusers_configs(path, file.metadata) if is_diffusers else {}
    shapes: dict[str, tuple[int, ...]] = {}
    keys: dict[str, str] = {}
    ranks: dict[str, int] = {}
    for key, shape in file.shapes.items():
        if UNSUPPORTED_KEY.search(key):
            raise ModelError(
                f"{path}: {key}: only LoRA is read, and not LoHa, LoKr, OFT, DoRA or a Tucker decomposition"
            )
        suffix = next((suffix for suffix in suffixes if key.endswith(suffix)), None)
        if suffix is not None:
            module, factor = key.removesuffix(suffix), suffixes[suffix]
            peft_key = f"{PEFT_PREFIX}{module}.lora_{factor}.weight"
            keys[peft_key], shapes[peft_key] = key, shape
            if factor == "A" and shape and shape[0] > 0:
                ranks[module] = shape[0]
        elif key.endswith(".alpha") and math.prod(shape) == 1:
            keys[f"{PEFT_PREFIX}{key}"] = key
        else:
            shapes[key] = shape

    def read_alpha(module: str) -> float:
        component, _, name = module.partition(".")
        if component in stated:
            config = stated[component]
            stated_alpha = get_pattern_value(config.get("alpha_pattern") or {}, name, config["lora_alpha"])
            return ranks[module] * compute_scaling(stated_alpha, ranks[module], bool(config.get("use_rslora")))
        has_alpha = f"{PEFT_PREFIX}{module}.alpha" in keys
        return float(widen(file.load_tensor(f"{module}.alpha")).item()) if has_alpha else ranks[module]

    alphas = {module: read_alpha(module) for module in ranks}
    rank = max(ranks.values(), default=1)
    scalings = Counter(compute_scaling(alphas[module], ranks[module], use_rslora=False) for module in ranks)
    alpha = rank * (scalings.most_common(1)[0][0] if scalings and not is_diffusers else 1)
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": build_exact_pattern(ranks, rank, ranks),
        "alpha_pattern": build_exact_pattern(alphas, alpha, ranks),
        "target_modules": sorted(ranks),
    }
    init = next(filter(None, map(find_base_changing_init, stated.values())), True)
    return config | {"init_lora_weights": init}, shapes, ForeignFile(file, keys)


def _read_diffusers_configs(path: Path, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return the configurations of PEFT in a file's metadata by component; empty if there are none.

    Raises:
        ModelError: The metadata is not JSON, or a configuration has no valid alpha.
    """
    if DIFFUSERS_METADATA not in metadata:
        return {}
    try:
        values = parse_json(metadata[DIFFUSERS_METADATA])
    except ValueError as error:
        raise ModelError(
            f"{path}: {DIFFUSERS_METADATA} is not readable as JSON ({error}); save the adapter again"
        ) from None
    configs: dict[str, dict[str, Any]] = {}
    for key, value in values.items() if isinstance(values, dict) else ():
        component, _, name = key.partition(".")
        configs.setdefault(component, {})[name] = value
    for component, config in configs.items():
        pattern = config.get("alpha_pattern") or {}
        alphas = [config.get("lora_alpha"), *(pattern.values() if isinstance(pattern, dict) else [pattern])]
        if not all(map(is_valid_alpha, alphas)):
            raise ModelError(f"{path}: {component} has the alphas {quote_value(alphas)}; they must be numbers")
    return configs


def read_mlx_folder(folder: Path) -> tuple[dict[str, Any], Shapes, ForeignFile]:
    """Read the configuration and the shapes of a folder that mlx-lm wrote.

    Returns:
        PEFT's configuration, the shapes by PEFT's keys, and the file.

    Raises:
        ModelError: The folder holds no LoRA of linear layers, or its configuration has no rank or no scale.
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
    weights = open_tensors(folder / MLX_FILE)
    shapes = weights.shapes
    unsupported_key = next(
        (key for key, shape in shapes.items() if not key.endswith((".lora_a", ".lora_b")) or len(shape) != 2), None
    )
    if unsupported_key is not None or not shapes:
        raise ModelError(
            f"{folder / MLX_FILE}: holds {unsupported_key or 'nothing'}; only LoRA of linear layers is read"
        )
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
    keys = {f"{PEFT_PREFIX}{key[:-7]}.lora_{key[-1].upper()}.weight": key for key in shapes}
    peft_shapes = {peft_key: shapes[key][::-1] for peft_key, key in keys.items()}
    return config, peft_shapes, ForeignFile(weights, keys, stored)
