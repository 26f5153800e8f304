"""Resize one file by `rightrank resize` and by the script resize_lora of a checkout of kohya's sd-scripts, and compare the updates and the time.

    OMP_NUM_THREADS=1 python -m benchmarks.consumers.sd_scripts CHECKOUT COMMIT    # writes sd_scripts.json

The file has the keys, shapes and metadata of sd-scripts: Stable Diffusion 1.5 (linear layers, convolutions of 1×1 and 3×3, the text encoder) and layers of SDXL,
rank 32, alpha 16, 16 bits, with random factors. Errors are relative to the norm of all updates.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import MagicMock

import torch
from safetensors.torch import load_file, save_file

import rightrank
from benchmarks.machine import describe_machine
from benchmarks.results import store_result

RESULTS = Path(__file__).parent / "sd_scripts.json"
RANK, ALPHA, RANKS = 32, 16, (4, 8)
BLOCK = "lora_unet_down_blocks_0_attentions_0_"
LAYER = "lora_te_text_model_encoder_layers_0_"
SDXL = "lora_unet_input_blocks_8_1_transformer_blocks_0_"
SHAPES: dict[str, tuple[int, ...]] = {
    **dict.fromkeys((f"{BLOCK}proj_in", f"{BLOCK}proj_out"), (320, 320, 1, 1)),
    **{f"{BLOCK}transformer_blocks_0_attn1_to_{name}": (320, 320) for name in ("q", "k", "v", "out_0")},
    **{f"{BLOCK}transformer_blocks_0_attn2_to_{name}": (320, 768) for name in ("k", "v")},
    f"{BLOCK}transformer_blocks_0_ff_net_0_proj": (2560, 320),
    f"{BLOCK}transformer_blocks_0_ff_net_2": (320, 1280),
    **{f"lora_unet_down_blocks_0_resnets_0_{name}": (320, 320, 3, 3) for name in ("conv1", "conv2")},
    **{f"{LAYER}self_attn_{name}_proj": (768, 768) for name in ("q", "k", "v", "out")},
    f"{LAYER}mlp_fc1": (3072, 768),
    f"{SDXL}attn1_to_q": (1280, 1280),
    f"{SDXL}attn2_to_k": (1280, 2048),
}


def make_tensors() -> dict[str, torch.Tensor]:
    """Draw factors whose singular values fall at a different pace in each module."""
    torch.manual_seed(0)
    tensors = {}
    for number, (name, (rows, columns, *kernel)) in enumerate(SHAPES.items()):
        strengths = torch.logspace(0, -0.5 - number / 10, RANK)
        up = torch.randn(rows, RANK) * strengths
        tensors[f"{name}.lora_up.weight"] = up.reshape(rows, RANK, *(1 for _ in kernel)).half()
        tensors[f"{name}.lora_down.weight"] = torch.randn(RANK, columns, *kernel).half()
        tensors[f"{name}.alpha"] = torch.tensor(ALPHA).half()
    return tensors


def compute_updates(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return all updates, alpha / rank · up · down, as one vector in 64 bits."""
    updates = []
    for name in SHAPES:
        up, down = (tensors[f"{name}.lora_{factor}.weight"].double().flatten(1) for factor in ("up", "down"))
        updates.append((float(tensors[f"{name}.alpha"]) / len(down) * up @ down).flatten())
    return torch.cat(updates)


def load_resizer(checkout: Path) -> Any:
    """Import the script. Its imports from `library` only write logs and hashes; stand-ins replace them."""
    sys.modules.update(dict.fromkeys(("library", "library.utils"), MagicMock()))
    spec = spec_from_file_location("resize_lora", checkout / "networks" / "resize_lora.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(checkout: Path, commit: str) -> None:
    resizer, rows = load_resizer(checkout), []
    with TemporaryDirectory() as folder:
        source = Path(folder) / "source.safetensors"
        save_file(make_tensors(), source, {"ss_network_dim": str(RANK), "ss_network_alpha": str(ALPHA)})
        original = compute_updates(load_file(source))
        rightrank.resize(source, Path(folder) / "first.safetensors", rank=1)  # imports are not measured
        for rank in RANKS:
            out, start = Path(folder) / f"{rank}.safetensors", time.process_time()
            rightrank.resize(source, out, rank=rank)
            middle = time.process_time()
            tensors = resizer.load_state_dict(str(source), torch.float)[0]
            theirs, *_ = resizer.resize_lora_model(tensors, rank, rank, torch.half, "cpu", None, None, False)
            end, updates = time.process_time(), [compute_updates(load_file(out)), compute_updates(theirs)]
            errors = [float((update - original).norm() / original.norm()) for update in updates]
            rows.append(
                {
                    "rank": rank,
                    "rightrank": {"error": errors[0], "seconds": round(middle - start, 2)},
                    "sd-scripts": {"error": errors[1], "seconds": round(end - middle, 2)},
                    "difference": float((updates[0] - updates[1]).norm() / original.norm()),
                }
            )
    result = {"modules": len(SHAPES), "commit": commit, "seed": 0, "rows": rows, "machine": describe_machine()}
    store_result(result, RESULTS)
    print(json.dumps(result, indent=1))
    print(
        f"sd-scripts {commit}: errors at ranks {RANKS} differ by at most {max(row['difference'] for row in rows):.1g} of the update"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
