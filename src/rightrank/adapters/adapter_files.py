"""Read an adapter with safetensors alone, check it before anything is computed, and write adapters.

Neither PEFT nor the base model is needed: tensor names, shapes and `adapter_config.json` define the adapter. Adapters of other programs
(`foreign_files`) are read as the same adapter in PEFT's format. The layout of the factors A and B depends on what they adapt:

Embeddings: ΔW = s·B·A [width, vocabulary], of which a token takes one column.

Convolutions: ΔW = s·B·A as the matrix [out, in × kernel] that PEFT's kernels imply. PEFT adapts a convolution by two: A has
the same kernel, stride and padding and r output channels, and B has a kernel of size one. The composition has the kernel
s·Σᵣ B[o, r]·A[r, i, …], so its norm and its best approximation of a lower rank are those of the matrix. Grouped
convolutions are not supported: PEFT's B then sees only some of the r channels.

DoRA has the layout of the layer that it adapts, and a magnitude for each row.

Fused experts: a parameter [experts, …] of a mixture that PEFT adapts through `target_parameters`, with one ΔW for each expert.
PEFT wraps the module that holds the parameter, and the wrapper of a second parameter of that module wraps the first. In a
file, `experts.base_layer` is the parameter that the module registered first, and `experts` the last one. For E experts A is stored as
[E·r, in], the r rows of one expert after those of another, and B as [out, r·E], in which the E columns of one direction
are neighbours. The other kinds have this layout with E = 1.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rightrank.adapters.adapter_folders import (
    BASE_FILE,
    CLASSIFIER_FILE,
    CONFIG_FILE,
    MLX_FILE,
    PEFT_PREFIX,
    WEIGHTS_FILE,
    WRAPPER_SUFFIX,
    is_single_file,
    name_experts,
    read_adapter_config,
    require_adapter_folder,
)
from rightrank.adapters.foreign_files import ForeignFile, read_mlx_folder, read_single_file
from rightrank.adapters.rank_math import (
    MAX_ALPHA,
    MIN_ALPHA,
    compute_scaling,
    get_pattern_value,
    is_valid_alpha,
)
from rightrank.adapters.truncation import Factors
from rightrank.bases.safetensors_files import BFLOAT16, Tensor, TensorFile, open_tensors, widen, write_tensors
from rightrank.data.files import create_output, replace_folder
from rightrank.schema.errors import ModelError
from rightrank.schema.trials import Floats

FACTOR_KEY = re.compile(r"^(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?P<weight>\.weight)?$")
# Adapters are trained in at most 32 bits. Values beyond these are damage, and their squares overflow 64 bits.
MIN_VALUE, MAX_VALUE = float(np.finfo(np.float32).smallest_subnormal), float(np.finfo(np.float32).max)
# Options with which the adapter's update is not s·B·A.
UNSUPPORTED_OPTIONS = ("use_qalora", "use_bdlora", "kasa_config", "arrow_config", "monteclora_config", "velora_config")
MAGNITUDE_KEYS = (
    "lora_magnitude_vector",
    "lora_magnitude_vector.weight",
)  # suffixes of the module's name in PEFT's files
LAST_PARAMETERS = ("down", "w2", "output")  # names of parameters that modules register last
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "spiece.model", "chat_template.jinja", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
COPIED_FILES = (BASE_FILE, CLASSIFIER_FILE, *TOKENIZER_FILES)  # files that are copied to an adapter of another rank


def open_adapter(path: Path) -> AdapterFolder:
    """Read and check the configuration and the header of an adapter folder of PEFT or mlx-lm.

    Raises:
        ModelError: The folder holds no LoRA adapter, pickled weights, too few tensors, or shapes that contradict the configuration.
    """
    foreign: ForeignFile | None = None
    if is_single_file(path):
        config, shapes, foreign = read_single_file(path)
    elif (path / MLX_FILE).is_file() and not (path / WEIGHTS_FILE).exists():
        config, shapes, foreign = read_mlx_folder(path)
    else:
        require_adapter_folder(path)
        config = read_adapter_config(path)
    _validate_config(path / CONFIG_FILE if path.is_dir() else path, config)
    if foreign is None:
        file = open_tensors(path / WEIGHTS_FILE)
        shapes = file.shapes
    else:
        file = foreign.file
    pairs = _group_factor_keys(path, shapes)
    modules = tuple(
        module
        for name in sorted(pairs, key=natural_sort_key)
        for module in _read_modules(path, config, name, pairs[name], shapes)
    )
    optional = {f"{name}.{suffix}" for name in pairs for suffix in ("lora_B.bias", *MAGNITUDE_KEYS)}
    other_keys = shapes.keys() - optional - {key for keys in pairs.values() for key in keys.values()}
    return AdapterFolder(path, config, modules, tuple(sorted(other_keys)), file, foreign)


@dataclass(frozen=True, slots=True)
class AdapterModule:
    """An adapted matrix: its tensors, their shapes and its scale. The experts of one parameter share their tensors."""

    name: str  # in the base model
    kind: str  # linear, embedding, convolution or expert
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
    index_in_pair: int = 0  # the index among the matrices of the pair

    @property
    def parameters(self) -> int:
        return self.rank * (self.rows + self.columns)


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """A checked adapter, whose tensors are read on access."""

    path: Path
    config: Mapping[str, Any]
    modules: tuple[AdapterModule, ...]
    other_keys: tuple[str, ...]  # modules_to_save, trained biases, saved embeddings
    file: TensorFile
    foreign: ForeignFile | None = None  # the file, if PEFT did not write it

    @property
    def weights_file(self) -> Path:
        return self.file.path

    @property
    def keys(self) -> list[str]:
        factor_keys = [
            (module.a_key, module.b_key, module.magnitude_key, module.bias_key) for (module, *_) in self.pairs
        ]
        return [*(key for keys in factor_keys for key in keys if key), *self.other_keys]

    @property
    def pairs(self) -> list[list[AdapterModule]]:
        """Group the modules by the tensors that hold them: one module in each group, or the experts of a parameter."""
        grouped: dict[str, list[AdapterModule]] = {}
        for module in self.modules:
            grouped.setdefault(module.a_key, []).append(module)
        return list(grouped.values())

    @property
    def rank(self) -> int:
        return max(module.rank for module in self.modules)

    @property
    def trainable_parameters(self) -> int:
        """Count the trainable parameters of the adapted modules: factors, DoRA's magnitudes and biases."""
        magnitudes_and_biases = sum(
            module.rows * bool(key) for (module, *_) in self.pairs for key in (module.magnitude_key, module.bias_key)
        )
        return magnitudes_and_biases + sum(module.parameters for module in self.modules)

    @property
    def use_rslora(self) -> bool:
        return bool(self.config.get("use_rslora"))

    @property
    def base_model(self) -> str | None:
        name = self.config.get("base_model_name_or_path")
        return str(name) if name else None

    def load_tensor(self, key: str) -> Tensor:
        return (self.foreign or self.file).load_tensor(key)

    def load_factors(self, module: AdapterModule) -> Factors:
        """Load `(B [rows, r], A [r, columns])` of a module in float64, without the scale.

        Raises:
            ModelError: A value is NaN or infinite, or not of a type that adapters are trained in.
        """
        return self.load_pair_factors(module)[module.index_in_pair]

    def load_pair_factors(self, module: AdapterModule) -> list[Factors]:
        """Load the factors of every matrix that is stored in the tensors of the module."""
        a, b = (self._load_values(key) for key in (module.a_key, module.b_key))
        return unpack_factors(a, b, module.rank)

    def _load_values(self, key: str) -> Floats:
        stored = self.load_tensor(key)
        if stored.dtype.names and stored.dtype != BFLOAT16:
            raise ModelError(
                f"{self.weights_file}: {key} is stored as {stored.dtype.names[0]}; save it in f32, bf16 or f16"
            )
        values = widen(stored)
        if not max(abs(values.min()), abs(values.max())) <= MAX_VALUE:
            raise ModelError(
                f"{self.weights_file}: {key} holds NaN or infinite values; the training diverged: give an earlier checkpoint"
            )
        return np.where(np.abs(values) >= MIN_VALUE, values, 0.0) if stored.dtype == np.float64 else values


