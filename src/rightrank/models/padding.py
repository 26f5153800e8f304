"""An adapter at one rank and one scale, alpha/r, for servers that support neither patterns nor rsLoRA.

Rows of zeros appended to A and columns of zeros appended to B leave B·A unchanged, so the adapter computes the same
function.
"""

from __future__ import annotations

from pathlib import Path

import torch

from rightrank.models.adapter_files import AdapterFolder, AdapterModule, open_adapter, write_adapter
from rightrank.schema.errors import ModelError

UNSUPPORTED = ("use_dora", "lora_bias")  # by the servers


def write_padded(source: Path, out: Path, rank: int) -> None:
    """Write the adapter in `source` to `out` with `rank` in every module, an integer `lora_alpha` and no patterns.

    A module whose scale differs from alpha/rank has the ratio multiplied into its B, rounded to the file's dtype. The
    numbers of all other modules stay the same.

    Raises:
        ModelError: not a LoRA adapter, an adapter with DoRA or biases, or a module above `rank`.
        RunFolderError: `out` exists or can't be written.
    """
    adapter = open_adapter(source)
    _require_plain(adapter, rank)
    alpha = max(1, round(_common_scaling(adapter) * rank))
    tensors = {key: adapter.tensor(key) for key in adapter.other_keys}
    for module in adapter.modules:
        tensors |= _padded(adapter, module, rank, alpha / rank)
    changes = {"r": rank, "lora_alpha": alpha, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    write_adapter(out, dict(adapter.config) | changes, tensors)


def _require_plain(adapter: AdapterFolder, rank: int) -> None:
    given = [name for name in UNSUPPORTED if adapter.config.get(name)]
    kinds = dict.fromkeys(module.how for module in adapter.modules)
    given += [f"{kind.label} ({kind.why_not_padded})" for kind in kinds if kind.why_not_padded]
    if adapter.base_changing_init is not None:
        given.append(f"init_lora_weights {adapter.base_changing_init}")
    if given:
        raise ModelError(
            f"{adapter.path}: an adapter with {given[0]} can't be padded; merge it into the base to serve it"
        )
    if (above := max(adapter.modules, key=lambda module: module.rank)).rank > rank:
        raise ModelError(f"{adapter.path}: {above.name} has rank {above.rank}, above {rank}; resize the adapter first")


def _common_scaling(adapter: AdapterFolder) -> float:
    """The most frequent scale, so that as many modules as possible keep their numbers."""
    scalings = [module.scaling for module in adapter.modules]
    return max(scalings, key=scalings.count)


def _padded(adapter: AdapterFolder, module: AdapterModule, rank: int, scaling: float) -> dict[str, torch.Tensor]:
    a, b = adapter.tensor(module.a_key), adapter.tensor(module.b_key)
    ratio = module.scaling / scaling
    if ratio != 1.0:
        b = (b.double() * ratio).to(b.dtype)
    more = rank - module.rank
    return {
        module.a_key: torch.cat([a, a.new_zeros(more, *a.shape[1:])], dim=0),
        module.b_key: torch.cat([b, b.new_zeros(b.shape[0], more, *b.shape[2:])], dim=1),
    }
