"""LoRA adapters on disk in PEFT's format, read with safetensors alone and checked before anything is computed.

Neither PEFT nor the base model is needed: tensor names, shapes and `adapter_config.json` define the adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from rightrank.errors import ModelError
from rightrank.io.adapter_config import WEIGHTS_FILE, read_config, read_shapes
from rightrank.io.adapter_place import CONFIG_FILE
from rightrank.io.lora_files import FACTOR, config_of_file, read_header
from rightrank.io.patterns import lora_scaling, pattern_matches, pattern_value
from rightrank.kinds import stored_kind
from rightrank.kinds.base import AdapterKind, Layout, StoredPair
from rightrank.kinds.dora import MAGNITUDE
from rightrank.maths import Floats
from rightrank.records.probe import ModuleKind

# Adapters are trained in at most 32 bits. Values beyond these are damage, and their squares overflow 64 bits.
MIN_VALUE, MAX_VALUE = float(np.finfo(np.float32).smallest_subnormal), float(np.finfo(np.float32).max)

PREFIX = "base_model.model."
# Initialisations that change the base's weights on loading, so that ΔW is not s·B·A alone.
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


@dataclass(frozen=True, slots=True)
class AdapterModule:
    """One adapted matrix: its tensors, their shapes and its scale. The experts of one parameter share their tensors."""

    name: str  # in the base model
    how: AdapterKind
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
    def kind(self) -> ModuleKind:
        return self.how.name

    @property
    def parameters(self) -> int:
        return self.rank * (self.rows + self.columns)

    @property
    def trained(self) -> int:
        """Trainable parameters: those of the factors, DoRA's magnitudes and the bias."""
        return self.parameters + self.rows * ((self.magnitude_key is not None) + (self.bias_key is not None))


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """A checked adapter; tensors are read on access."""

    path: Path
    config: Mapping[str, Any]
    modules: tuple[AdapterModule, ...]
    other_keys: tuple[str, ...]  # modules_to_save, trained biases, saved embeddings
    unused_patterns: tuple[str, ...]  # keys of rank_pattern or alpha_pattern that no module matches

    @property
    def weights(self) -> Path:
        return self.path if self.is_file else self.path / WEIGHTS_FILE

    @property
    def is_file(self) -> bool:
        """Whether it is a LoRA file of kohya or diffusers and no folder of PEFT."""
        return self.path.suffix == ".safetensors"

    @property
    def keys(self) -> list[str]:
        optional = [key for (module, *_) in self.pairs for key in (module.magnitude_key, module.bias_key) if key]
        factors = [key for (module, *_) in self.pairs for key in (module.a_key, module.b_key)]
        return [*factors, *optional, *self.other_keys]

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
    def trained(self) -> int:
        """Trainable parameters of the adapted modules."""
        factors = sum(module.parameters for module in self.modules)
        return factors + sum(first.trained - first.parameters for (first, *_) in self.pairs)

    @property
    def use_rslora(self) -> bool:
        return bool(self.config.get("use_rslora"))

    @property
    def use_dora(self) -> bool:
        return bool(self.config.get("use_dora"))

    @property
    def scaling_rule(self) -> str:
        return "alpha/sqrt(r)" if self.use_rslora else "alpha/r"

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
            tensor: torch.Tensor = file.get_tensor(key)
            return tensor

    def factors(self, module: AdapterModule) -> tuple[Floats, Floats]:
        """`(B [rows, r], A [r, columns])` in float64, without the scale.

        Raises:
            ModelError: a value is NaN or infinite.
        """
        a, b = (torch.from_numpy(self._values(key)) for key in (module.a_key, module.b_key))
        found_b, found_a = module.how.matrices(a, b, module.rank)[module.part]
        return found_b.numpy(), found_a.numpy()

    def _values(self, key: str) -> Floats:
        with safe_open(self.weights, framework="pt") as file:
            values: Floats = file.get_tensor(key).double().numpy()
        if not (np.abs(values) <= MAX_VALUE).all():
            raise ModelError(
                f"{self.weights}: {key} holds NaN or infinite values; the training diverged: give an earlier checkpoint"
            )
        values[np.abs(values) < MIN_VALUE] = 0.0
        return values


