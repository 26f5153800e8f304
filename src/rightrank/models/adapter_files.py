"""An adapter's files in PEFT's format: read with safetensors alone, checked before anything is computed, and written.

Neither PEFT nor the base model is needed to read one: tensor names, shapes and `adapter_config.json` define the adapter.
Files of kohya and mlx-lm (`lora_files.py`) are read as the same adapters.
"""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from rightrank.data.files import UnreadableError, read_json_object, replacing_folder, require_absent
from rightrank.models.kinds import stored_kind
from rightrank.models.kinds.base import AdapterKind, Layout, StoredPair
from rightrank.models.kinds.other import MAGNITUDE
from rightrank.models.labels import CLASSIFIER_FILE, write_classifier
from rightrank.models.lora_files import (
    FACTOR,
    MLX_FILE,
    PREFIX,
    config_of_file,
    config_of_mlx,
    is_a,
    mlx_key,
    updated_header,
    write_file,
    write_mlx,
)
from rightrank.models.places import BASE_FILE, CONFIG_FILE, require_adapter_folder
from rightrank.models.ranks import lora_scaling, pattern_matches, pattern_value
from rightrank.models.weights import read_header
from rightrank.schema.arrays import Floats
from rightrank.schema.errors import ModelError, RunFolderError

WEIGHTS_FILE = "adapter_model.safetensors"
MIN_ALPHA, MAX_ALPHA = 1e-9, 1e9
MAX_CONFIG_BYTES = 16 * 2**20  # bytes
# Adapters are trained in at most 32 bits. Values beyond these are damage, and their squares overflow 64 bits.
MIN_VALUE, MAX_VALUE = float(np.finfo(np.float32).smallest_subnormal), float(np.finfo(np.float32).max)
# Options with which the adapter's update is not s·B·A.
FOREIGN_OPTIONS = ("use_qalora", "use_bdlora", "kasa_config", "arrow_config", "monteclora_config", "velora_config")
# Initialisations that change the base's weights on loading, so that ΔW is not s·B·A alone.
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "spiece.model", "chat_template.jinja",
)  # fmt: skip
BESIDE = (BASE_FILE, CLASSIFIER_FILE, *TOKENIZER_FILES)  # what an adapter of another rank keeps of a folder
NOT_PADDED = ("use_dora", "lora_bias")  # options that servers do not support


def open_adapter(path: Path) -> AdapterFolder:
    """Read and check the configuration and the header of an adapter folder of PEFT or mlx-lm, or of a LoRA file of kohya.

    Raises:
        ModelError: not a LoRA adapter, pickled weights, missing tensors, or shapes that contradict the configuration.
    """
    stored = None
    if path.is_file() and path.suffix == ".safetensors":
        config, (shapes, _) = config_of_file(path), read_header(path)
    elif (path / MLX_FILE).is_file() and not (path / WEIGHTS_FILE).exists():
        config, shapes, stored = config_of_mlx(path)
        _check_config(path / CONFIG_FILE, config)
    else:
        config, shapes = _read_config(path), _read_shapes(path)
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
    def kind(self) -> str:
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
    mlx: Mapping[str, Any] | None = None  # mlx-lm's configuration, if it wrote the folder

    @property
    def weights(self) -> Path:
        return self.weights_in(self.path)

    def weights_in(self, place: Path) -> Path:
        """The weights' file of an adapter in this format at `place`."""
        return place if self.is_file else place / (WEIGHTS_FILE if self.mlx is None else MLX_FILE)

    @property
    def is_file(self) -> bool:
        """Whether it is a LoRA file of kohya and no folder of PEFT."""
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
            tensor: torch.Tensor = file.get_tensor(key) if self.mlx is None else file.get_tensor(mlx_key(key)).T
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
        values: Floats = self.tensor(key).double().numpy()
        if not (np.abs(values) <= MAX_VALUE).all():
            raise ModelError(
                f"{self.weights}: {key} holds NaN or infinite values; the training diverged: give an earlier checkpoint"
            )
        values[np.abs(values) < MIN_VALUE] = 0.0
        return values


