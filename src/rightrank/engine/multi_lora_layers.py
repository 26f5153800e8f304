"""The forward pass of the layers that PEFT adapted: that of their kind, or of each arm's copy in `modules_to_save`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper

from rightrank.kinds import kind_of
from rightrank.kinds.base import CurrentRouting, salt_of


def install(name: str, module: Any, current_routing: CurrentRouting) -> None:
    """Give an adapted module (PEFT's LoraLayer or ModulesToSaveWrapper) the forward pass that routes rows to adapters."""
    if isinstance(module, ModulesToSaveWrapper):
        vars(module)["forward"] = _saved_forward(module, current_routing)
        return
    vars(module)["rightrank_salt"] = salt_of(name)
    vars(module)["forward"] = kind_of(module).forward(module, current_routing)


def _saved_forward(module: Any, current_routing: CurrentRouting) -> Callable[..., Any]:
    """A module in `modules_to_save`, of which every arm trains a copy: each arm's rows go through its own copy."""

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        routing = current_routing()
        if routing is None:
            return module.original_module(x, *args, **kwargs)
        if len(routing.adapters) == 1:
            return module.modules_to_save[routing.adapters[0]](x, *args, **kwargs)
        along = 1 if x.shape[0] == 1 else 0  # packed: one row of tokens; padded: one row per example
        parts = routing.parts(x.shape[along])
        pieces = torch.split(x, [part.rows for part in parts], dim=along)
        outputs = [
            module.modules_to_save[part.adapter](piece, *args, **kwargs)
            for part, piece in zip(parts, pieces, strict=True)
        ]
        return torch.cat(outputs, dim=along)

    return forward
