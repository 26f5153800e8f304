"""Compare a base model in memory with the folder that its adapter names.

The folder is where the adapter will be loaded. A base that was changed in memory, for example by merging another adapter into it, is not there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import safe_open

from rightrank.bases.safetensors_files import find_shards
from rightrank.schema.errors import ModelError

# Fragments of the names of weights that the adapter brings itself, or that it replaces.
ADAPTER_FRAGMENTS = (".lora_", ".modules_to_save.", ".original_module.", "trainable_tokens_")
MIN_SUFFIX_LENGTH = (
    3  # components that a weight's name and its name in a file must share at the end if neither contains the other
)


def require_named_base(base: Any, name: str, index: int = 0, step: int = 1) -> list[str]:
    """Raise if a base model in memory has other weights than the folder that it names. Return a note on weights that were not compared.

    Args:
        base: The model, with an adapter injected into it.
        name: The folder, or a name in the cache of the hub.
        index: Number of this process; it compares each `step`-th weight. If the weights are sharded, all processes compare all of them.

    Raises:
        ModelError: A weight differs, by more than the rounding to its type or to 16 bits.
    """
    folder = _find_folder(name, getattr(base.config, "_commit_hash", None))
    weights = {
        key.replace(".base_layer.", "."): parameter
        for key, parameter in base.named_parameters()
        if not parameter.requires_grad and not any(fragment in f".{key}" for fragment in ADAPTER_FRAGMENTS)
    }
    try:
        files = [] if folder is None else find_shards(folder)
    except ModelError:  # weights in another format
        files = []
    if not files:
        return [f"the base model was not compared with {name!r}: no safetensors files were found there"] if name else []
    num_values, num_compared = 0, 0
    with ExitStack() as stack, torch.no_grad():
        opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        stored = {key: file for file in opened for key in file.keys()}  # noqa: SIM118 - the file is no mapping
        names_by_suffix = _index_suffixes(list(stored))
        for key, parameter in list(weights.items())[index::step]:
            gather_parameter: Any = getattr(parameter, "full_tensor", None)  # of a sharded one
            value = parameter if gather_parameter is None else gather_parameter()
            num_values += value.numel()
            candidates = [key] if key in stored else _find_candidates(key, names_by_suffix)
            if not candidates or not value.is_floating_point() or value.is_meta:
                continue
            num_compared += value.numel()
            if not any(_is_equal(value, stored[candidate].get_tensor(candidate)) for candidate in candidates):
                raise ModelError(
                    f"the base model in memory has other weights ({key}) than {name}, which its adapter would name; save it by save_pretrained, "
                    "load it from there, and add the adapter then"
                )
    uncompared_share = 1 - num_compared / max(1, num_values)
    if not uncompared_share:
        return []
    return [
        f"{uncompared_share:.1%} of the base model's weights were not compared with {name}: they are quantized, or have other names there"
    ]


def _find_folder(name: str, revision: str | None) -> Path | None:
    """Return the folder that holds the files of a model, or None if it is not on this machine."""
    folder = Path(name).expanduser()
    if not name or folder.is_dir():
        return folder if name else None
    try:
        config = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(config).parent if isinstance(config, str) else None


def _index_suffixes(names: Sequence[str]) -> dict[str, list[str]]:
    """Return the names by each of their endings of whole components."""
    names_by_suffix: dict[str, list[str]] = {}
    for name in names:
        components = name.split(".")
        for start in range(len(components)):
            names_by_suffix.setdefault(".".join(components[start:]), []).append(name)
    return names_by_suffix


def _find_candidates(name: str, names_by_suffix: Mapping[str, Sequence[str]]) -> Sequence[str]:
    """Return the names in a file that share the longest ending with a weight's name. transformers adds and drops prefixes."""
    components = name.split(".")
    for start in range(len(components)):
        suffix = ".".join(components[start:])
        names = names_by_suffix.get(suffix, ())
        if names and (start == 0 or len(components) - start >= MIN_SUFFIX_LENGTH):
            return names
        if suffix in names:
            return [suffix]
    return ()


def _is_equal(value: torch.Tensor, stored: torch.Tensor) -> bool:
    """Return whether a weight is the stored one in its own type. It may have been rounded to 16 bits when it was loaded."""
    if value.shape != stored.shape:
        return False
    stored = stored.to(value.device)
    rounded = (stored.to(dtype) for dtype in (value.dtype, torch.bfloat16, torch.float16))
    return any(torch.equal(value, each.to(value.dtype)) for each in rounded)