def _read_config(path: Path) -> dict[str, Any]:
    file = path / CONFIG_FILE
    require_adapter_folder(path)
    try:
        config = read_json_object(file, MAX_CONFIG_BYTES)
    except UnreadableError as error:
        raise ModelError(f"{file}: not readable as JSON ({error}); save the adapter again") from None
    _check_config(file, config)
    return config


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


def _read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    file = path / WEIGHTS_FILE
    if not file.exists():
        if (path / "adapter_model.bin").exists():
            raise ModelError(
                f"{path}: only pickled weights (adapter_model.bin), which can run code when read; convert them if you trust "
                "the file: PeftModel.from_pretrained(base, folder).save_pretrained(folder, safe_serialization=True)"
            )
        raise ModelError(f"{path}: there is no {WEIGHTS_FILE}; save the adapter again with save_pretrained")
    return read_header(file)[0]


def _factor_keys(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, dict[str, str]]:
    """By module, the keys of its `A` and its `B`."""
    pairs: dict[str, dict[str, str]] = {}
    for key in shapes:
        match = FACTOR.match(key)
        if match is not None:
            pairs.setdefault(match["module"], {})["A" if is_a(match) else "B"] = key
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
    how = stored_kind(pair)
    if how is None:
        raise ModelError(f"{path}: {pair.module} is of a kind that rightrank can't read; load it with PEFT")
    address = how.address(pair)
    layout = _layout(path, how, pair, pattern_value(config["rank_pattern"], address, config["r"]))
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
            a_key=keys["A"],
            b_key=keys["B"],
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


