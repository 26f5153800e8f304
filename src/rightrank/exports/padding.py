"""An adapter at one rank and one scale, alpha/r: what a server takes that knows neither patterns nor rsLoRA.

Rows of zeros below A and columns of zeros beside B add nothing to B·A, so the function stays what it is.
"""

from __future__ import annotations

from pathlib import Path

import torch

from rightrank.errors import ModelError
from rightrank.io.adapter_folder import AdapterFolder, AdapterModule, open_adapter, write_adapter

MISSING_IN_SERVERS = ("use_dora", "lora_bias")


def write_padded(source: Path, out: Path, rank: int) -> None:
    """Write the adapter in `source` to `out` at `rank` everywhere, with a whole `lora_alpha` and no patterns.

    Where a module's scale is not that alpha/rank, the rest goes into its B, rounded to the file's dtype; where it is, every
    number of the adapter stays as it is.

    Raises:
        ModelError: not a LoRA adapter, one of DoRA or with biases, or a module above `rank`.
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
    given = [name for name in MISSING_IN_SERVERS if adapter.config.get(name)]
    if adapter.base_changing_init is not None:
        given.append(f"init_lora_weights {adapter.base_changing_init}")
    if given:
        raise ModelError(
            f"{adapter.path}: an adapter with {given[0]} can't be padded; merge it into the base to serve it"
        )
    if (above := max(adapter.modules, key=lambda module: module.rank)).rank > rank:
        raise ModelError(f"{adapter.path}: {above.name} has rank {above.rank}, above {rank}; resize the adapter first")


def _common_scaling(adapter: AdapterFolder) -> float:
    """The scale that most modules have: their numbers then stay as they are."""
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
