"""An adapter's files in PEFT's format: read with safetensors alone, checked before anything is computed, and written.

Neither PEFT nor the base model is needed to read one: tensor names, shapes and `adapter_config.json` define the adapter. A folder of mlx-lm
(`adapters.safetensors`) is read as the same adapter: its keys are `model.layers.0.self_attn.q_proj.lora_a` [in, r] and `….lora_b` [r, out], and
`lora_parameters` has one rank and one scale for all modules.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from rightrank.data.files import UnreadableError, read_json_object
from rightrank.models.adapter_folders import (
    CONFIG_FILE,
    MLX_FILE,
    WEIGHTS_FILE,
    read_config,
    require_adapter_folder,
)
from rightrank.models.kinds import MAGNITUDE, stored_kind
from rightrank.models.kinds.base import AdapterKind, Layout, StoredPair
from rightrank.models.ranks import equivalent_rank, lora_scaling, pattern_matches, pattern_value, rank_text
from rightrank.models.safetensors_files import read_header
from rightrank.schema.errors import ModelError
from rightrank.schema.trials import Floats

PREFIX = "base_model.model."  # of PEFT's keys
FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?P<weight>\.weight)?$")
MIN_ALPHA, MAX_ALPHA = 1e-9, 1e9
# Adapters are trained in at most 32 bits. Values beyond these are damage, and their squares overflow 64 bits.
MIN_VALUE, MAX_VALUE = float(np.finfo(np.float32).smallest_subnormal), float(np.finfo(np.float32).max)
# Options with which the adapter's update is not s·B·A.
FOREIGN_OPTIONS = ("use_qalora", "use_bdlora", "kasa_config", "arrow_config", "monteclora_config", "velora_config")
# Initialisations that change the base's weights on loading, so that ΔW is not s·B·A alone.
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


def open_adapter(path: Path) -> AdapterFolder:
    """Read and check the configuration and the header of an adapter folder of PEFT or mlx-lm.

    Raises:
        ModelError: not a LoRA adapter, pickled weights, missing tensors, or shapes that contradict the configuration.
    """
    stored = None
    if (path / MLX_FILE).is_file() and not (path / WEIGHTS_FILE).exists():
        config, shapes, stored = _config_of_mlx(path)
        _check_config(path / CONFIG_FILE, config)
    else:
        require_adapter_folder(path)
        config = read_config(path)
        _check_config(path / CONFIG_FILE, config)
        shapes = read_header(path / WEIGHTS_FILE)[0]
    pairs = _factor_keys(path, shapes)
    modules = tuple(
        module
        for name in sorted(pairs, key=natural_order)
        for module in _modules(path, config, name, pairs[name], shapes)
    )
    optional = {f"{name}.{part}" for name in pairs for part in ("lora_B.bias", *MAGNITUDE)}
    other = shapes.keys() - optional - {key for keys in pairs.values() for key in keys.values()}
    patterns = [*config.get("rank_pattern", {}), *config.get("alpha_pattern", {})]
    addresses = dict.fromkeys(module.address for module in modules)
    unused = tuple(key for key in patterns if not any(pattern_matches(key, address) for address in addresses))
    return AdapterFolder(path, config, modules, tuple(sorted(other)), unused, stored)


@dataclass(frozen=True, slots=True)
class AdapterModule:
    """One adapted matrix: its tensors, their shapes and its scale. The experts of one parameter share their tensors."""

    name: str  # in the base model
    kind: AdapterKind
    rank: int
    rows: int  # of ΔW: out features; of an embedding, its width
    columns: int  # of ΔW: in features; of a convolution, times the kernel; of an embedding, the vocabulary
    lora_alpha: float
    scaling: float
    a_key: str
    b_key: str
    magnitude_key: str | None  # DoRA
    bias_key: str | None  # lora_bias
    address: str  # the name by which PEFT's patterns address it
    part: int = 0  # its place among the matrices of the pair

    @property
    def parameters(self) -> int:
        return self.rank * (self.rows + self.columns)


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """A checked adapter; tensors are read on access."""

    path: Path
    config: Mapping[str, Any]
    modules: tuple[AdapterModule, ...]
    other_keys: tuple[str, ...]  # modules_to_save, trained biases, saved embeddings
    unused_patterns: tuple[str, ...]  # keys of rank_pattern or alpha_pattern that no module matches
    mlx: Mapping[str, Any] | None = None  # mlx-lm's configuration, if it wrote the folder

    @property
    def weights(self) -> Path:
        return self.path / (WEIGHTS_FILE if self.mlx is None else MLX_FILE)

    @property
    def keys(self) -> list[str]:
        own = [(module.a_key, module.b_key, module.magnitude_key, module.bias_key) for (module, *_) in self.pairs]
        return [*(key for keys in own for key in keys if key), *self.other_keys]

    @property
    def pairs(self) -> list[list[AdapterModule]]:
        """The modules grouped by the tensors that hold them: one module in each, or the experts of a parameter."""
        grouped: dict[str, list[AdapterModule]] = {}
        for module in self.modules:
            grouped.setdefault(module.a_key, []).append(module)
        return list(grouped.values())

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return max(module.rank for module in self.modules)

    @property
    def rank_text(self) -> str:
        """The rank in words: that of all modules, or of as many parameters, with the range of the modules."""
        ranks = [module.rank for module in self.modules]
        sizes = [module.rows + module.columns for module in self.modules]
        return rank_text(equivalent_rank(ranks, sizes), min(ranks), max(ranks))

    @property
    def trained(self) -> int:
        """Trainable parameters of the adapted modules: those of the factors, DoRA's magnitudes and the biases."""
        beside = sum(
            module.rows * bool(key) for (module, *_) in self.pairs for key in (module.magnitude_key, module.bias_key)
        )
        return beside + sum(module.parameters for module in self.modules)

    @property
    def use_rslora(self) -> bool:
        return bool(self.config.get("use_rslora"))

    @property
    def use_dora(self) -> bool:
        return bool(self.config.get("use_dora"))

    @property
    def base_model(self) -> str | None:
        name = self.config.get("base_model_name_or_path")
        return str(name) if name else None

    @property
    def base_changing_init(self) -> str | None:
        """The initialisation if it changes the base on loading, else None."""
        init = str(self.config.get("init_lora_weights", ""))
        return init if init.startswith(BASE_CHANGING_INITS) else None

    def tensor(self, key: str) -> torch.Tensor:
        with safe_open(self.weights, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(key) if self.mlx is None else file.get_tensor(mlx_key(key)).T
            return tensor

    def factors(self, module: AdapterModule) -> tuple[Floats, Floats]:
        """`(B [rows, r], A [r, columns])` in float64, without the scale.

        Raises:
            ModelError: a value is NaN or infinite.
        """
        return self.pair_factors(module)[module.part]

    def pair_factors(self, module: AdapterModule) -> list[tuple[Floats, Floats]]:
        """The factors of every matrix that is stored in the tensors of the module."""
        a, b = (torch.from_numpy(self._values(key)) for key in (module.a_key, module.b_key))
        return [(of_b.numpy(), of_a.numpy()) for of_b, of_a in module.kind.matrices(a, b, module.rank)]

    def _values(self, key: str) -> Floats:
        values: Floats = self.tensor(key).double().numpy()
        if not (np.abs(values) <= MAX_VALUE).all():
            raise ModelError(
                f"{self.weights}: {key} holds NaN or infinite values; the training diverged: give an earlier checkpoint"
            )
        values[np.abs(values) < MIN_VALUE] = 0.0
        return values


def _check_config(file: Path, config: dict[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ModelError(f"{file}: peft_type is {kind!r}; only 'LORA' is supported")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ModelError(f"{file}: r is {rank!r}; it must be a whole number from 1")
    if not _is_alpha(alpha):
        raise ModelError(f"{file}: lora_alpha is {alpha!r}; it must be a number from {MIN_ALPHA:g} to {MAX_ALPHA:g}")
    for name in FOREIGN_OPTIONS:
        if config.get(name):
            raise ModelError(f"{file}: {name} is set; such an update is not s·B·A and is not supported")
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(name)
        if pattern is None:
            config[name] = {}
        elif not isinstance(pattern, dict):
            raise ModelError(f"{file}: {name} is a {type(pattern).__name__}; it must map module names to numbers")
    for name, value in config["alpha_pattern"].items():
        if not _is_alpha(value):
            raise ModelError(f"{file}: alpha_pattern has {value!r} for {name!r}; it must be a number")


def _is_alpha(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return value == 0 or MIN_ALPHA <= abs(value) <= MAX_ALPHA


def _factor_keys(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, dict[str, str]]:
    """By module, the keys of its `A` and its `B`."""
    pairs: dict[str, dict[str, str]] = {}
    for key in shapes:
        match = FACTOR.match(key)
        if match is not None:
            pairs.setdefault(match["module"], {})[match["side"]] = key
    if not pairs:
        raise ModelError(f"{path}: the weights hold no LoRA factors (…lora_A.weight); save the adapter again")
    for module, keys in pairs.items():
        for side in ("A", "B"):
            if side not in keys:
                raise ModelError(
                    f"{path}: {module} has no lora_{side}: a tensor is missing; save or copy the adapter again"
                )
    return pairs


def _modules(
    path: Path,
    config: Mapping[str, Any],
    key: str,
    keys: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
) -> Iterator[AdapterModule]:
    embedding = ".lora_embedding_" in keys["A"]
    pair = StoredPair(key.removeprefix(PREFIX), embedding, shapes[keys["A"]], shapes[keys["B"]], config)
    if len(pair.a) < 2 or len(pair.b) < 2 or 0 in pair.a + pair.b:
        raise ModelError(
            f"{path}: {pair.module} has factors of shapes {list(pair.a)} and {list(pair.b)}; they must be matrices"
        )
    kind = stored_kind(pair)
    if kind is None:
        raise ModelError(f"{path}: {pair.module} is of a kind that rightrank can't read; load it with PEFT")
    address = kind.address(pair)
    layout = _layout(path, kind, pair, pattern_value(config["rank_pattern"], address, config["r"]))
    alpha = float(pattern_value(config["alpha_pattern"], address, config["lora_alpha"]))
    for part, name in enumerate(layout.names):
        yield AdapterModule(
            name=name,
            kind=kind,
            rank=layout.rank,
            rows=layout.rows,
            columns=layout.columns,
            lora_alpha=alpha,
            scaling=lora_scaling(alpha, layout.rank, bool(config.get("use_rslora"))),
            a_key=keys["A"],
            b_key=keys["B"],
            magnitude_key=next((stored for name in MAGNITUDE if (stored := f"{key}.{name}") in shapes), None),
            bias_key=f"{key}.lora_B.bias" if f"{key}.lora_B.bias" in shapes else None,
            address=address,
            part=part,
        )


def _layout(path: Path, kind: AdapterKind, pair: StoredPair, rank: int) -> Layout:
    """The checked layout of a pair whose rank is `rank` by the configuration."""
    layout = kind.layout(pair, rank)
    if layout is None:
        groups = " (adapters on convolutions in groups are not supported)" if len(pair.a) > 2 else ""
        raise ModelError(
            f"{path}: {pair.module} has A {list(pair.a)} and B {list(pair.b)}, which do not multiply{groups}; "
            "save the adapter again"
        )
    if layout.rank != rank:
        raise ModelError(
            f"{path}: {pair.module} has rank {layout.rank} in the weights and {rank} in {CONFIG_FILE}; "
            "give the config and weights of one adapter"
        )
    return layout


def natural_order(name: str) -> list[tuple[int, int, str]]:
    """A sort key that puts layer 2 before layer 10."""
    parts = name.split(".")
    return [(0, int(part), "") if part.isdecimal() and len(part) < 10 else (1, 0, part) for part in parts]


def _config_of_mlx(folder: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]], dict[str, Any]]:
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