def write_like(
    adapter: AdapterFolder,
    out: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write a changed adapter in the format of `adapter`: a folder of PEFT or mlx-lm, or a LoRA file.

    PEFT's keeps what lies beside it, and gets further `files`.

    Raises:
        RunFolderError: `out` exists, or can't be written.
    """
    if adapter.mlx is not None:
        write_mlx(out, adapter.mlx, config, tensors)
        return
    if not adapter.is_file:
        write_adapter(out, config, tensors, adapter.path, files)
        return
    _, metadata = read_header(adapter.path)
    write_file(out, tensors, updated_header(metadata, config))


def write_adapter(
    out: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    source: Path | None = None,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write a new adapter folder, whole or not at all.

    Args:
        source: the adapter that it comes from, of which it keeps what lies beside the weights (`BESIDE`).
        files: further ones, by name.

    Raises:
        RunFolderError: `out` exists, or can't be written.
    """
    require_absent(out)
    try:
        with replacing_folder(out) as temporary:
            save_file(
                {key: value.contiguous() for key, value in tensors.items()}, temporary / WEIGHTS_FILE, {"format": "pt"}
            )
            text = json.dumps(dict(config), indent=2, sort_keys=True) + "\n"
            (temporary / CONFIG_FILE).write_text(text, encoding="utf-8")
            if source is not None:
                for file in (source / name for name in BESIDE):
                    if file.is_file():
                        shutil.copy2(file, temporary)
            for name, content in (files or {}).items():
                (temporary / name).write_bytes(content)
    except OSError as error:
        raise RunFolderError(f"{out}: can't write there ({error.strerror or error}); give a writable folder") from None


@contextmanager
def peft_folder(folder: Path) -> Iterator[Path]:
    """The folder itself, or in the block a copy in PEFT's format of one that mlx-lm wrote."""
    if not (folder / MLX_FILE).is_file() or (folder / WEIGHTS_FILE).exists():
        yield folder
        return
    adapter = open_adapter(folder)
    with tempfile.TemporaryDirectory(prefix="rightrank-") as name:
        place = Path(name) / folder.name
        write_adapter(place, adapter.config, {key: adapter.tensor(key) for key in adapter.keys})
        yield place


def save_adapter(peft_model: Any, folder: Path, base_name: str, adapter: str = "default") -> None:
    """Write configuration and weights, and a classifier's labels; `base_name` is an absolute path or a hub name."""
    config = peft_model.peft_config[adapter]
    sharded = {
        name: one
        for name, one in peft_model.named_parameters()
        if isinstance(one, DTensor) and ("lora_" in name or one.requires_grad)
    }
    whole = {name: one.full_tensor().detach().cpu() for name, one in sharded.items()} or None
    peft_model.peft_config[adapter] = copy.deepcopy(config)  # PEFT writes into the one that it saves
    peft_model.peft_config[adapter].base_model_name_or_path = base_name
    with replacing_folder(folder) as temporary, warnings.catch_warnings():
        # PEFT takes the biases of lora_bias for factors of a wrong shape.
        warnings.filterwarnings("ignore", message=r"Adapter .* LoRA tensor\(s\) have invalid shape: \S+lora_B\.bias")
        try:
            peft_model.save_pretrained(
                str(temporary),
                safe_serialization=True,
                selected_adapters=[adapter],
                save_embedding_layers=False,
                state_dict=whole,
            )
        finally:
            peft_model.peft_config[adapter] = config
        if adapter != "default":  # PEFT saves a named adapter in a subfolder
            for path in list((temporary / adapter).iterdir()):
                path.replace(temporary / path.name)
            (temporary / adapter).rmdir()
        if config.task_type == "SEQ_CLS":
            write_classifier(temporary, peft_model.config)
        readme = temporary / "README.md"  # PEFT's empty template; the final adapter gets a model card of its own
        readme.unlink(missing_ok=True)


def restore_adapter(peft_model: Any, folder: Path) -> None:
    """Load the saved tensors of `folder` into the adapter, of the same shapes."""
    set_peft_model_state_dict(peft_model, load_file(folder / "adapter_model.safetensors"))


def write_padded(source: Path, out: Path, rank: int, files: Mapping[str, bytes] | None = None) -> None:
    """Write the adapter in `source` to `out` with `rank` in every module, an integer `lora_alpha` and no patterns.

    Servers that support neither patterns nor rsLoRA take such an adapter. Rows of zeros appended to A and columns of zeros
    appended to B leave B·A unchanged. A module whose scale differs from alpha/rank has the ratio multiplied into its B,
    rounded to the file's dtype; as many modules as possible keep their numbers.

    Raises:
        ModelError: not a LoRA adapter, an adapter with DoRA or biases, or a module above `rank`.
        RunFolderError: `out` exists or can't be written.
    """
    adapter = open_adapter(source)
    _require_plain(adapter, rank)
    scalings = [module.scaling for module in adapter.modules]
    alpha = max(1, round(max(scalings, key=scalings.count) * rank))
    tensors = {key: adapter.tensor(key) for key in adapter.other_keys}
    for module in adapter.modules:
        a, b = adapter.tensor(module.a_key), adapter.tensor(module.b_key)
        ratio, more = module.scaling / (alpha / rank), rank - module.rank
        if ratio != 1.0:
            b = (b.double() * ratio).to(b.dtype)
        tensors[module.a_key] = torch.cat([a, a.new_zeros(more, *a.shape[1:])], dim=0)
        tensors[module.b_key] = torch.cat([b, b.new_zeros(b.shape[0], more, *b.shape[2:])], dim=1)
    changes = {"r": rank, "lora_alpha": alpha, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    write_adapter(out, dict(adapter.config) | changes, tensors, source, files)


def _require_plain(adapter: AdapterFolder, rank: int) -> None:
    kinds = dict.fromkeys(module.how for module in adapter.modules)
    obstacles = [name for name in NOT_PADDED if adapter.config.get(name)]
    obstacles += [f"{kind.label} ({kind.why_not_padded})" for kind in kinds if kind.why_not_padded]
    if adapter.base_changing_init is not None:
        obstacles.append(f"init_lora_weights {adapter.base_changing_init}")
    if obstacles:
        raise ModelError(
            f"{adapter.path}: an adapter with {obstacles[0]} can't be padded; merge it into the base to serve it"
        )
    if (above := max(adapter.modules, key=lambda module: module.rank)).rank > rank:
        raise ModelError(f"{adapter.path}: {above.name} has rank {above.rank}, above {rank}; resize the adapter first")
