"""Embeddings: ΔW = s·B·A [width, vocabulary], of which a token takes one column. B starts from the draw, A at zero."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from rightrank.models.kinds.base import AdapterKind, CurrentRouting, Draw, Forward, StoredPair


class Embedding(AdapterKind):
    """A `torch.nn.Embedding`. The names of A and B are those of a linear layer, and their roles are swapped."""

    name = "embedding"
    label = "an embedding"

    def adapts(self, module: Any) -> bool:
        return isinstance(module.base_layer, torch.nn.Embedding) and not module.lora_variant

    def start(self, module: Any, adapter: str, draw: Draw) -> None:
        b = module.lora_embedding_B[adapter]
        module.lora_embedding_A[adapter].zero_()
        b.copy_(draw.normal(b.shape[1], b.shape[0]).T.to(b))

    def forward(self, module: Any, routing: CurrentRouting) -> Forward:
        def forward(ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            result: torch.Tensor = module.base_layer(ids, *args, **kwargs)
            current = routing()
            if current is None:
                return result
            factor = module._get_embed_scale()  # Gemma scales inside its embedding
            pieces: list[torch.Tensor] = []
            begin = 0
            for part in current.parts(ids.numel()):
                part_ids = ids.reshape(-1)[begin : begin + part.rows]
                begin += part.rows
                if part.adapter not in module.lora_embedding_A:
                    pieces.append(result.new_zeros(part.rows, result.shape[-1]))
                    continue
                down = F.embedding(part_ids, module.lora_embedding_A[part.adapter].T)
                delta = (down @ module.lora_embedding_B[part.adapter].T) * module.scaling[part.adapter]
                pieces.append(delta if factor is None else delta * factor.to(delta.dtype))
            return result + torch.cat(pieces).view_as(result).to(result.dtype)

        return forward

    def stores(self, pair: StoredPair) -> bool:
        return pair.embedding
