"""A trained adapter cut to a lower rank: the best approximation of its s·B·A, by singular values."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from rightrank.maths.scaling import lora_scale
from rightrank.records import Arm
from rightrank.settings import SelectSettings

Pair = tuple[torch.Tensor, torch.Tensor]


def truncated_adapter(folder: Path, arm: Arm, settings: SelectSettings) -> dict[str, torch.Tensor]:
    """The tensors saved in `folder`, in PEFT's names, every A and B cut to `arm.rank`; all others as they are.

    The scale of the lower rank is divided out, so that the product with it is the cut of the product before.
    """
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, a in list(tensors.items()):
        if "lora_A" not in name and "lora_embedding_A" not in name:
            continue
        partner = name.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")
        before = lora_scale(settings.scaling, arm.lora_alpha, a.shape[0])
        after = lora_scale(settings.scaling, arm.lora_alpha, arm.rank)
        tensors[name], tensors[partner] = truncate(a, tensors[partner], arm.rank, before / after)
    return tensors


def truncate(a: torch.Tensor, b: torch.Tensor, rank: int, factor: float) -> Pair:
    """A' [rank, in] and B' [out, rank] with B'·A' the best approximation of factor·B·A; each takes the root of the
    singular values. `a` is [r, in], `b` is [out, r], of any float type; computed in float32.
    """
    q_b, r_b = torch.linalg.qr(b.float())
    q_a, r_a = torch.linalg.qr(a.float().T)
    u, sigma, vt = torch.linalg.svd(factor * r_b @ r_a.T, full_matrices=False)
    root = sigma[:rank].sqrt()
    cut_a = (root[:, None] * vt[:rank]) @ q_a.T
    cut_b = q_b @ (u[:, :rank] * root)
    return cut_a.to(a.dtype).contiguous(), cut_b.to(b.dtype).contiguous()