def _validate_config(file: Path, config: dict[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ModelError(f"{file}: peft_type is {kind!r}; only 'LORA' is supported")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ModelError(f"{file}: r is {rank!r}; it must be a whole number from 1")
    if not is_valid_alpha(alpha):
        raise ModelError(f"{file}: lora_alpha is {alpha!r}; it must be a number from {MIN_ALPHA:g} to {MAX_ALPHA:g}")
    for name in UNSUPPORTED_OPTIONS:
        if config.get(name):
            raise ModelError(f"{file}: {name} is set; such an update is not s·B·A and is not supported")
    for name in ("rank_pattern", "alpha_pattern"):
        config[name] = config.get(name) or {}
        if not isinstance(config[name], dict):
            raise ModelError(f"{file}: {name} is a {type(config[name]).__name__}; it must map module names to numbers")
    for name, value in config["alpha_pattern"].items():
        if not is_valid_alpha(value):
            raise ModelError(f"{file}: alpha_pattern has {value!r} for {name!r}; it must be a number")


def _group_factor_keys(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, dict[str, str]]:
    pairs: dict[str, dict[str, str]] = {}
    for key in shapes:
        match = FACTOR_KEY.match(key)
        if match is not None:
            pairs.setdefault(match["module"], {})[match["side"]] = key
    if not pairs:
        raise ModelError(
            f"{path}: the weights hold no LoRA factors (…lora_A.weight or …lora_down.weight); save the adapter again"
        )
    for module, keys in pairs.items():
        for factor in {"A", "B"} - keys.keys():
            raise ModelError(
                f"{path}: {module} has no lora_{factor}: a tensor is missing; save or copy the adapter again"
            )
    return pairs


def _read_modules(
    path: Path,
    config: Mapping[str, Any],
    key: str,
    keys: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
) -> Iterator[AdapterModule]:
    """Read the matrices of a pair of factors, after a check that the weights and the configuration agree on the rank."""
    module = key.removeprefix(PEFT_PREFIX)
    a, b = shapes[keys["A"]], shapes[keys["B"]]
    if len(a) < 2 or len(b) < 2 or 0 in a + b:
        raise ModelError(f"{path}: {module} has factors of shapes {list(a)} and {list(b)}; they must be matrices")
    kind, address = _identify_kind(module, keys["A"], a, config)
    rank = get_pattern_value(config["rank_pattern"], address, config["r"])
    stored_rank = a[0]
    if kind == "expert" and isinstance(rank, int) and rank > 0 and a[0] % rank == 0:
        stored_rank = rank
    if b[1] != a[0] or math.prod(b[2:]) != 1 or (kind == "convolution" and len(a) != len(b)):
        groups = " (adapters on convolutions in groups are not supported)" if len(a) > 2 else ""
        raise ModelError(
            f"{path}: {module} has A {list(a)} and B {list(b)}, which do not multiply{groups}; save the adapter again"
        )
    if stored_rank != rank:
        raise ModelError(
            f"{path}: {module} has rank {stored_rank} in the weights and {rank} in {CONFIG_FILE}; "
            "give the config and weights of one adapter"
        )
    alpha = float(get_pattern_value(config["alpha_pattern"], address, config["lora_alpha"]))
    for index, name in enumerate(name_experts(address, a[0] // rank)):
        yield AdapterModule(
            name=name,
            kind=kind,
            rank=rank,
            rows=b[0],
            columns=math.prod(a[1:]),
            lora_alpha=alpha,
            scaling=compute_scaling(alpha, rank, bool(config.get("use_rslora"))),
            a_key=keys["A"],
            b_key=keys["B"],
            magnitude_key=next((stored for name in MAGNITUDE_KEYS if (stored := f"{key}.{name}") in shapes), None),
            bias_key=f"{key}.lora_B.bias" if f"{key}.lora_B.bias" in shapes else None,
            address=address,
            index_in_pair=index,
        )


def _identify_kind(module: str, a_key: str, a: tuple[int, ...], config: Mapping[str, Any]) -> tuple[str, str]:
    """Return the kind of a pair, and the name by which PEFT's patterns address it: that of the module or of the experts' parameter."""
    if ".lora_embedding_" in a_key:
        return "embedding", module
    if len(a) > 2:
        return "convolution", module
    parameter = find_expert_parameter(module, config)
    return ("linear", module) if parameter is None else ("expert", parameter)


def natural_sort_key(name: str) -> list[tuple[int, int, str]]:
    """Return a sort key that puts layer 2 before layer 10."""
    components = name.split(".")
    return [
        (0, int(component), "") if component.isdecimal() and len(component) < 10 else (1, 0, component)
        for component in components
    ]


def find_expert_parameter(module: str, config: Mapping[str, Any]) -> str | None:
    """Return the name of the parameter in the base that holds the experts of a pair, or None if the pair adapts a layer.

    Args:
        module: The module's name as PEFT writes it, without its prefix; its depth of wrappers tells the parameter.
        config: The adapter's configuration.
    """
    holder = module.replace(WRAPPER_SUFFIX, "")
    targets = [str(target).rpartition(".") for target in config.get("target_parameters") or ()]
    parameters = [parameter for path, _, parameter in targets if path and f".{holder}".endswith(f".{path}")]
    if not parameters:
        return None
    parameters.sort(key=lambda name: any(last_name in name for last_name in LAST_PARAMETERS))
    return f"{holder}.{parameters[max(0, len(parameters) - 1 - module.count(WRAPPER_SUFFIX))]}"


def unpack_factors(a: Floats, b: Floats, rank: int) -> list[Factors]:
    """Return `(B [rows, r], A [r, columns])` of each matrix of a stored pair."""
    experts = len(a) // rank
    by_expert, rows = b.reshape(len(b), rank, experts), a.reshape(len(a), -1)
    return [(by_expert[:, :, expert], rows[expert * rank : (expert + 1) * rank]) for expert in range(experts)]


def pack_factors(factors: Sequence[Factors], a: tuple[int, ...], b: tuple[int, ...]) -> tuple[Floats, Floats]:
    """Return `(A, B)` to store for the factors of the matrices, at their rank, in the layout of a pair of shapes `a` and `b`."""
    new_a = np.concatenate([matrix_a for _, matrix_a in factors])
    new_b = np.stack([matrix_b for matrix_b, _ in factors], axis=2)
    return new_a.reshape(-1, *a[1:]), new_b.reshape(b[0], -1, *b[2:])


def write_adapter(
    out: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    source: AdapterFolder | None = None,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write a new adapter in PEFT's format, or in that of `source`. An error leaves nothing behind.

    Args:
        source: The original adapter, whose tokenizer, labels and base identity (`COPIED_FILES`) are copied.
        files: Additional files by name, in PEFT's format.

    Raises:
        RunFolderError: `out` exists or can't be written.
    """
    if source is not None and source.foreign is not None:
        source.foreign.write(out, config, tensors)
        return
    with create_output(out), replace_folder(out) as temporary:
        write_tensors(temporary / WEIGHTS_FILE, tensors, {"format": "pt"})
        text = json.dumps(dict(config), indent=2, sort_keys=True) + "\n"
        (temporary / CONFIG_FILE).write_text(text, encoding="utf-8")
        if source is not None:
            for file in (source.path / name for name in COPIED_FILES):
                if file.is_file():
                    shutil.copy2(file, temporary)
        for name, content in (files or {}).items():
            (temporary / name).write_bytes(content)


@contextmanager
def ensure_peft_format(folder: Path) -> Iterator[Path]:
    """Yield the folder itself, or a temporary copy in PEFT's format if mlx-lm wrote it.

    Raises:
        ModelError: The weights are not a readable safetensors file.
    """
    if (folder / WEIGHTS_FILE).exists() or not (folder / MLX_FILE).is_file():
        if (folder / WEIGHTS_FILE).exists():
            open_tensors(folder / WEIGHTS_FILE)
        yield folder
        return
    adapter = open_adapter(folder)
    with tempfile.TemporaryDirectory(prefix="rightrank-") as name:
        converted = Path(name) / folder.name
        write_adapter(converted, adapter.config, {key: adapter.load_tensor(key) for key in adapter.keys})
        yield converted