def open_adapter(path: Path) -> AdapterFolder:
    """Read and check the configuration and the header of an adapter folder, or of a LoRA file of kohya or diffusers.

    Raises:
        ModelError: not a LoRA adapter, pickled weights, missing tensors, or shapes that contradict the configuration.
    """
    if path.is_file() and path.suffix == ".safetensors":
        config, (shapes, _) = config_of_file(path), read_header(path)
    else:
        config, shapes = read_config(path), read_shapes(path)
    pairs, other = _pair_up(path, shapes)
    modules = tuple(
        module
        for name in sorted(pairs, key=natural_order)
        for module in _modules(path, config, name, pairs[name], shapes)
    )
    keys = [*config.get("rank_pattern", {}), *config.get("alpha_pattern", {})]
    addresses = dict.fromkeys(module.address for module in modules)
    unused = tuple(key for key in keys if not any(pattern_matches(key, address) for address in addresses))
    return AdapterFolder(path, config, modules, tuple(sorted(other)), unused)


@dataclass(slots=True)
class _Pair:
    a: str | None = None
    b: str | None = None
    embedding: bool = False


def _pair_up(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, _Pair], set[str]]:
    """The keys of A and B by module, and the keys that belong to no pair."""
    pairs: dict[str, _Pair] = {}
    other: set[str] = set()
    for key in shapes:
        match = FACTOR.match(key)
        if match is None:
            other.add(key)
            continue
        pair = pairs.setdefault(match["module"], _Pair(embedding=match["embedding"] is not None))
        if match["side"] == "A" or match["name"] == "down":
            pair.a = key
        else:
            pair.b = key
    if not pairs:
        raise ModelError(f"{path}: the weights hold no LoRA factors (…lora_A.weight); save the adapter again")
    for module, pair in pairs.items():
        if pair.a is None or pair.b is None:
            missing = "lora_A" if pair.a is None else "lora_B"
            raise ModelError(f"{path}: {module} has no {missing}: a tensor is missing; save or copy the adapter again")
        other -= {f"{module}.lora_B.bias", *(f"{module}.{name}" for name in MAGNITUDE)}
    return pairs, other


def _modules(
    path: Path, config: Mapping[str, Any], key: str, keys: _Pair, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[AdapterModule]:
    assert keys.a is not None
    assert keys.b is not None
    pair = StoredPair(key.removeprefix(PREFIX), keys.embedding, shapes[keys.a], shapes[keys.b], config)
    if len(pair.a) < 2 or len(pair.b) < 2 or 0 in pair.a + pair.b:
        raise ModelError(
            f"{path}: {pair.module} has factors of shapes {list(pair.a)} and {list(pair.b)}; they must be matrices"
        )
    how = stored_kind(pair)
    if how is None:
        raise ModelError(f"{path}: {pair.module} is of a kind that rightrank can't read; load it with PEFT")
    address = how.address(pair)
    rank = pattern_value(config["rank_pattern"], address, config["r"])
    layout = _layout(path, how, pair, rank)
    alpha = float(pattern_value(config["alpha_pattern"], address, config["lora_alpha"]))
    for part, name in enumerate(layout.names):
        yield AdapterModule(
            name=name,
            how=how,
            rank=layout.rank,
            rows=layout.rows,
            columns=layout.columns,
            lora_alpha=alpha,
            scaling=lora_scaling(alpha, layout.rank, bool(config.get("use_rslora"))),
            a_key=keys.a,
            b_key=keys.b,
            magnitude_key=next((found for name in MAGNITUDE if (found := f"{key}.{name}") in shapes), None),
            bias_key=f"{key}.lora_B.bias" if f"{key}.lora_B.bias" in shapes else None,
            address=address,
            part=part,
        )


def _layout(path: Path, how: AdapterKind, pair: StoredPair, rank: int) -> Layout:
    """The checked layout of a pair whose rank is `rank` by the configuration."""
    layout = how.layout(pair, rank)
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
