"""Measure `inspect` on an adapter of 7B shape (224 modules of rank 64, 640 MB), beside QR decompositions of every factor.

    python -m benchmarks.spectra

Prints seconds of processor time of the complete command, and of the spectra alone by either method, in one run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.machine import describe_machine
from rightrank.adapters import spectra

BLOCKS, RANK, SIGNAL_RANK = 32, 64, 8
WIDTH, INNER = 4096, 11008
SHAPES = {f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"} | {
    "mlp.gate_proj": (INNER, WIDTH),
    "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
}


def write_adapter(folder: Path) -> None:
    """Write a seeded adapter: A as PEFT draws it, B as noise and a signal of a lower rank."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for block in range(BLOCKS):
        for name, (rows, columns) in SHAPES.items():
            key = f"base_model.model.model.layers.{block}.{name}"
            signal = torch.randn(rows, SIGNAL_RANK, generator=generator)
            signal = signal @ torch.randn(SIGNAL_RANK, RANK, generator=generator)
            tensors[f"{key}.lora_A.weight"] = (torch.rand(RANK, columns, generator=generator) * 2 - 1) / columns**0.5
            tensors[f"{key}.lora_B.weight"] = 1e-3 * (torch.randn(rows, RANK, generator=generator) + signal)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": sorted(SHAPES)}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def measure_cpu(action: Callable[[], Any]) -> float:
    """Return the user time of this process and of its children while `action` runs."""
    begin = os.times()
    action()
    end = os.times()
    return end.user - begin.user + end.children_user - begin.children_user


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_adapter(folder)
        command = [sys.executable, "-m", "rightrank", "inspect", name, "--json"]
        begun = time.perf_counter()
        process = measure_cpu(lambda: subprocess.run(command, check=True, capture_output=True))
        wall = time.perf_counter() - begun
        gram = min(measure_cpu(lambda: spectra.inspect_adapter(folder)) for _ in range(2))
        with patch.object(spectra, "compute_triangle", lambda matrix: np.linalg.qr(matrix, mode="r")):
            qr = measure_cpu(lambda: spectra.inspect_adapter(folder))
    print(describe_machine())
    print(
        f"command {process:.2f} s of processor time, {wall:.2f} s; spectra {gram:.2f} s, by QR {qr:.2f} s: {qr / gram:.1f} times"
    )


if __name__ == "__main__":
    main()
